"""Time conversions of int4 experts, as they are dequantized and as they are requantized, in turn.

    python -m benchmarks.experts FOLDER [RUNS] [--zero-points] [--linears]

The checkpoint has one layer with 24 experts of the size of Kimi K2's, 1.06 * 10^9 weights in groups of 32, and is kept
in FOLDER for the next time. With `--linears` it is a model of 14 layers without experts instead, 0.94 * 10^9 weights;
two thirds of them have 2,048 columns, the others 8,192. Each conversion is a process of its own; nothing is synced.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.shapes import random_tensor
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.writer import ShardedWriter
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from collections.abc import Mapping

HIDDEN, INTERMEDIATE, EXPERTS, HEADS, HEAD_DIM, VOCABULARY, GROUP = 7168, 2048, 24, 64, 128, 1024, 32
LAYERS, SMALL_HIDDEN, SMALL_INTERMEDIATE, SMALL_HEADS = 14, 2048, 8192, 16
PLACES = {
    "dequantized": ("--sm", "100"),
    "fp8-block": ("--sm", "90", "--requantize", "experts=fp8-block"),
    "mxfp4": ("--sm", "100", "--requantize", "experts=mxfp4"),
    "nvfp4": ("--sm", "100", "--requantize", "experts=nvfp4"),
}
"""The options of each conversion of experts."""

PLACES_OF_LINEARS = {
    "dequantized": ("--sm", "90"),
    "fp8": ("--sm", "90", "--requantize", "linears=fp8"),
    "fp8-block": ("--sm", "90", "--requantize", "linears=fp8-block"),
}
"""The options of each conversion of the model without experts."""

WEIGHTS: Mapping[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
COMMON: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
}
CONFIG: Mapping[str, Any] = {
    **COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
}
CONFIG_OF_LINEARS: Mapping[str, Any] = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": SMALL_HIDDEN,
    "intermediate_size": SMALL_INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": SMALL_HEADS,
    "num_key_value_heads": SMALL_HEADS,
}


def main(folder: Path, runs: int, *, zero_points: bool, linears: bool) -> None:
    """Write the checkpoint unless it is there, run all conversions `runs` times, and print medians."""
    name = ("linears" if linears else "experts") + ("-with-zero-points" if zero_points else "")
    source, out, places = folder / name, folder / "out", PLACES_OF_LINEARS if linears else PLACES
    if not (source / "config.json").exists():
        write(source, zero_points=zero_points, linears=linears)
    seconds: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(runs):
        for name, options in places.items():
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "trtllm_ct", "convert", source, out, "--no-sync", "--engine", "1.3"]
            started = time.perf_counter()
            subprocess.run([*map(str, command), *options], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
            seconds[name].append(time.perf_counter() - started)
    shutil.rmtree(out, ignore_errors=True)
    first = median(seconds["dequantized"])
    for name, found in seconds.items():
        print(f"{name}: {median(found):.2f} s, {median(found) / first:.2f} x ({min(found):.2f} to {max(found):.2f} s)")


def write(directory: Path, *, zero_points: bool, linears: bool) -> None:
    """Write the checkpoint."""
    directory.mkdir(parents=True)
    specs, shapes = (plain_of_linears(), of_linears()) if linears else (plain(), of_experts())
    shape_of = {f"{module}.weight_shape": shape for module, shape in shapes.items()}
    for module, shape in shapes.items():
        specs[f"{module}.weight_packed"] = TensorSpec(DType.I32, (shape[0], shape[1] // 8))
        specs[f"{module}.weight_scale"] = TensorSpec(DType.BF16, (shape[0], shape[1] // GROUP))
        specs[f"{module}.weight_shape"] = TensorSpec(DType.I64, (2,))
        if zero_points:
            specs[f"{module}.weight_zero_point"] = TensorSpec(DType.I32, (shape[0] // 8, shape[1] // GROUP))
    with ShardedWriter(directory, specs, max_shard_bytes=5 * 10**9) as writer:
        for name, spec in specs.items():
            stored = StoredArray(np.array(shape_of[name], np.int64), DType.I64) if name in shape_of else None
            writer.write(name, stored or random_tensor(name, spec, 0))
        writer.finish()
    group = {
        "targets": ["Linear" if linears else "re:.*experts.*_proj"],
        "weights": {**WEIGHTS, "symmetric": not zero_points},
    }
    config = {**(CONFIG_OF_LINEARS if linears else CONFIG)}
    config["quantization_config"] = {**config["quantization_config"], "config_groups": {"group_0": group}}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def of_experts() -> dict[str, tuple[int, int]]:
    """Return the shapes of the quantized weights of the layer with experts."""
    of_one = {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {
        f"model.layers.0.mlp.experts.{expert}.{local}": shape
        for expert in range(EXPERTS)
        for local, shape in of_one.items()
    }


def of_linears() -> dict[str, tuple[int, int]]:
    """Return the shapes of the quantized weights of the model without experts."""
    of_layer = {f"self_attn.{local}_proj": (SMALL_HIDDEN, SMALL_HIDDEN) for local in "qkvo"}
    of_layer |= {f"mlp.{local}_proj": (SMALL_INTERMEDIATE, SMALL_HIDDEN) for local in ("gate", "up")}
    of_layer["mlp.down_proj"] = (SMALL_HIDDEN, SMALL_INTERMEDIATE)
    return {f"model.layers.{layer}.{local}": shape for layer in range(LAYERS) for local, shape in of_layer.items()}


def plain_of_linears() -> dict[str, TensorSpec]:
    """Return the specs of the tensors of the model without experts that are not quantized."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, SMALL_HIDDEN),
        "lm_head": (VOCABULARY, SMALL_HIDDEN),
        "model.norm": (SMALL_HIDDEN,),
    }
    norms = [
        f"model.layers.{layer}.{name}_layernorm" for layer in range(LAYERS) for name in ("input", "post_attention")
    ]
    shapes |= dict.fromkeys(norms, (SMALL_HIDDEN,))
    return {f"{module}.weight": TensorSpec(DType.BF16, shape) for module, shape in shapes.items()}


def plain() -> dict[str, TensorSpec]:
    """Return the specs of the tensors of the layer with experts that are not quantized."""
    layer, queries = "model.layers.0", HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
        f"{layer}.input_layernorm": (HIDDEN,),
        f"{layer}.post_attention_layernorm": (HIDDEN,),
        f"{layer}.mlp.gate": (EXPERTS, HIDDEN),
        f"{layer}.self_attn.o_proj": (HIDDEN, queries),
    }
    shapes |= {f"{layer}.self_attn.{local}_proj": (queries, HIDDEN) for local in "qkv"}
    shapes |= {f"{layer}.self_attn.{local}_norm": (HEAD_DIM,) for local in "qk"}
    return {f"{module}.weight": TensorSpec(DType.BF16, shape) for module, shape in shapes.items()}


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=int, nargs="?", default=3)
    parser.add_argument("--zero-points", action="store_true")
    parser.add_argument("--linears", action="store_true")
    main(**vars(parser.parse_args()))

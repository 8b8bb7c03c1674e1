"""The headers of a hybrid mixture of 60 layers with 128 experts: int4 experts, FP8 attention, sparse files.

Three of four layers have linear attention. The payload is never written.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.kimi import write_sparse_file
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["HybridShape"]

_HIDDEN, _INNER, _VOCABULARY = 2048, 512, 151936
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}

Named = tuple[str, TensorSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridShape:
    """A model of the class Qwen3NextForCausalLM."""

    layers: int = 60
    experts: int = 128

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        groups = {
            "group_0": {"targets": ["re:.*mlp.*"], "weights": _INT4, "format": "pack-quantized"},
            "group_1": {
                "targets": ["re:.*attn.*"],
                "weights": _FP8,
                "input_activations": _TOKENS,
                "format": "float-quantized",
            },
        }
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "dtype": "bfloat16",
            "hidden_size": _HIDDEN,
            "intermediate_size": 5120,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "layer_types": [self._kind(layer) for layer in range(self.layers)],
            "linear_num_key_heads": 16,
            "linear_key_head_dim": 128,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": _INNER,
            "shared_expert_intermediate_size": _INNER,
            "vocab_size": _VOCABULARY,
            "tie_word_embeddings": False,
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "version": "0.14.0",
                "format": "mixed-precision",
                "ignore": ["lm_head"],
                "config_groups": groups,
            },
        }

    def write(self, directory: Path) -> None:
        """Write the files into `directory`, which must exist."""
        shards: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
        for name, spec in self._tensors():
            layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
            shards[f"model-{layer}.safetensors"][name] = spec
        for file, specs in shards.items():
            write_sparse_file(directory / file, specs)
        weight_map = {name: file for file, specs in shards.items() for name in specs}
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (directory / "config.json").write_text(json.dumps(self.config), encoding="utf-8")

    @staticmethod
    def _kind(layer: int) -> str:
        return "full_attention" if layer % 4 == 3 else "linear_attention"

    def _tensors(self) -> Iterator[Named]:
        yield _plain("model.embed_tokens.weight", _VOCABULARY, _HIDDEN)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield _plain(f"{prefix}input_layernorm.weight", _HIDDEN)
            yield _plain(f"{prefix}post_attention_layernorm.weight", _HIDDEN)
            yield from _full(f"{prefix}self_attn.") if layer % 4 == 3 else _linear(f"{prefix}linear_attn.")
            yield _plain(f"{prefix}mlp.gate.weight", self.experts, _HIDDEN)
            yield _plain(f"{prefix}mlp.shared_expert_gate.weight", 1, _HIDDEN)
            for owner in ("shared_expert", *(f"experts.{expert}" for expert in range(self.experts))):
                for name in ("gate_proj", "up_proj"):
                    yield from _int4(f"{prefix}mlp.{owner}.{name}", _INNER, _HIDDEN)
                yield from _int4(f"{prefix}mlp.{owner}.down_proj", _HIDDEN, _INNER)
        yield _plain("model.norm.weight", _HIDDEN)
        yield _plain("lm_head.weight", _VOCABULARY, _HIDDEN)


def _plain(name: str, *shape: int) -> Named:
    return name, TensorSpec(DType.BF16, shape)


def _int4(name: str, rows: int, columns: int) -> Iterator[Named]:
    yield f"{name}.weight_packed", TensorSpec(DType.I32, (rows, columns // 8))
    yield _plain(f"{name}.weight_scale", rows, columns // 32)
    yield f"{name}.weight_shape", TensorSpec(DType.I64, (2,))


def _fp8(name: str, rows: int, columns: int) -> Iterator[Named]:
    yield f"{name}.weight", TensorSpec(DType.F8_E4M3, (rows, columns))
    yield _plain(f"{name}.weight_scale", rows, 1)


def _full(prefix: str) -> Iterator[Named]:
    """Attention with a gate beside the queries."""
    for name, rows in (("q_proj", 8192), ("k_proj", 512), ("v_proj", 512)):
        yield from _fp8(f"{prefix}{name}", rows, _HIDDEN)
    yield from _fp8(f"{prefix}o_proj", _HIDDEN, 4096)
    yield _plain(f"{prefix}q_norm.weight", 256)
    yield _plain(f"{prefix}k_norm.weight", 256)


def _linear(prefix: str) -> Iterator[Named]:
    yield from _fp8(f"{prefix}in_proj_qkvz", 12288, _HIDDEN)
    yield from _fp8(f"{prefix}out_proj", _HIDDEN, 4096)
    yield _plain(f"{prefix}in_proj_ba.weight", 64, _HIDDEN)
    yield _plain(f"{prefix}conv1d.weight", 8192, 1, 4)
    for name, count in (("A_log", 32), ("dt_bias", 32), ("norm.weight", 128)):
        yield _plain(f"{prefix}{name}", count)

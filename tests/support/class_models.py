"""Tiny checkpoints of classes whose row lists no modules: config.json, and the names and shapes of their tensors.

Names and shapes are those that transformers 5.23 saves; a test compares them. Nothing here uses the tables of the
package under test.
"""

from __future__ import annotations

import json
from math import sqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from builders import DENSE, Built, quantization_block
from safetensors.torch import save_file
from stored_schemes import SCHEMES, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["CLASSES", "HYBRID_SIZES", "class_config", "quantizable", "text_of", "text_tensors", "write_class"]

HYBRID_SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_VISION = {"model.visual.blocks.0.attn.qkv.weight": (24, 16), "model.visual.patch_embed.proj.bias": (8,)}

CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen3NextForCausalLM": ("qwen3_next", {**HYBRID_SIZES, **_EXPERTS}),
    "Qwen3_5ForCausalLM": ("qwen3_5_text", HYBRID_SIZES),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe_text", {**HYBRID_SIZES, **_EXPERTS}),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", HYBRID_SIZES),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", {**HYBRID_SIZES, **_EXPERTS}),
}
"""The `model_type` and the sizes of the text model of each class."""

_NEVER_QUANTIZED = ("lm_head", ".gate", ".shared_expert_gate", "embed_tokens")
Spec = tuple[str, tuple[int, ...]]


def class_config(name: str, **sizes: Any) -> dict[str, Any]:
    """config.json of a class, without quantization; that of a wrapper has its text model in `text_config`."""
    model_type, defaults = CLASSES[name]
    text = {**defaults, **sizes}
    whole = {"architectures": [name], "model_type": model_type, "dtype": "bfloat16"}
    if "Conditional" not in name:
        return {**text, **whole}
    tied = text.pop("tie_word_embeddings")
    vision = {"model_type": model_type, "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 256}
    return {
        **whole,
        "text_config": {**text, "model_type": f"{model_type}_text", "dtype": "bfloat16"},
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text model."""
    text: Mapping[str, Any] = config.get("text_config", config)
    return text


def text_tensors(config: Mapping[str, Any]) -> Iterator[Spec]:
    """Name and shape of every tensor of the text model, experts one by one, under the names of a text-only model."""
    text = text_of(config)
    hidden = text["hidden_size"]
    yield "model.embed_tokens.weight", (text["vocab_size"], hidden)
    for layer, kind in enumerate(text["layer_types"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield from (
            _attention(text, f"{prefix}.self_attn")
            if kind == "full_attention"
            else _linear_attention(text, f"{prefix}.linear_attn")
        )
        yield from (
            _experts(text, f"{prefix}.mlp")
            if "num_experts" in text and layer not in text.get("mlp_only_layers", ())
            else _mlp(f"{prefix}.mlp", hidden, text["intermediate_size"])
        )
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (text["vocab_size"], hidden)


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether writers quantize a tensor unless they are told otherwise: the weight of a Linear."""
    module = name.removesuffix(".weight")
    return len(shape) == 2 and module != name and not module.endswith(_NEVER_QUANTIZED)


def write_class(
    directory: Path,
    name: str,
    scheme: str = "fp8-channel-token",
    *,
    dense: tuple[str, ...] = (),
    others: Mapping[str, str] = MappingProxyType({}),
    kv: bool = False,
    edit: Any = None,
    **sizes: Any,
) -> Built:
    """Write a random checkpoint of a class, whose Linears are stored by `scheme`, those that end with `dense` plain.

    `others` are the schemes of Linears with other ones, by the last part of their names.

    The text model of a wrapper is under `model.language_model.`, beside a plain vision tower. `dense` of the result has
    the exact values under the names of a text-only model. `kv` adds scales of the KV cache.
    """
    config = class_config(name, **sizes)
    writer = Writer(torch.bfloat16, torch.Generator().manual_seed(0))
    exact: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    plain = ["lm_head"]
    targets: dict[str, list[str]] = {}
    for tensor, shape in text_tensors(config):
        module = tensor.removesuffix(".weight")
        place = _place(name, module)
        if quantizable(tensor, shape) and scheme != DENSE and not module.endswith(dense or ("-",)):
            other = others.get(module.rpartition(".")[2], scheme)
            targets.setdefault(other, []).append(place)
            tensors, exact[tensor] = writer.store(SCHEMES[other], (shape[0], shape[1]))
            stored |= {f"{place}.{local}": value for local, value in tensors.items()}
            continue
        plain += [place] if len(shape) == 2 and module != tensor else []
        values = _values(writer, tensor, shape)
        stored[_place(name, tensor)] = values
        exact[tensor] = values.double()
    if "Conditional" in name:
        stored |= {key: writer.normal(*shape).bfloat16() for key, shape in _VISION.items()}
        plain += [key.removesuffix(".weight") for key in _VISION if key.endswith(".weight")]
    if kv:
        layers = [at for at, kind in enumerate(text_of(config)["layer_types"]) if kind == "full_attention"]
        scales = [f"model.layers.{layer}.self_attn.{local}_scale" for layer in layers for local in "kv"]
        stored |= {_place(name, scale): writer.scales(1, size=0.02) for scale in scales}
    if scheme != DENSE:
        groups = {
            f"group_{at}": SCHEMES[used].group | ({"targets": names} if others else {})
            for at, (used, names) in enumerate(targets.items())
        }
        config["quantization_config"] = quantization_block(groups, plain, SCHEMES[scheme].format, kv)
    if edit is not None:
        edit(stored)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    contiguous = {key: tensor.contiguous() for key, tensor in stored.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    return Built(directory=directory, config=config, dense=exact, stored=stored)


def _place(name: str, tensor: str) -> str:
    """The name of a module or tensor in the files of a class."""
    return tensor.replace("model.", "model.language_model.", 1) if "Conditional" in name else tensor


def _values(writer: Writer, tensor: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return (0.1 * writer.normal(*shape) + ("linear_attn.norm" in tensor)).bfloat16()
    return (writer.normal(*shape) / sqrt(shape[-1])).bfloat16()


def _attention(text: Mapping[str, Any], prefix: str) -> Iterator[Spec]:
    """Queries have a gate beside them."""
    hidden, size = text["hidden_size"], text["head_dim"]
    heads, kv_heads = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    yield f"{prefix}.q_proj.weight", (2 * heads, hidden)
    yield f"{prefix}.k_proj.weight", (kv_heads, hidden)
    yield f"{prefix}.v_proj.weight", (kv_heads, hidden)
    yield f"{prefix}.o_proj.weight", (hidden, heads)
    yield f"{prefix}.q_norm.weight", (size,)
    yield f"{prefix}.k_norm.weight", (size,)


def _linear_attention(text: Mapping[str, Any], prefix: str) -> Iterator[Spec]:
    """Qwen3-Next stores two projections, Qwen3.5 the parts of both."""
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = heads * text["linear_value_head_dim"]
    rows = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
    if text["model_type"] == "qwen3_next":
        rows = {"in_proj_qkvz": 2 * (keys + values), "in_proj_ba": 2 * heads}
    for leaf, size in rows.items():
        yield f"{prefix}.{leaf}.weight", (size, hidden)
    yield f"{prefix}.conv1d.weight", (2 * keys + values, 1, text["linear_conv_kernel_dim"])
    yield f"{prefix}.out_proj.weight", (hidden, values)
    yield f"{prefix}.norm.weight", (text["linear_value_head_dim"],)
    yield f"{prefix}.A_log", (heads,)
    yield f"{prefix}.dt_bias", (heads,)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[Spec]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _experts(text: Mapping[str, Any], prefix: str) -> Iterator[Spec]:
    hidden = text["hidden_size"]
    yield f"{prefix}.gate.weight", (text["num_experts"], hidden)
    yield f"{prefix}.shared_expert_gate.weight", (1, hidden)
    yield from _mlp(f"{prefix}.shared_expert", hidden, text["shared_expert_intermediate_size"])
    for expert in range(text["num_experts"]):
        yield from _mlp(f"{prefix}.experts.{expert}", hidden, text["moe_intermediate_size"])

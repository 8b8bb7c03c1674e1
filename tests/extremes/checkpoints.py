"""Checkpoints of extreme sizes: thousands of shards, a million tensors, 100 GB of which no byte is on the disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.checkpoint.header import LENGTH_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Extreme"]

_BYTES = {"I32": 4, "BF16": 2, "I64": 8}
_GROUP = 128

Stored = tuple[str, list[int], tuple[int, ...] | None]
"""A dtype, a shape, and the values, which are zeros if None."""


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """An int4 checkpoint (group 128) of zeros; its files are sparse. Without experts a Llama, else a Qwen3 mixture."""

    layers: int
    shards: int
    hidden: int = 128
    intermediate: int = 128
    experts: int = 0
    vocabulary: int = 256

    def write(self, directory: Path) -> int:
        """Write the files into a new directory and return the number of tensors."""
        directory.mkdir()
        tensors = list(self._tensors())
        share = -(-len(tensors) // self.shards)
        weight_map = {}
        for number in range(0, len(tensors), share):
            file = f"model-{number // share + 1:05d}-of-{-(-len(tensors) // share):05d}.safetensors"
            part = dict(tensors[number : number + share])
            _write_sparse(directory / file, part)
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (directory / "config.json").write_text(json.dumps(self._config()))
        return len(tensors)

    def _tensors(self) -> Iterator[tuple[str, Stored]]:
        vocabulary = ("BF16", [self.vocabulary, self.hidden], None)
        yield from {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}.items()
        yield "model.norm.weight", ("BF16", [self.hidden], None)
        for layer in range(self.layers):
            yield from self._layer(f"model.layers.{layer}")

    def _layer(self, layer: str) -> Iterator[tuple[str, Stored]]:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", ("BF16", [self.hidden], None)
        for name in "qkvo":
            yield from _linear(f"{layer}.self_attn.{name}_proj", self.hidden, self.hidden)
        blocks = [f"{layer}.mlp.experts.{number}" for number in range(self.experts)] or [f"{layer}.mlp"]
        for block in blocks:
            yield from _linear(f"{block}.gate_proj", self.intermediate, self.hidden)
            yield from _linear(f"{block}.up_proj", self.intermediate, self.hidden)
            yield from _linear(f"{block}.down_proj", self.hidden, self.intermediate)
        if self.experts:
            yield f"{layer}.mlp.gate.weight", ("BF16", [self.experts, self.hidden], None)
            yield from ((f"{layer}.self_attn.{name}_norm.weight", ("BF16", [64], None)) for name in "qk")

    def _config(self) -> dict[str, Any]:
        heads = self.hidden // 64
        experts = {
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": self.intermediate,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": _GROUP}
        return {
            "architectures": ["Qwen3MoeForCausalLM" if self.experts else "LlamaForCausalLM"],
            "model_type": "qwen3_moe" if self.experts else "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": 64,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **(experts if self.experts else {}),
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": ["lm_head", r"re:.*mlp\.gate$"],
            },
        }


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, Stored]]:
    yield f"{name}.weight_packed", ("I32", [rows, columns // 8], None)
    yield f"{name}.weight_scale", ("BF16", [rows, columns // _GROUP], None)
    yield f"{name}.weight_shape", ("I64", [2], (rows, columns))


def _write_sparse(path: Path, tensors: dict[str, Stored]) -> None:
    entries, values, end = {}, [], 0
    for name, (dtype, shape, stored) in tensors.items():
        begin = end
        end += _BYTES[dtype] * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        if stored is not None:
            values.append((begin, b"".join(value.to_bytes(_BYTES[dtype], "little") for value in stored)))
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        data = file.tell()
        for begin, payload in values:
            file.seek(data + begin)
            file.write(payload)
        file.truncate(data + end)

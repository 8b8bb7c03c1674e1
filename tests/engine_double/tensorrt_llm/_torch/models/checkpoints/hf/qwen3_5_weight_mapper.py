"""Imitates `checkpoints/hf/qwen3_5_weight_mapper.py`, of commits da259e7d to 04666e21; the strictest of them counts.

It packs the stored projections of linear attention into those of Qwen3-Next, for each suffix of each of them. So every
suffix must be in all parts, and have the rows of its part.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._torch.models.checkpoints.hf.qwen3_next_weight_mapper import Qwen3NextHfWeightMapper
from tensorrt_llm._torch.models.modeling_utils import register_mapper

if TYPE_CHECKING:
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import Weights
    from torch import Tensor

__all__ = ["Qwen3_5MoeHfWeightMapper"]

_PACKED = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
_PART = re.compile(r"(.*\.linear_attn)\.(in_proj_(?:qkv|z|b|a))\.(\w+)")
_DENSE_MLP = re.compile(r"((?:model|mtp)\.layers\.\d+\.mlp)\.(gate_proj|up_proj|down_proj|gate_up_proj)\.")
_READ = ("weight", "bias", "weight_scale_inv")


@register_mapper("HF", "Qwen3_5ForCausalLM")
@register_mapper("HF", "Qwen3_5MoeForCausalLM")
class Qwen3_5MoeHfWeightMapper(Qwen3NextHfWeightMapper):  # noqa: N801 (upstream's name)
    """For models with experts and without."""

    def preprocess_weights(self, weights: Weights) -> Weights:
        kept = {key: weights[key] for key in list(weights) if not key.startswith("model.visual.")}
        prefix = "model.language_model."
        kept = {
            f"model.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: tensor
            for key, tensor in kept.items()
        }
        packed = self._pack_split_projections(kept)
        if not getattr(self._config.pretrained_config, "num_experts", 0):
            packed = {_DENSE_MLP.sub(r"\1.mlp.\2.", key): tensor for key, tensor in packed.items()}
        return super().preprocess_weights(packed)

    def _pack_split_projections(self, weights: Weights) -> Weights:
        result: Weights = {}
        groups: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        for key, tensor in weights.items():
            match = None if key.startswith("mtp.") else _PART.fullmatch(key)
            if match is None:
                result[key] = tensor
                continue
            packed = next(name for name, parts in _PACKED.items() if match[2] in parts)
            groups.setdefault((match[1], packed, match[3]), {})[match[2]] = tensor
        for (around, packed, suffix), parts in groups.items():
            if suffix not in _READ:
                raise NotImplementedError(f"Unsupported suffix for packing: {suffix}")
            assert len(parts) == len(_PACKED[packed]), f"Missing split projections of {around}.{packed}.{suffix}"
            ordered = [parts[part] for part in _PACKED[packed]]
            result[f"{around}.{packed}.{suffix}"] = self._pack(packed, ordered)
        return result

    def _pack(self, packed: str, parts: list[Tensor]) -> Tensor:
        """Put the rows of each key head next to each other."""
        heads, keys, values = self._sizes()
        split: Any = parts
        if packed == "in_proj_qkvz":
            joint, z = parts
            assert joint.shape[0] == heads * (2 * keys + values)
            assert z.shape[0] == heads * values
            split = (*joint.split([heads * keys, heads * keys, heads * values]), z)
        else:
            assert all(part.shape[0] == self._config.pretrained_config.linear_num_value_heads for part in parts)
        return torch.cat([part.unflatten(0, (heads, -1)) for part in split], dim=1).flatten(0, 1)

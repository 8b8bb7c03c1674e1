"""Imitates `checkpoints/hf/qwen3_next_weight_mapper.py`, as of commit ff5ca335 and, in the newest release, 32e0e21a.

The newest release (pull request 16314) permutes the rows of `in_proj_qkvz` and `in_proj_ba` for each rank, from groups
of one key head to parts of all heads. Tensors that have another number of rows raise ValueError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.models.checkpoints.hf.qwen2_moe_weight_mapper import Qwen2MoeHfWeightMapper
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from tensorrt_llm.quantization import QuantAlgo

if TYPE_CHECKING:
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import Weights
    from torch import Tensor

__all__ = ["Qwen3NextHfWeightMapper"]

_BLOCK = 128


@register_mapper("HF", "Qwen3NextForCausalLM")
class Qwen3NextHfWeightMapper(Qwen2MoeHfWeightMapper):
    """Cuts parameters outside of Linears for the rank, rearranges rows; every test is for a part of the whole key."""

    def should_skip_module(self, module_name: str) -> bool:
        return module_name.startswith("draft_model") or super().should_skip_module(module_name)

    def repeated_keys(self, module: Any) -> set[str]:
        algo = module.quant_config.quant_mode.algo
        blocks = {"weight_scale_inv"} if algo == QuantAlgo.FP8_BLOCK_SCALES else set()
        return super().repeated_keys(module) | blocks

    def preprocess_weights(self, weights: Weights) -> Weights:  # type: ignore[override]
        """Return this rank's weights; the model's class calls it. Draft layers are left out."""
        mapping, size = self._model.model_config.mapping, self._tp_size
        rank = 0 if mapping.enable_attention_dp else mapping.tp_rank
        result = {}
        for key in list(weights):
            tensor = weights[key]
            if key.startswith("mtp."):
                continue
            if "A_log" in key or "dt_bias" in key:
                tensor = tensor.chunk(size)[rank].float()
            elif "in_proj" in key and RELEASE.dense_in_proj:
                tensor = self._permute_in_proj_to_dense(key, tensor)
            elif "conv1d" in key:
                tensor = self._conv1d(key, tensor)
            result[key] = tensor
        return result

    def _sizes(self) -> tuple[int, int, int]:
        """The number of key heads, the rows of one key head's keys, and those of its values."""
        config = self._config.pretrained_config
        heads = config.linear_num_key_heads
        assert heads % self._tp_size == 0, f"{heads} key heads on {self._tp_size} ranks"
        values = config.linear_num_value_heads * config.linear_value_head_dim // heads
        return heads, config.linear_key_head_dim, values

    def _conv1d(self, key: str, tensor: Tensor) -> Tensor:
        """Put this rank's channels of queries, keys and values next to each other, so that a slice by rows has them."""
        heads, keys, values = self._sizes()
        tensor = tensor.squeeze(1) if "weight" in key else tensor
        parts = tensor.split([heads * keys, heads * keys, heads * values], dim=0)
        of_ranks = zip(*(part.chunk(self._tp_size) for part in parts), strict=True)
        return torch.cat([part for parts_of_rank in of_ranks for part in parts_of_rank])

    def _permute_in_proj_to_dense(self, key: str, tensor: Tensor) -> Tensor:
        heads, keys, values = self._sizes()
        per_value = self._config.pretrained_config.linear_num_value_heads // heads
        sizes = [keys, keys, values, values] if ".in_proj_qkvz." in key else [per_value, per_value]
        rows = heads * sum(sizes)
        if tensor.dim() == 0 or tensor.numel() == 1:
            return tensor
        if tensor.shape[0] == rows:
            return self._dense(tensor, sizes)
        if key.endswith("weight_scale_inv") and tensor.shape[0] == -(-rows // _BLOCK):
            if tensor.shape[0] == 1:
                return tensor
            assert all(size % _BLOCK == 0 for size in sizes), "blocks of whole heads"
            return self._dense(tensor, [size // _BLOCK for size in sizes])
        raise ValueError(f"Cannot map {key} of shape {tuple(tensor.shape)} to {rows} rows")

    def _dense(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Reorder rows, within each rank's chunk, from heads of parts to parts of heads; the dtype doesn't matter."""
        chunks = []
        for chunk in tensor.chunk(self._tp_size):
            heads = chunk.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
            chunks += [part.flatten(0, 1) for part in heads]
        return torch.cat([chunk.contiguous().view(torch.uint8) for chunk in chunks]).view(tensor.dtype)

"""Imitates `checkpoints/hf/weight_mapper.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import BaseWeightMapper, Weights
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from tensorrt_llm.quantization import QuantAlgo

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor, nn

__all__ = ["HfWeightMapper"]

_NVFP4 = {QuantAlgo.NVFP4, "W4A16_NVFP4", "NVFP4_ARC"}


@register_mapper("HF")
class HfWeightMapper(BaseWeightMapper):
    """Fuses q, k, v and gate, up; repeats K and V heads when there are more ranks than heads."""

    def init_model_and_config(self, model: Any, config: ModelConfig) -> None:
        super().init_model_and_config(model, config)
        if model.config.tie_word_embeddings:
            self.add_skip_modules(["lm_head"])

    def map_weights(self) -> None:
        self._mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        self._callbacks = [self._duplicate_kv_weights]

    def apply_callbacks(
        self, module: nn.Module, module_name: str, module_names_breakdown: list[str], weights: Weights
    ) -> list[Weights]:
        parts = []
        for new_name in self.mapping[module_name]:
            part = self.filter_weights(".".join([*module_names_breakdown, new_name]), weights)
            for callback in self._callbacks:
                part = callback(module, new_name, part)
            parts.append(part)
        return parts

    def repeated_keys(self, module: Any) -> set[str]:
        """Of scales, only `weight_scale` of NVFP4 is repeated: per-row scales of other algorithms keep their length.

        The module must have a configuration: upstream reads `module.quant_config.quant_mode` unchecked.
        """
        algo = module.quant_config.quant_mode.algo
        return {"weight", "bias", "weight_scale"} if algo in _NVFP4 else {"weight", "bias"}

    def _duplicate_kv_weights(self, module: nn.Module, name: str, weights: Weights) -> Weights:
        if name not in {"k_proj", "v_proj"}:
            return weights
        heads, keys = self._model.config.num_key_value_heads, self.repeated_keys(module)
        if heads >= self._tp_size:
            assert heads % self._tp_size == 0, f"{heads} K/V heads must be a multiple of tp_size {self._tp_size}"
            return weights
        assert self._tp_size % heads == 0, f"tp_size {self._tp_size} must be a multiple of {heads} K/V heads"
        times = self._tp_size // heads
        return {key: _repeat(value, heads, times) if key in keys else value for key, value in weights.items()}


def _repeat(tensor: Tensor, heads: int, times: int) -> Tensor:
    """Repeat blocks of rows, one per head; 1-D tensors element by element, which mixes rows within a head."""
    if tensor.dim() == 1:
        return tensor.repeat_interleave(times)
    assert tensor.shape[0] % heads == 0
    return tensor.unflatten(0, (heads, -1)).repeat_interleave(times, dim=0).flatten(0, 1)

"""Imitates `checkpoints/hf/qwen2_moe_weight_mapper.py` and its Qwen3-MoE and Mixtral siblings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from tensorrt_llm._torch.modules.fused_moe.interface import MoE
from tensorrt_llm.quantization import QuantAlgo

if TYPE_CHECKING:
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import Weights
    from torch import nn

__all__ = ["MixtralHfWeightMapper", "Qwen2MoeHfWeightMapper", "Qwen3MoeHfWeightMapper"]

_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@register_mapper("HF", "Qwen2MoeForCausalLM")
class Qwen2MoeHfWeightMapper(HfWeightMapper):
    """Renames experts to w1, w3 and w2 by replacing words; tensors of all experts are split first."""

    def is_special_instance_module(self, module: nn.Module) -> bool:
        return isinstance(module, MoE)

    def handle_special_instance_module(self, module: Any, module_name: str, module_weights: Weights, **_: Any) -> None:
        renamed = {}
        for name, value in _unfuse(module_weights).items():
            for old, new in _PARTS.items():
                name = name.replace(old, new)  # noqa: PLW2901
            renamed[name] = value
        module.load_weights(weights=[renamed])


def _unfuse(weights: Weights) -> Weights:
    single = dict(weights)
    for suffix in ("", "_scale_inv"):
        gate_up, down = single.pop(f"gate_up_proj{suffix}", None), single.pop(f"down_proj{suffix}", None)
        if gate_up is None or down is None:
            continue
        for expert, (both, last) in enumerate(zip(gate_up, down, strict=True)):
            parts = dict(zip(_PARTS, (*both.chunk(2), last), strict=True))
            single |= {f"{expert}.{part}.weight{suffix}": value for part, value in parts.items()}
    return single


@register_mapper("HF", "Qwen3MoeForCausalLM")
class Qwen3MoeHfWeightMapper(Qwen2MoeHfWeightMapper):
    """Repeats K and V scales of FP8 blocks as well."""

    def repeated_keys(self, module: Any) -> set[str]:
        algo = module.quant_config.quant_mode.algo
        blocks = {"weight_scale_inv"} if algo == QuantAlgo.FP8_BLOCK_SCALES else set()
        return super().repeated_keys(module) | blocks


@register_mapper("HF", "MixtralForCausalLM")
class MixtralHfWeightMapper(Qwen2MoeHfWeightMapper):
    """Its checkpoints already use w1, w3 and w2."""

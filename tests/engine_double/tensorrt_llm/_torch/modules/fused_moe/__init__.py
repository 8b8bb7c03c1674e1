"""Imitates `_torch/modules/fused_moe/`."""

from tensorrt_llm._torch.modules.fused_moe.interface import MoE, MoEWeightLoadingMode, create_moe

__all__ = ["MoE", "MoEWeightLoadingMode", "create_moe"]

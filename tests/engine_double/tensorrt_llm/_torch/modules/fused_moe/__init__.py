"""Imitates `_torch/modules/fused_moe/`."""

from tensorrt_llm._torch.modules.fused_moe.interface import MoE, MoEWeightLoadingMode

__all__ = ["MoE", "MoEWeightLoadingMode"]

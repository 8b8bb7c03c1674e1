"""Refuse the parts of a configuration that change the meaning of weights and that this package does not support."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.config.quantization_config import ExpertSparsity, QuantizationConfig
    from trtllm_ct.plan.models.sites import Model

__all__ = ["refuse_unsupported"]

# A transform at these locations rotates queries or cached keys inside attention. It can't be folded into a weight.
_INSIDE_ATTENTION = frozenset({"k_cache", "q_attn"})


def refuse_unsupported(config: QuantizationConfig, model: Model, faults: FaultCollector) -> None:
    """Add a fault for every unsupported part of a configuration; ignoring it would make the model silently wrong."""
    for transform in config.transforms:
        if transform.location in _INSIDE_ATTENTION:
            faults.add(
                where=f"{config.origin}.transform_config.{transform.name}",
                expected="transforms that fold into weights (weight_input, weight_output, input, output)",
                found=f"a {transform.type} transform applied at run time ({transform.location})",
                remedy="Without the rotation the model is wrong; quantize again without it.",
            )
    if config.expert_sparsity is not None:
        _refuse_expert_sparsity(f"{config.origin}.moe_sparsity_config", config.expert_sparsity, model, faults)


def _refuse_expert_sparsity(where: str, sparsity: ExpertSparsity, model: Model, faults: FaultCollector) -> None:
    """Add a fault unless experts were pruned and every layer keeps as many as config.json says.

    Such a model is an ordinary one with fewer experts.
    """
    if sparsity.method != "prune":
        faults.add(
            where=where,
            expected="method prune",
            found=f"method {sparsity.method}",
            remedy="Experts that were shrunk instead of removed have no published layout; use the unpruned checkpoint.",
        )
        return
    kept = sorted({count for count in sparsity.num_experts if count is not None})
    experts = model.sizes["experts"]
    if kept and kept != [experts]:
        faults.add(
            where=f"{where}.num_experts",
            expected=f"{experts} experts in every layer, as config.json says",
            found=f"layers that keep {', '.join(str(count) for count in kept)}",
            remedy="Engines hold the same number of experts in every layer; prune all layers to one number, or use the "
            "unpruned checkpoint.",
        )

"""Parts of a configuration that change what the weights mean and that nothing here understands: refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.config.model import QuantizationConfig
    from trtllm_ct.errors import FaultCollector

__all__ = ["refuse_unsupported"]

# A transform at these places is already in the stored weights.
_OFFLINE = frozenset({"weight_input", "weight_output"})


def refuse_unsupported(config: QuantizationConfig, faults: FaultCollector) -> None:
    """Add a fault for every part of a configuration without which the model would be quietly wrong."""
    for transform in config.transforms:
        if transform.location not in _OFFLINE:
            faults.add(
                where=f"{config.origin}.transform_config.{transform.name}",
                expected="transforms that are folded into the weights (weight_input, weight_output)",
                found=f"a {transform.type} transform applied at run time ({transform.location})",
                remedy="Without the rotation the model is wrong; quantize again with offline transforms only.",
            )
    if config.expert_sparsity is not None and config.expert_sparsity.method != "prune":
        faults.add(
            where=f"{config.origin}.moe_sparsity_config",
            expected="method prune",
            found=f"method {config.expert_sparsity.method}",
            remedy="Experts that were shrunk instead of removed have no published layout; use the unpruned checkpoint.",
        )

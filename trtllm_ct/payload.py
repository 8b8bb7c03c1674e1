"""What headers can't show: the numbers in scales, shapes and zero points, checked before they are used.

| tensor                    | NaN, inf, negative | zero                                        |
|---------------------------|--------------------|---------------------------------------------|
| scale of a whole tensor   | fault              | fault: the whole weight would vanish        |
| scale of a row or a group | fault              | allowed and counted: the group is all zeros |
| `input_scale`, KV scales  | fault              | fault                                       |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.errors import FaultCollector
    from trtllm_ct.plan.model import ModulePlan

__all__ = ["check_payload", "count_zero_scales"]

_ACTIVATION_SCALES = ("input_scale", "k_scale", "v_scale")


def check_payload(module: ModulePlan, stored: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """Add a fault for every promise that the small tensors of a module break; `stored` holds them by local name.

    Reads scales, zero points and `weight_shape`, never the codes.
    """
    weight = module.weight
    if weight is not None:
        if "weight_shape" in stored:
            _check_shape(module.name, stored["weight_shape"], weight.shape, faults)
        zero_allowed = weight.scale_shape != (1, 1)
        _check_scale(f"{module.name}.weight_scale", stored["weight_scale"], faults, zero_allowed=zero_allowed)
        if weight.has_zero_point and weight.zero_point_packing is None:
            _check_zero_point(module, stored["weight_zero_point"], faults)
    for local in _ACTIVATION_SCALES:
        if local in stored:
            _check_scale(f"{module.name}.{local}", stored[local], faults, zero_allowed=False)


def count_zero_scales(module: ModulePlan, stored: Mapping[str, Tensor]) -> int:
    """How many rows or groups of a weight have scale zero, that is, hold zeros only."""
    return int((stored["weight_scale"] == 0).sum()) if module.weight is not None else 0


def _check_scale(name: str, scale: Tensor, faults: FaultCollector, *, zero_allowed: bool) -> None:
    # In this form NaN, which compares as false, counts as bad; infinity is told apart by the second test.
    good = (scale >= 0 if zero_allowed else scale > 0) & scale.isfinite()
    if bool(good.all()):
        return
    bad = (~good).nonzero()
    position = [int(index) for index in bad[0]]
    faults.add(
        where=f"{name}{position or ''}",
        expected="a finite scale that is " + ("not negative" if zero_allowed else "positive"),
        found=f"{float(scale[tuple(position)]):g} ({bad.shape[0]} of {scale.numel()} elements are bad)",
        remedy="The checkpoint was damaged or badly calibrated; download or quantize it again.",
    )


def _check_shape(module: str, stored_shape: Tensor, shape: tuple[int, int], faults: FaultCollector) -> None:
    found = [int(size) for size in stored_shape.flatten()]
    if found != list(shape):
        faults.add(
            where=f"{module}.weight_shape",
            expected=f"{list(shape)}, which the packed codes and config.json make",
            found=str(found),
            remedy="Codes and shape belong to different weights; download the checkpoint again.",
        )


def _check_zero_point(module: ModulePlan, zero_point: Tensor, faults: FaultCollector) -> None:
    """Plain zero points live in the signed range of the codes; some tools have written unsigned ones."""
    if module.weight is None:
        return
    half = 1 << (module.weight.args.num_bits - 1)
    low, high = int(zero_point.min()), int(zero_point.max())
    if low < -half or high >= half:
        faults.add(
            where=f"{module.name}.weight_zero_point",
            expected=f"signed zero points in [{-half}, {half - 1}]",
            found=f"values from {low} to {high}",
            remedy="The writer stored unsigned zero points; quantize again with a current release of it.",
        )

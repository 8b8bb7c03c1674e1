"""`input_scales`: the static scales of inputs that kernels read and that the checkpoint doesn't say.

They are measured on a text, and given as a `Calibration`. Parts of a fused Linear have one input and one scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.engine.calibration import INPUT_SCALE
from trtllm_ct.engine.holdings import activations_of
from trtllm_ct.engine.linear_mode import Activations

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.calibration import Calibration
    from trtllm_ct.plan.assign import Assignment
    from trtllm_ct.plan.equalize import Part

__all__ = ["input_scales"]


class _Input(NamedTuple):
    """The input of a module: its name in the plan, its scale if one is known, and the divisor of its form."""

    module: str
    scale: float | None
    divisor: float


def input_scales(
    assignments: Mapping[str, Assignment], parts: Iterable[Part], calibration: Calibration, faults: FaultCollector
) -> dict[str, float]:
    """Return the scale to deliver for each module whose form reads one, by name.

    The calibration may call a module by its name in the files or in the model. Adds a fault that names the modules
    without a scale.
    """
    linears: dict[str, list[_Input]] = {}
    for site, module, weight in parts:
        assignment = assignments.get(site.module)
        form = assignment.form if assignment else None
        if form is not None and form.input_divisor is not None:
            for_fp8 = activations_of(weight.scheme) is Activations.FP8_STATIC
            scale = calibration.scale((module.stored_name, *site.stored_names), stored_for_fp8=for_fp8)
            linears.setdefault(site.shares or site.module, []).append(_Input(site.module, scale, form.input_divisor))
    scales: dict[str, float] = {}
    missing: list[str] = []
    for inputs in linears.values():
        known = [scale for _, scale, _ in inputs if scale is not None]
        missing += [module for module, scale, _ in inputs if scale is None]
        if len(known) == len(inputs):
            scales |= {module: max(known) / divisor for module, _, divisor in inputs}
    if missing:
        faults.add(
            where=calibration.place or "--calibration",
            expected=f"MODULE.{INPUT_SCALE} for each of the modules whose kernels read a static scale of their input",
            found=f"none for {len(missing)} of {sum(map(len, linears.values()))}: {format_names(missing)}",
            remedy="Measure them with `trtllm-ct calibrate DIR OUT --text FILE`, and give OUT as --calibration.",
        )
    return scales

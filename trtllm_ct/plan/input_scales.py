"""`input_scales`: the static scales of inputs that kernels read and that the checkpoint doesn't say.

They are measured on a text, and given as a `Calibration`. Parts of a fused Linear have one input and one scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.engine.calibration import INPUT_SCALE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.calibration import Calibration
    from trtllm_ct.plan.assign import Assignment
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["input_scales"]


class _Input(NamedTuple):
    """The input of a module: all names of the module, its name in the plan, and the divisor of its form."""

    names: tuple[str, ...]
    module: str
    divisor: float


def input_scales(
    assignments: Mapping[str, Assignment],
    present: Iterable[tuple[Site, StoredModule]],
    calibration: Calibration,
    faults: FaultCollector,
) -> dict[str, float]:
    """Return the scale to deliver for each module whose form reads one, by name.

    The calibration may call a module by its name in the files or in the model. Adds a fault that names the modules
    without a scale.
    """
    linears: dict[str, list[_Input]] = {}
    for site, module in present:
        assignment = assignments.get(site.module)
        form = assignment.form if assignment else None
        if form is not None and form.input_divisor is not None:
            names = (module.stored_name, *site.stored_names)
            linears.setdefault(site.shares or site.module, []).append(_Input(names, site.module, form.input_divisor))
    scales: dict[str, float] = {}
    missing: list[str] = []
    for parts in linears.values():
        scale = calibration.largest(part.names for part in parts)
        if scale is None:
            missing += [part.module for part in parts if calibration.largest([part.names]) is None]
        else:
            scales |= {part.module: scale / part.divisor for part in parts}
    if missing:
        faults.add(
            where=calibration.place or "--calibration",
            expected=f"MODULE.{INPUT_SCALE} for each of the modules whose kernels read a static scale of their input",
            found=f"none for {len(missing)} of {sum(map(len, linears.values()))}: {format_names(missing)}",
            remedy="Measure them with `trtllm-ct calibrate DIR OUT --text FILE`, and give OUT as --calibration.",
        )
    return scales

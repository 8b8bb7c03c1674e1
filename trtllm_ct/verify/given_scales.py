"""The static scales of inputs that a directory got from a calibration, and not from the tensors of its source."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from trtllm_ct.engine.holdings import activations_of
from trtllm_ct.verify.source.names import is_expert

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantScheme
    from trtllm_ct.engine.modes import LinearMode
    from trtllm_ct.engine.requantization import Requantize
    from trtllm_ct.verify.source.modules import Module, Modules

__all__ = ["GivenScales", "require_scale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenScales:
    """Says which modules got their scale from a calibration, and which scale the calibration says.

    `asked` are the forms that a directory records, with the calibration that a user gives to verify it.
    """

    source: Modules
    asked: Requantize
    _parts: Mapping[str, list[Module]] = field(init=False)
    _scales: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        parts: dict[str, list[Module]] = defaultdict(list)
        scales = self.asked.calibration.scales
        if scales:
            for key, module in self.source.by_key.items():
                parts[self.source.names.sharing_scalars(key)].append(module)
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_scales", {self.source.names.key(name): scale for name, scale in scales.items()})

    @property
    def are_known(self) -> bool:
        """Whether a calibration was given to verify the directory."""
        return bool(self._scales)

    def gave(self, key: str, scheme: QuantScheme | None, mode: LinearMode) -> bool:
        """Whether the scale of a module's input is not that of the source.

        That is so if it was asked for a form that reads one, and its scheme is for other inputs than its mode.
        """
        form = self.asked.form(expert=is_expert(key))
        if form is None or form.input_divisor is None or scheme is None or mode.input_scale is None:
            return False
        return activations_of(scheme) is not mode.activations

    def expected(self, key: str) -> float | None:
        """Return the scale that a module must have: the largest of those that read one input.

        None without a calibration, and if neither it nor the source has a scale of the module.
        """
        form = self.asked.form(expert=is_expert(key))
        if form is None or form.input_divisor is None or not self.are_known:
            return None
        parts = self._parts[self.source.names.sharing_scalars(key)]
        scales = {part.key: scale for part in parts if (scale := self._scale(part)) is not None}
        return max(scales.values()) / form.input_divisor if key in scales else None

    def _scale(self, module: Module) -> float | None:
        """Return the scale that the calibration, or else the source, says of a module; None if neither does."""
        scale = self.asked.calibration.scales.get(module.name, self._scales.get(module.key))
        if scale is None and "input_scale" in module.tensors:
            return float(module.tensors["input_scale"].all_numbers().max())
        return scale


def require_scale(name: str, value: float, faults: FaultCollector) -> None:
    """Add a fault if a scale of an input can't be one."""
    if not isfinite(value) or value <= 0:
        faults.add(
            where=name,
            expected="a positive number: the scale of an input",
            found=f"{value:g}",
            remedy="Calibrate and convert again; engines would compute zeros or NaN.",
        )

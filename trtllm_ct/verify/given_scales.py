"""The static scales of inputs that a directory got from a calibration, and not from the tensors of its source."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import TYPE_CHECKING

from trtllm_ct.engine.holdings import activations_of
from trtllm_ct.verify.source.names import is_expert

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantScheme
    from trtllm_ct.engine.modes import LinearMode
    from trtllm_ct.engine.requantization import Requantize
    from trtllm_ct.verify.pairs import Stored
    from trtllm_ct.verify.source.modules import Module, Modules

__all__ = ["GivenScales"]


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

    def gave(self, key: str, scheme: QuantScheme | None, mode: LinearMode) -> bool:
        """Whether the scale of a module's input is not that of the source.

        That is so if it was asked for a form that reads one, and its scheme is for other inputs than its mode.
        """
        form = self.asked.form(expert=is_expert(key))
        if form is None or form.input_divisor is None or scheme is None or mode.input_scale is None:
            return False
        return activations_of(scheme) is not mode.activations

    def value_or_fault(self, name: str, module: Module, delivered: Stored, faults: FaultCollector) -> float | None:
        """Return the value that a delivered scale must have.

        Without a calibration that is not known, and a scale that can't be one is a fault; with one, a scale that it
        does not have is a fault. Then this returns None.
        """
        if not self._scales:
            _require_scale(name, delivered, faults)
            return None
        value = self._expected(module.key)
        if value is None:
            faults.add(
                where=name,
                expected=f"{module.name}.input_scale in the calibration that the directory was made with",
                found="none",
                remedy="Give --calibration the file that was given to convert.",
            )
        return value

    def _expected(self, key: str) -> float | None:
        """Return the scale that a module must have: the largest of those that read one input.

        None if neither the calibration nor the source has a scale of the module.
        """
        form = self.asked.form(expert=is_expert(key))
        if form is None or form.input_divisor is None:
            raise AssertionError("only modules of a form that reads scales are asked for")
        parts = self._parts[self.source.names.sharing_scalars(key)]
        scales = {part.key: scale for part in parts if (scale := self._scale(part)) is not None}
        return max(scales.values()) / _largest_code(form.scheme) if key in scales else None

    def _scale(self, module: Module) -> float | None:
        """Return the scale that the calibration, or else the source, says of a module; None if neither does."""
        scale = self.asked.calibration.scales.get(module.name, self._scales.get(module.key))
        if scale is None and "input_scale" in module.tensors:
            return float(module.tensors["input_scale"].all_numbers().max())
        return scale


def _largest_code(scheme: QuantScheme) -> float:
    """Return the number by which the scale of a form's inputs is smaller than the largest magnitude over 448.

    Inputs in FP8 have that scale itself. Those in four bits have one for groups, whose own scales are numbers of FP8 up
    to 448 and whose codes are numbers of E2M1 up to 6.
    """
    inputs = scheme.input_activations
    return 6.0 if inputs is not None and inputs.num_bits == 4 else 1.0


def _require_scale(name: str, delivered: Stored, faults: FaultCollector) -> None:
    """Add a fault if a scale of an input can't be one."""
    if prod(delivered.shape) != 1:
        faults.add(
            where=name,
            expected="one number: the scale of an input",
            found=f"shape {list(delivered.shape)}",
            remedy="Convert again; engines read one number.",
        )
        return
    value = float(delivered.numbers(0, 1).reshape(-1)[0])
    if not isfinite(value) or value <= 0:
        faults.add(
            where=name,
            expected="a positive number: the scale of an input",
            found=f"{value:g}",
            remedy="Calibrate and convert again; engines would compute zeros or NaN.",
        )

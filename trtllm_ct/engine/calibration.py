"""`Calibration`: the static scales of inputs that kernels read, measured on a text and given beside a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["INPUT_SCALE", "LARGEST_E4M3", "NOT_CALIBRATED", "Calibration", "is_scale"]

INPUT_SCALE = "input_scale"
"""The local name of a scale in the file of a calibration, as ModelOpt and compressed-tensors call it."""

LARGEST_E4M3 = 448.0
"""A scale is the largest magnitude of a module's input over this number, so that none saturates in FP8."""

_LEAST, _LARGEST = 2.0**-100, 2.0**100
"""Between them, neither a scale over the divisor of a form nor its reciprocal leaves the normal numbers of float32."""


def is_scale(value: float) -> bool:
    """Whether a number can be the scale of an input: it is from 2^-100 to 2^100."""
    return _LEAST <= value <= _LARGEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The scale of the input of each module, by the module's name in the files or in the model; all are positive.

    `stored` are the scales that the checkpoint itself has of inputs, in whatever codes. `place` is the name of the file
    that `scales` are from, for messages.
    """

    scales: Mapping[str, float] = field(default_factory=dict, hash=False)
    stored: Mapping[str, float] = field(default_factory=dict, hash=False)
    place: str = ""

    def scale(self, names: Iterable[str], *, stored_for_fp8: bool) -> float | None:
        """Return the scale of a module's input by any of the module's names; None if there is none.

        `stored_for_fp8` says whether a scale that the checkpoint has of this input is one of FP8: those of other codes
        are the largest magnitude over another number.
        """
        sources = (self.scales, self.stored) if stored_for_fp8 else (self.scales,)
        names = tuple(names)
        return next((scales[name] for scales in sources for name in names if name in scales), None)


NOT_CALIBRATED = Calibration()

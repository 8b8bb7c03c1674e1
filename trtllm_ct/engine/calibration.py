"""`Calibration`: the static scales of inputs that kernels read, measured on a text and given beside a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["INPUT_SCALE", "LARGEST_E4M3", "NOT_CALIBRATED", "Calibration"]

INPUT_SCALE = "input_scale"
"""The local name of a scale in the file of a calibration, as ModelOpt and compressed-tensors call it."""

LARGEST_E4M3 = 448.0
"""A scale is the largest magnitude of a module's input over this number, so that none saturates in FP8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The scale of the input of each module, by the module's name in the files or in the model; all are positive.

    `stored` are the scales that the checkpoint itself has, for modules without one in `scales`. `place` is the name of
    the file that `scales` are from, for messages.
    """

    scales: Mapping[str, float] = field(default_factory=dict, hash=False)
    stored: Mapping[str, float] = field(default_factory=dict, hash=False)
    place: str = ""

    def largest(self, modules: Iterable[Iterable[str]]) -> float | None:
        """Return the largest scale of modules that have one input, each given by all its names.

        None if one of them has none: kernels read one scale for all.
        """
        found = [self._scale(tuple(names)) for names in modules]
        scales = [scale for scale in found if scale is not None]
        return max(scales) if scales and len(scales) == len(found) else None

    def _scale(self, names: tuple[str, ...]) -> float | None:
        """Return the scale of a module by any of its names."""
        return next((scales[name] for scales in (self.scales, self.stored) for name in names if name in scales), None)


NOT_CALIBRATED = Calibration()

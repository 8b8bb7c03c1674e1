"""Compare a weight that was rounded to codes on request with the exact one: its codes, and its error as a whole.

Nothing of the search that chose the scales is used here. With its scale, each code must be the nearest one, and the
relative error of the weight must be within the limit of its form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.json_form import json_object
from trtllm_ct.verify.comparison import Comparison
from trtllm_ct.verify.native_numbers import ascending_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtllm_ct.base.schemes import Element
    from trtllm_ct.verify.source.coded import Coded

__all__ = ["RoundedComparison", "compare_rounded_codes", "relative_error"]

# Conversion rounds value / scale to float32 before it looks for the nearest code.
_SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedComparison(Comparison):
    """The result of comparing a weight with the exact one that it was rounded from.

    `differing` counts the elements whose code is not the nearest one. `squared_error` and `squares` are the sums of
    squared errors and of squared exact values.
    """

    squared_error: float
    squares: float

    @property
    def relative_error(self) -> float:
        """The root of the sum of squared errors over that of squared values; see `relative_error`."""
        return relative_error(self.squared_error, self.squares)

    def joined(self, following: Comparison) -> Comparison:
        """Return the comparison of these rows and of those that follow; of equal errors the first counts."""
        if not isinstance(following, RoundedComparison):
            raise TypeError("rows of one weight are compared in one way")
        worst = following if following.error > self.error else self
        return replace(
            worst,
            good=self.good and following.good,
            differing=self.differing + following.differing,
            squared_error=self.squared_error + following.squared_error,
            squares=self.squares + following.squares,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return Comparison.to_dict(self) | json_object({"relative_error": self.relative_error})


def relative_error(squared_error: float, squares: float) -> float:
    """Return the root of a sum of squared errors over that of squared values; 0 for a weight of zeros.

    It is infinite where a value is NaN or infinite, as `Comparison.error` is.
    """
    if not isfinite(squared_error) or not isfinite(squares):
        return inf
    if not squares:
        return inf if squared_error else 0.0
    return sqrt(squared_error / squares)


def compare_rounded_codes(got: Coded, want: NDArray[np.float64], element: Element) -> RoundedComparison:
    """Compare rows [n, K] of a weight in codes with the exact ones in float64.

    Good when each code is the nearest one to its exact value with its scale, or one of two that are equally near.
    """
    values = got.values()
    scale = replace(got, codes=np.ones(got.codes.shape, np.int8)).values()
    numbers = ascending_numbers(element)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.abs(want) / scale
        above = np.searchsorted(numbers, ratio).clip(1, len(numbers) - 1)
        nearest = np.minimum(np.abs(numbers[above] - ratio), np.abs(ratio - numbers[above - 1])) * scale
        difference = np.abs(values - want)
        allowed = difference <= nearest + _SLACK * np.abs(want)
        peak = np.abs(want).max(axis=1, keepdims=True, initial=0)
        relative = np.nan_to_num(np.where(difference == 0, 0.0, difference / peak), nan=np.inf, posinf=np.inf)
    flat = int(relative.argmax()) if relative.size else 0
    return RoundedComparison(
        good=bool(allowed.all()),
        error=float(relative.flat[flat]) if relative.size else 0.0,
        differing=int((~allowed).sum()),
        position=tuple(int(index) for index in np.unravel_index(flat, want.shape)) if relative.size else (),
        got=float(values.flat[flat]) if relative.size else 0.0,
        want=float(want.flat[flat]) if relative.size else 0.0,
        squared_error=float(np.square(difference).sum()),
        squares=float(np.square(want).sum()),
    )

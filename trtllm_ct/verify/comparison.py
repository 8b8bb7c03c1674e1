"""Compare rows of a delivered weight with the exact ones, and report where the two differ most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.json_form import fields_form
from trtllm_ct.verify.source.numbers import same_bits, to_numbers
from trtllm_ct.verify.source.rounding import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtllm_ct.base.dtypes import DType

__all__ = ["Comparison", "compare_native", "compare_numbers", "compare_rounded", "equal_bits", "equal_elements"]

_BLOCK = 128
_NATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of comparing a delivered tensor with the values it should have.

    `error` is the largest |got - want| relative to the largest |want| of the same row. It is infinite for an
    unexpected NaN, and where a row of zeros in `want` is not zero in `got`. `differing` counts the elements that are
    off by more than allowed. `position`, `got` and `want` describe the element with the largest error.
    """

    good: bool
    error: float
    differing: int
    position: tuple[int, ...]
    got: float
    want: float

    @property
    def block(self) -> str:
        """The row and the 128 columns that hold the worst element, such as `row 17, columns 128-255`.

        For a tensor that is not 2-D, the index of the element, such as `element [3]`.
        """
        if len(self.position) != 2:
            return f"element {list(self.position)}"
        row, column = self.position
        start = column // _BLOCK * _BLOCK
        return f"row {row}, columns {start}-{start + _BLOCK - 1}"

    def below(self, rows: int) -> Comparison:
        """Return the comparison of the same elements `rows` further down, of which the first has no rows above."""
        if not (rows and self.position):
            return self
        return replace(self, position=(self.position[0] + rows, *self.position[1:]))

    def joined(self, following: Comparison) -> Comparison:
        """Return the comparison of these rows and of those that follow; of equal errors the first counts."""
        if following.good and not following.error and not following.differing:
            return self
        worst = following if following.error > self.error else self
        return replace(worst, good=self.good and following.good, differing=self.differing + following.differing)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a number that is not finite becomes the string `nan`, `inf` or `-inf`."""
        return fields_form(self)


def compare_numbers(got: NDArray[np.float64], want: NDArray[np.float64]) -> Comparison:
    """Compare rows of two tensors in float64; good when no element differs.

    Two NaN are the same value, and so are two infinities of one sign; a NaN is infinitely far from any number.
    """
    same = _same(got, want)
    if same.all():
        return _equal(got)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(same, 0.0, np.abs(got - want) / _row_peak(want))
    return _comparison(got, want, same, relative)


def compare_native(got: NDArray[np.float64], want: NDArray[np.float64], *, exact: bool = False) -> Comparison:
    """Compare rows [n, K] of two weights in float64 that were dequantized from native codes.

    Good when no element is off by more than 1e-6 of the largest magnitude in its row of `want`; with `exact`, when no
    element is off at all.
    """
    # The sum is finite only if every element is.
    if np.array_equal(got, want) and np.isfinite(want.sum()):
        return _equal(got)
    peak = _row_peak(want)
    tolerance = 0.0 if exact else _NATIVE_TOLERANCE
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.abs(got - want)
        # A row of zeros allows no difference; a NaN in `got` or `want` never passes.
        allowed = difference <= tolerance * peak
        relative = np.where(difference == 0, 0.0, difference / peak)
    return _comparison(got, want, allowed, relative)


def compare_rounded(
    got: NDArray[np.float64], exact: NDArray[np.float64], dtype: DType, *, uncertainty: float = 0.0
) -> Comparison:
    """Compare rows of an unquantized tensor of `dtype` with the exact ones; both are given in float64.

    Good when each element of `got` is the exact value, rounded once to `dtype`. NaN equals NaN.
    `uncertainty` is the possible error of `exact` itself, relative to its largest magnitude. If it is not zero, any
    value is good that lies between the roundings of exact - error and exact + error.
    """
    want = rounded(exact, dtype)
    if np.array_equal(got, want):
        return _equal(got)
    same = _same(got, want)
    if uncertainty and exact.size:
        slack = uncertainty * np.abs(exact).max()
        same |= (rounded(exact - slack, dtype) <= got) & (got <= rounded(exact + slack, dtype))
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(same, 0.0, np.abs(got - want) / _row_peak(want))
    return _comparison(got, want, same, relative)


def equal_bits(got: NDArray[Any], stored: NDArray[Any], dtype: DType) -> Comparison | None:
    """Return the comparison of rows that are the same bits in the same dtype; None if they differ."""
    if not same_bits(got, stored):
        return None
    if not got.size:
        return equal_elements(0.0, got.shape)
    return _equal(to_numbers(got.reshape(-1)[:1], dtype).reshape((1,) * got.ndim))


def equal_elements(first: float, shape: tuple[int, ...]) -> Comparison:
    """Return the comparison of equal elements of a shape; its place is the first of them."""
    position = (0,) * len(shape) if prod(shape) else ()
    return Comparison(good=True, error=0.0, differing=0, position=position, got=first, want=first)


def _equal(got: NDArray[np.float64]) -> Comparison:
    return equal_elements(float(got.flat[0]) if got.size else 0.0, got.shape)


def _row_peak(want: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest finite magnitude of each row, shaped [..., 1]; the magnitudes of a scalar or an empty tensor.

    A NaN or an infinity in a row must not hide how far its other elements are off.
    """
    magnitudes = np.abs(want)
    if not (want.size and want.ndim):
        return magnitudes
    peak: NDArray[np.float64] = magnitudes.max(axis=-1, keepdims=True)
    if not np.isfinite(peak).all():
        peak = np.where(np.isfinite(magnitudes), magnitudes, 0.0).max(axis=-1, keepdims=True)
    return peak


def _same(got: NDArray[np.float64], want: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether elements have the same value; NaN is the same as NaN."""
    same: NDArray[np.bool_] = got == want
    return same if same.all() else same | (np.isnan(got) & np.isnan(want))


def _comparison(
    got: NDArray[np.float64], want: NDArray[np.float64], allowed: NDArray[np.bool_], relative: NDArray[np.float64]
) -> Comparison:
    # Count NaN, such as that of inf - inf, as an infinite error.
    relative = np.nan_to_num(relative, nan=np.inf, posinf=np.inf)
    flat = int(relative.argmax())
    position = tuple(int(index) for index in np.unravel_index(flat, got.shape))
    return Comparison(
        good=bool(allowed.all()),
        error=float(relative.flat[flat]),
        differing=int((~allowed).sum()),
        position=position,
        got=float(got.flat[flat]),
        want=float(want.flat[flat]),
    )

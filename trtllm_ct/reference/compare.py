"""Compare a delivered weight with the exact one, and say where it differs most so that a human can act on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trtllm_ct.layouts.rounding import round_once

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["Comparison", "compare_native", "compare_rounded"]

_BLOCK = 128
_NATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a delivered tensor compares with what it should be.

    `error` is the largest |got - want| relative to the largest |want| of the same row, infinite for NaN and beside a
    row of zeros; `differing` counts elements that are off by more than allowed. `position`, `got` and `want` belong to
    the largest error; `block` is its run of 128 columns.
    """

    good: bool
    error: float
    differing: int
    position: tuple[int, ...]
    got: float
    want: float

    @property
    def block(self) -> str:
        """Row and columns of the worst block, such as `row 17, columns 128-255`; the index for other ranks."""
        if len(self.position) != 2:
            return f"element {list(self.position)}"
        row, column = self.position
        start = column // _BLOCK * _BLOCK
        return f"row {row}, columns {start}-{start + _BLOCK - 1}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a number that is not finite becomes the text `nan`, `inf` or `-inf`."""
        return {
            "good": self.good,
            "error": _json_number(self.error),
            "differing": self.differing,
            "position": list(self.position),
            "got": _json_number(self.got),
            "want": _json_number(self.want),
        }


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def compare_native(got: Tensor, want: Tensor) -> Comparison:
    """Two float64 weights [N, K] of native codes: good when no row is off by more than 1e-6 of its largest value."""
    row_peak = _row_peak(want)
    difference = (got - want).abs()
    # A row of zeros allows no difference; NaN in either place never passes.
    allowed = difference <= _NATIVE_TOLERANCE * row_peak
    relative = torch.where(difference == 0, 0.0, difference / row_peak)
    return _comparison(got, want, allowed, relative)


def compare_rounded(got: Tensor, exact: Tensor, *, uncertainty: float = 0.0) -> Comparison:
    """A plain tensor against the exact float64 one: good when each element is that value rounded once to its dtype.

    `uncertainty` is how far `exact` may itself be off, relative to its largest element: then the rounding of any value
    that near is good.
    """
    want = round_once(exact, got.dtype)
    same = (got == want) | (got.isnan() & want.isnan())
    if uncertainty and exact.numel():
        slack = uncertainty * exact.abs().max()
        same |= (round_once(exact - slack, got.dtype) <= got) & (got <= round_once(exact + slack, got.dtype))
    got, want = got.double(), want.double()
    relative = torch.where(same, 0.0, (got - want).abs() / _row_peak(want))
    return _comparison(got, want, same, relative)


def _row_peak(want: Tensor) -> Tensor:
    """The largest magnitude of each row, to be broadcast; the magnitudes themselves where there are no rows."""
    return want.abs().amax(dim=-1, keepdim=True) if want.numel() and want.dim() else want.abs()


def _comparison(got: Tensor, want: Tensor, allowed: Tensor, relative: Tensor) -> Comparison:
    if got.numel() == 0:
        return Comparison(good=True, error=0.0, differing=0, position=(), got=0.0, want=0.0)
    # NaN would hide behind any number in a maximum.
    relative = relative.nan_to_num(nan=torch.inf, posinf=torch.inf)
    flat = int(relative.flatten().argmax())
    return Comparison(
        good=bool(allowed.all()),
        error=float(relative.flatten()[flat]),
        differing=int((~allowed).sum()),
        position=_position(flat, got.shape),
        got=float(got.flatten()[flat]),
        want=float(want.flatten()[flat]),
    )


def _position(flat: int, shape: Iterable[int]) -> tuple[int, ...]:
    """The index of an element by its number; `torch.unravel_index` would import sympy, which takes half a second."""
    position = []
    for size in reversed(tuple(shape)):
        flat, index = divmod(flat, size)
        position.append(index)
    return tuple(reversed(position))

"""Compare a delivered weight with the exact weight, and report where the two differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trtllm_ct.base.json_form import fields_form
from trtllm_ct.layouts.rounding import round_once

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["Comparison", "compare_native", "compare_rounded"]

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

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a number that is not finite becomes the string `nan`, `inf` or `-inf`."""
        return fields_form(self)


def compare_native(got: Tensor, want: Tensor) -> Comparison:
    """Compare two float64 weights [N, K] that were dequantized from native codes.

    Good when no element is off by more than 1e-6 of the largest magnitude in its row of `want`.
    """
    row_peak = _row_peak(want)
    difference = (got - want).abs()
    # A row of zeros allows no difference; a NaN in `got` or `want` never passes.
    allowed = difference <= _NATIVE_TOLERANCE * row_peak
    relative = torch.where(difference == 0, 0.0, difference / row_peak)
    return _comparison(got, want, allowed, relative)


def compare_rounded(got: Tensor, exact: Tensor, *, uncertainty: float = 0.0) -> Comparison:
    """Compare an unquantized tensor with the exact float64 one.

    Good when each element of `got` is the exact value, rounded once to the dtype of `got`. NaN equals NaN.
    `uncertainty` is the possible error of `exact` itself, relative to its largest magnitude. If it is not zero, any
    value is good that lies between the roundings of exact - error and exact + error.
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
    """The largest magnitude of each row, shaped [..., 1]; the magnitudes themselves for a scalar or an empty tensor."""
    return want.abs().amax(dim=-1, keepdim=True) if want.numel() and want.dim() else want.abs()


def _comparison(got: Tensor, want: Tensor, allowed: Tensor, relative: Tensor) -> Comparison:
    if got.numel() == 0:
        return Comparison(good=True, error=0.0, differing=0, position=(), got=0.0, want=0.0)
    # Count NaN, such as that of inf - inf, as an infinite error.
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
    """Convert a flat index to an index per axis.

    `torch.unravel_index` does the same but imports sympy, which takes half a second.
    """
    position = []
    for size in reversed(tuple(shape)):
        flat, index = divmod(flat, size)
        position.append(index)
    return tuple(reversed(position))

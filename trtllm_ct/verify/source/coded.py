"""Rows of a quantized weight before the multiplication: codes of one byte, and the numbers that each group has.

Two weights with equal codes, equal scales and equal offsets of every element are equal. Codes are a byte wide, and
scales belong to whole groups, so this is shown with far less work than the products need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.verify.source.numbers import E4M3, look_up, same_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Coded"]

_NAN = 0x7F


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """Rows [n, K] of a weight: w = (code - zero) * scale / divisor + offset.

    `codes` are int8, or uint8 for the bits of E4M3 numbers. The others are float64. `scale`, `zero` and `offset` are
    [n, G], or have a length of 1 where they are the same for all rows or columns. `width` is the number of columns in a
    group, of which the last may be narrower; `columns` is the group of each column if groups are not contiguous. A
    divisor of 0 makes a weight of zeros.
    """

    codes: NDArray[np.int8] | NDArray[np.uint8]
    scale: NDArray[np.float64]
    width: int
    columns: NDArray[np.int64] | None = None
    zero: NDArray[np.float64] | None = None
    offset: NDArray[np.float64] | None = None
    divisor: float = 1.0

    @property
    def is_exact_in_float32(self) -> bool:
        """Whether a mode with scales in float32 holds this weight exactly: no product had to be rounded for it."""
        plain = self.zero is None and self.divisor == 1
        return plain and bool((self.scale.astype(np.float32) == self.scale).all())

    def first(self) -> float:
        """Return the first element; 0 if there is none."""
        if not self.codes.size:
            return 0.0
        offset = None if self.offset is None else self.offset[:1, :1]
        alone = Coded(codes=self.codes[:1, :1], scale=self.scale[:1, :1], width=1, offset=offset, divisor=self.divisor)
        return float(alone.values()[0, 0])

    def values(self) -> NDArray[np.float64]:
        """Return the weight in float64."""
        codes = look_up(self.codes, E4M3) if self.codes.dtype == np.uint8 else self.codes.astype(np.float64)
        if self.zero is not None:
            self._apply(np.subtract, codes, self.zero)
        self._apply(np.multiply, codes, self.scale)
        if self.divisor != 1:
            codes = codes / self.divisor if self.divisor else np.zeros_like(codes)
        if self.offset is not None:
            self._apply(np.add, codes, self.offset)
        return codes

    def equals(self, other: Coded) -> bool:
        """Whether codes, scales and offsets show that all elements equal those of `other` and are finite.

        False says nothing: the values may be equal all the same.
        """
        if not same_bits(self.codes, other.codes):
            return False
        if self.codes.dtype == np.uint8 and (self.codes & _NAN == _NAN).any():
            return False
        mine, others = self._per_element_groups(other), other._per_element_groups(self)
        if mine is None or others is None:
            return False
        # The sum is finite only if every element is.
        return all(
            np.isfinite(left.sum()) and (np.broadcast_arrays(left, right)[0] == right).all()
            for left, right in zip(mine, others, strict=True)
        )

    def _per_element_groups(self, other: Coded) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return the multiplier and the offset of every group of the narrower groups of the two; None if none fit."""
        if self.columns is not None:
            return None
        scale = self.scale / self.divisor if self.divisor else np.zeros_like(self.scale)
        offset = np.zeros((1, 1)) if self.offset is None else self.offset
        if self.zero is not None:
            offset = offset - self.zero * scale
        width = min(self.width, other.width)
        if self.width % width:
            return None
        count = -(-self.codes.shape[1] // width)
        return _repeated(scale, self.width // width, count), _repeated(offset, self.width // width, count)

    def _apply(self, operation: np.ufunc, values: NDArray[np.float64], numbers: NDArray[np.float64]) -> None:
        """Apply an operation with numbers [n, G] to each group of columns of values [n, K], in place."""
        count = values.shape[1]
        if numbers.shape[1] == 1:
            operation(values, numbers, out=values)
        elif self.columns is None and count == self.width * numbers.shape[1]:
            groups = values.reshape(len(values), numbers.shape[1], -1)
            operation(groups, numbers[:, :, None], out=groups)
        else:
            columns = np.arange(count) // self.width if self.columns is None else self.columns
            operation(values, numbers[:, columns], out=values)


def _repeated(numbers: NDArray[Any], times: int, count: int) -> NDArray[Any]:
    """Return numbers [n, G] for groups that are `times` narrower, of which a row has `count`."""
    return numbers if numbers.shape[1] == 1 or times == 1 else np.repeat(numbers, times, axis=1)[:, :count]

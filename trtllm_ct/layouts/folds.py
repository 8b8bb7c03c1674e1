"""Folding of transforms into weights: a transform that runs beside a module becomes part of the module's weight.

compressed-tensors multiplies the input or the output of a module by a square matrix T while the model runs. A Linear
then computes y = (x T) W^T + b or y = (x W^T + b) T, which equals a plain Linear with another weight and bias:

| transform           | weight      | bias    |
|---------------------|-------------|---------|
| input of a Linear   | W T^T       | b       |
| output of a Linear  | T^T W       | T^T b   |
| output of a table   | W T         | -       |

A table is an embedding. A T that is smaller than its axis applies to each block of the axis (block-diagonal). A T that
is built from a Hadamard matrix is stored without the factor 1 / sqrt(n); `perm` reorders its rows and columns alike.
Source: compressed-tensors 0.20 `transform/factory/hadamard.py`, `transform/factory/matrix_multiply.py` and
`transform/utils/matrix.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.layouts.stored_array import StoredArray

    Matrix = NDArray[np.float64]

__all__ = ["Fold", "fold"]

_TILE_ELEMENTS = 1 << 22  # float64 intermediates of a tile: 32 MiB each


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A matrix F to multiply with a weight W: the stored tensors that F is built from, and the side that it is on.

    `matrix` and `permutation` are local names of stored tensors. F is the stored matrix with its rows and columns
    reordered by the permutation, then transposed when `transposed`, and divided by sqrt(n) when `normalized`.
    `axis` 1 mixes the columns of W (W F), 0 its rows (F W).
    """

    matrix: str
    permutation: str | None
    axis: Literal[0, 1]
    transposed: bool
    normalized: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """The local names of the stored tensors that F is built from."""
        return (self.matrix,) if self.permutation is None else (self.matrix, self.permutation)

    def factor(self, stored: Mapping[str, StoredArray]) -> Matrix:
        """Return the matrix without the division by sqrt(n), float64 [n, n]: F, or F * sqrt(n) when `normalized`."""
        matrix: Matrix = stored[self.matrix].numbers.astype("f8")
        if self.permutation is not None:
            order = stored[self.permutation].elements
            matrix = matrix[order][:, order]
        return matrix.T if self.transposed else matrix


def fold(weight_OI: Matrix, factor: Matrix, axis: Literal[0, 1], *, normalized: bool) -> None:
    """Multiply a float64 weight [N, K] by a factor [n, n] in place: W F for axis 1, F W for axis 0.

    n must divide the length of the axis; a smaller factor applies to each block of n columns or rows. `normalized`
    divides by sqrt(n) after the sums, which keeps sums of dyadic numbers exact. Extra memory: a tile of 32 MiB.
    """
    rows, columns = weight_OI.shape
    size = factor.shape[0]
    axis_length = columns if axis == 1 else rows
    step = max(1, _TILE_ELEMENTS // max(1, axis_length))
    for start in range(0, rows if axis == 1 else columns, step):
        if axis == 1:
            tile = weight_OI[start : start + step]
            tile[...] = (tile.reshape(-1, size) @ factor).reshape(tile.shape)
        else:
            tile = weight_OI[:, start : start + step]
            tile[...] = (factor @ tile.reshape(-1, size, tile.shape[1])).reshape(tile.shape)
    if normalized:
        weight_OI /= sqrt(size)

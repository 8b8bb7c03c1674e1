"""Transforms that run beside a module, folded into its weight.

compressed-tensors multiplies the input or the output of a module by a square matrix T while the model runs. A Linear
computes y = (x T) W^T + b or y = (x W^T + b) T then, which is again a plain Linear:

| transform           | weight      | bias    |
|---------------------|-------------|---------|
| input of a Linear   | W T^T       | b       |
| output of a Linear  | T^T W       | T^T b   |
| output of a table   | W T         | -       |

A T smaller than the axis that it works on stands in every block of it (block-diagonal). Where T is made of a Hadamard
matrix, that is stored without its factor 1 / sqrt(n), and `perm` reorders its rows and columns alike.
Source: compressed-tensors 0.20 `transform/factory/hadamard.py`, `transform/factory/matrix_multiply.py` and
`transform/utils/matrix.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Fold", "fold"]

_TILE_ELEMENTS = 1 << 22  # float64 intermediates of a tile: 32 MiB each


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One factor of a weight: the stored tensors that make it, by local name, and where it stands.

    `axis` 1 mixes columns (W F), 0 rows (F W). F is the stored matrix, its rows and columns in the order of
    `permutation`, `transposed`, and divided by sqrt(n) when `normalized`.
    """

    matrix: str
    permutation: str | None
    axis: Literal[0, 1]
    transposed: bool
    normalized: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """The local names of what it reads."""
        return (self.matrix,) if self.permutation is None else (self.matrix, self.permutation)

    def factor(self, stored: Mapping[str, Tensor]) -> Tensor:
        """F times sqrt(n) when it is normalized, else F: float64 [n, n]."""
        matrix = stored[self.matrix].double()
        if self.permutation is not None:
            order = stored[self.permutation].long()
            matrix = matrix[order][:, order]
        return matrix.T if self.transposed else matrix


def fold(weight_OI: Tensor, factor: Tensor, axis: Literal[0, 1], *, normalized: bool) -> None:
    """Multiply a float64 weight [N, K] by a factor [n, n] in place: W F along columns (1), F W along rows (0).

    n divides the length of the axis; a smaller factor acts on each run of n columns or rows. `normalized` divides by
    sqrt(n) after the sums, which keeps sums of dyadic numbers exact. Memory: a tile of 32 MiB.
    """
    rows, columns = weight_OI.shape
    size = factor.shape[0]
    across = columns if axis == 1 else rows
    step = max(1, _TILE_ELEMENTS // max(1, across))
    for start in range(0, rows if axis == 1 else columns, step):
        if axis == 1:
            tile = weight_OI[start : start + step]
            tile.copy_((tile.reshape(-1, size) @ factor).reshape(tile.shape))
        else:
            tile = weight_OI[:, start : start + step]
            tile.copy_((factor @ tile.reshape(-1, size, tile.shape[1])).reshape(tile.shape))
    if normalized:
        weight_OI /= sqrt(size)

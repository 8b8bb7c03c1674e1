"""`CodedWeight`: a delivered weight as codes, scales and zeros, before they are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CodedWeight"]

_Operation = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWeight:
    """A weight [N, K]: w = code * scale * factor + zero.

    `codes` are int8 or E4M3, whose elements are the numbers themselves. `scale` and `zero` are [N, G], or have a length
    of 1 where they are the same for all rows or columns. `width` is the number of columns in a group, of which the last
    may be narrower. `factor` is one number for the whole weight.
    """

    codes: Tensor
    scale: Tensor
    width: int
    factor: Tensor | None = None
    zero: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, computed in `dtype`, which is float32 or float64.

        A code is first multiplied with its own scale: this product is exact where both are small floats.
        """
        import torch

        values = self._per_group(torch.mul, self.codes.to(dtype), self.scale.to(dtype))
        if self.factor is not None:
            values = values * self.factor.to(dtype)
        return values if self.zero is None else self._per_group(torch.add, values, self.zero.to(dtype))

    def _per_group(self, operation: _Operation, values: Tensor, numbers: Tensor) -> Tensor:
        """Apply an operation to values [N, K] and the number of each group."""
        columns, groups = values.shape[1], numbers.shape[1]
        if groups == 1:
            return operation(values, numbers)
        if columns == groups * self.width:
            return operation(values.reshape(len(values), groups, self.width), numbers[:, :, None]).flatten(1)
        return operation(values, numbers.repeat_interleave(self.width, 1)[:, :columns])

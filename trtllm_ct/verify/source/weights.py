"""A quantized weight of a source: its codes, scales and zero points, row by row.

w = (code - zero point) * scale. A scale belongs to the whole weight, to a row, to a group of columns of a row, or to a
block of rows and columns; its number of elements and the scheme say which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Strategy
from trtllm_ct.verify.source.coded import Coded
from trtllm_ct.verify.source.numbers import unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.verify.source.files import SourceTensor
    from trtllm_ct.verify.source.modules import Module

__all__ = ["Weight"]

_WORD_BITS = 32


@dataclass(slots=True, kw_only=True)
class Weight:
    """A quantized weight [N, K] of one module.

    `shape` is that of the stored weight, of which the module may be one of several parts. `release` is the release of
    compressed-tensors that wrote it, () if that is unknown. `kept` holds what is computed once for all rows.
    """

    module: Module
    args: QuantArgs
    release: tuple[int, ...]
    shape: tuple[int, int] = (0, 0)
    kept: dict[str, Any] = field(default_factory=dict)

    def tensor(self, local: str) -> SourceTensor:
        """Return a tensor of the module; raises `KeyError` if it is not stored."""
        return self.module.tensors[local]

    def rows(self, local: str, begin: int, end: int) -> NDArray[Any]:
        """Return rows of codes, as stored."""
        return self.module.ordered(local, self.tensor(local).rows, begin, end)

    def scalar(self, local: str) -> float:
        """Return the one number of a tensor; if it has one for each part of the weight, that of this part."""
        numbers = self.tensor(local).all_numbers().flatten()
        return float(numbers[self.module.part if numbers.size == self.module.parts else 0])

    def coded(
        self,
        codes: NDArray[np.int8] | NDArray[np.uint8],
        begin: int,
        end: int,
        *,
        scale: NDArray[np.float64] | None = None,
        zero_point: str = "weight_zero_point",
        divisor: float = 1.0,
    ) -> Coded:
        """Return rows `begin` to `end` with their scales and zero points.

        `scale` are the scales [n, G] of contiguous groups of equal size if they are not numbers as they are stored.
        `zero_point` is the local name of the zero points, which need not be stored; empty if codes have none.
        """
        zero = self._zero_points(zero_point, begin, end) if zero_point in self.module.tensors else None
        if scale is None:
            scale = self._per_group("weight_scale", begin, end)
        groups = scale.shape[1] if zero is None else max(scale.shape[1], zero.shape[1])
        width, columns = self._groups(groups)
        return Coded(codes=codes, scale=scale, width=width, columns=columns, zero=zero, divisor=divisor)

    def _groups(self, groups: int) -> tuple[int, NDArray[np.int64] | None]:
        """Return the columns in a group, and the group of each column if groups are not contiguous."""
        count = self.shape[1]
        if groups == 1:
            return count, None
        if "weight_g_idx" in self.module.tensors:
            if "weight_g_idx" not in self.kept:
                self.kept["weight_g_idx"] = self.tensor("weight_g_idx").whole().astype(np.int64)
            index: NDArray[np.int64] = self.kept["weight_g_idx"]
            if not (index == -1).any():
                return -(-count // groups), index
        block = self.args.block_structure if self.args.strategy is Strategy.BLOCK else None
        return block[1] if block else self.args.group_size or -(-count // groups), None

    def _per_group(self, local: str, begin: int, end: int) -> NDArray[np.float64]:
        """Return the numbers [n, G] of rows `begin` to `end`; [1, 1] for one number."""
        tensor = self.tensor(local)
        if tensor.size == 1 or (tensor.size == self.module.parts and tensor.size != self.shape[0]):
            return np.full((1, 1), self.scalar(local))
        if self.args.strategy is Strategy.BLOCK and self.args.block_structure:
            height = self.args.block_structure[0]
            blocks = tensor.numbers(begin // height, -(-end // height))
            return blocks[np.arange(begin, end) // height - begin // height]
        if tensor.size == self.shape[0]:
            numbers = tensor.all_numbers().reshape(-1, 1)
            return self.module.ordered(local, lambda first, last: numbers[first:last], begin, end)
        return self.module.ordered(local, tensor.numbers, begin, end)

    def _zero_points(self, local: str, begin: int, end: int) -> NDArray[np.float64]:
        """Return the zero points [n, G] of rows `begin` to `end`."""
        tensor = self.tensor(local)
        if tensor.dtype is not DType.I32 or tensor.shape == self.tensor("weight_scale").shape:
            return self._per_group(local, begin, end)
        if local not in self.kept:
            self.kept[local] = self._packed_zero_points(tensor)
        unpacked: NDArray[np.int8] = self.kept[local]
        return self.module.ordered(local, lambda first, last: unpacked[first:last], begin, end).astype(np.float64)

    def _packed_zero_points(self, tensor: SourceTensor) -> NDArray[np.int8]:
        """Return zero points [N, G] that are packed down the rows, in int8; surplus columns are left out."""
        bits, rows = self.args.num_bits, self.shape[0]
        groups = self.tensor("weight_scale").size // rows
        words = np.ascontiguousarray(tensor.whole()[:, :groups].T)
        dense = words.shape[1] == -(-rows * bits // _WORD_BITS)
        codes = unpack(words.view(np.uint8), bits, rows, dense=dense)
        return (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8).T

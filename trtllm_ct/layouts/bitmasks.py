"""Bitmasks of sparse matrices: one bit per element says whether the value of that element is stored.

Bit `j` of byte `i` of a row (lowest bit first) marks column `8 * i + j`; the bits beyond the last column are zero. The
marked values are stored in row-major order in one flat tensor. These functions only convert: callers choose which
elements to mark, and check that the contents of a file are valid.
Source: compressed-tensors 0.20 `utils/helpers.py` (`pack_bitmasks`, `unpack_bitmasks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing
from trtllm_ct.layouts.packing import pack_fields, unpack_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "count_marks",
    "count_marks_per_four",
    "gather_marked",
    "nonzero_mask",
    "pack_mask",
    "scatter_marked",
    "unpack_mask",
]

_BITS = Packing(bits=1, container=DType.U8, axis=1, offset_binary=False)
_TILE_ELEMENTS = 1 << 20


def nonzero_mask(dense: Tensor) -> Tensor:
    """Return a bool mask of the same shape, true where `dense` is not zero; -0.0 counts as zero, NaN does not."""
    import torch

    # torch can't compare 8-bit floats on every device; bfloat16 represents all of them exactly.
    narrow = dense.is_floating_point() and dense.itemsize == 1
    mask: Tensor = (dense.to(torch.bfloat16) if narrow else dense) != 0
    return mask


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask [..., C] into a bitmask, uint8 [..., ceil(C / 8)]."""
    import torch

    shape = (*mask.shape[:-1], _BITS.elements(mask.shape[-1]))
    if mask.numel() == 0:
        return torch.zeros(shape, dtype=torch.uint8, device=mask.device)
    return pack_fields(_rows(mask.contiguous().view(torch.uint8)), _BITS).view(shape)


def unpack_mask(bitmask: Tensor, columns: int) -> Tensor:
    """Unpack a bitmask, uint8 [..., ceil(C / 8)], into a bool mask [..., C]; bits beyond column C are ignored."""
    import torch

    rows = _rows(bitmask)
    fields = unpack_fields(rows, _BITS, (rows.shape[0], columns))
    return fields.view(torch.bool).view(*bitmask.shape[:-1], columns)


def count_marks(bitmask: Tensor) -> Tensor:
    """Return the number of marked elements per row: uint8 [..., B] -> int64 [...]."""
    import torch

    fours = count_marks_per_four(bitmask)
    return ((fours & 0x0F) + (fours >> 4)).sum(dim=-1, dtype=torch.int64)


def count_marks_per_four(bitmask: Tensor) -> Tensor:
    """Return how many of each four columns are marked, uint8 of the same shape as `bitmask`.

    A byte of the result counts the first four columns in its low nibble and the next four in its high nibble.
    The counts come from the usual parallel bit count (sideways addition).
    """
    twos = bitmask - ((bitmask >> 1) & 0x55)
    return (twos & 0x33) + ((twos >> 2) & 0x33)


def gather_marked(dense: Tensor, mask: Tensor) -> Tensor:
    """Return the values of `dense` where `mask` is true, in row-major order as one flat tensor.

    `mask` is bool and has the shape of `dense`.
    """
    return _as_integers(dense.contiguous())[mask].view(dense.dtype)


def scatter_marked(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """Write flat values to the marked elements of a zero tensor [..., C]: the inverse of `gather_marked`.

    `bitmask` is uint8 [..., ceil(C / 8)]. There must be as many values as marks, and no mark beyond column C. The
    function copies bits, so that any dtype works and every NaN keeps its payload. Beside the result it needs memory for
    one tile.
    """
    import torch

    dense = torch.zeros((*bitmask.shape[:-1], columns), dtype=values.dtype, device=values.device)
    target_OI, bitmask_OB, source = _rows(_as_integers(dense)), _rows(bitmask), _as_integers(values.contiguous())
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    begin = 0
    for start in range(0, target_OI.shape[0], step):
        mask = unpack_mask(bitmask_OB[start : start + step], columns)
        end = begin + int(mask.count_nonzero())
        target_OI[start : start + step].masked_scatter_(mask, source[begin:end])
        begin = end
    return dense


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor [..., C] as a matrix with C columns; a vector becomes one row."""
    return tensor.unsqueeze(0).flatten(0, -2)


def _as_integers(tensor: Tensor) -> Tensor:
    """Return a view as integers of the same width: torch can index and scatter these for every width."""
    return tensor.view(_integer_dtype(tensor.itemsize))


def _integer_dtype(itemsize: int) -> torch.dtype:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]

"""Bitmasks: one bit for each element of a matrix that says whether its value is stored.

Bit `j` of byte `i` of a row (lowest bit first) marks column `8 * i + j`; the bits beyond the last column are zero. The
marked values lie row after row in one flat tensor. These functions move values and marks; which elements get a mark,
and whether a file keeps its promises, is for the callers.
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
    "gather_marked",
    "marks_of_fours",
    "nonzero_mask",
    "pack_mask",
    "scatter_marked",
    "unpack_mask",
]

_BITS = Packing(bits=1, container=DType.U8, axis=1, offset_binary=False)
_TILE_ELEMENTS = 1 << 20


def nonzero_mask(dense: Tensor) -> Tensor:
    """Which elements are not zero, as bool of the same shape; minus zero is zero, NaN is not."""
    import torch

    # bfloat16 holds every float of 8 bits, for which torch has no comparison of its own everywhere.
    narrow = dense.is_floating_point() and dense.itemsize == 1
    mask: Tensor = (dense.to(torch.bfloat16) if narrow else dense) != 0
    return mask


def pack_mask(mask: Tensor) -> Tensor:
    """Bool [..., C] -> uint8 [..., ceil(C / 8)]."""
    import torch

    shape = (*mask.shape[:-1], _BITS.elements(mask.shape[-1]))
    if mask.numel() == 0:
        return torch.zeros(shape, dtype=torch.uint8, device=mask.device)
    return pack_fields(_rows(mask.contiguous().view(torch.uint8)), _BITS).view(shape)


def unpack_mask(bitmask: Tensor, columns: int) -> Tensor:
    """uint8 [..., ceil(C / 8)] -> bool [..., C]; bits beyond column C are not looked at."""
    import torch

    rows = _rows(bitmask)
    fields = unpack_fields(rows, _BITS, (rows.shape[0], columns))
    return fields.view(torch.bool).view(*bitmask.shape[:-1], columns)


def count_marks(bitmask: Tensor) -> Tensor:
    """How many bits each row has: uint8 [..., B] -> int64 [...]."""
    import torch

    fours = marks_of_fours(bitmask)
    return ((fours & 0x0F) + (fours >> 4)).sum(dim=-1, dtype=torch.int64)


def marks_of_fours(bitmask: Tensor) -> Tensor:
    """How many of each four columns are marked: the counts of the lower and the upper four in the nibbles of a byte.

    uint8 to uint8, same shape; the usual sideways addition of bits.
    """
    twos = bitmask - ((bitmask >> 1) & 0x55)
    return (twos & 0x33) + ((twos >> 2) & 0x33)


def gather_marked(dense: Tensor, mask: Tensor) -> Tensor:
    """The values of `dense` at the marks of a bool mask of its shape, row after row, in one flat tensor."""
    return _as_integers(dense.contiguous())[mask].view(dense.dtype)


def scatter_marked(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """The inverse of `gather_marked`: flat values to the marks of uint8 [..., ceil(C / 8)], zeros elsewhere: [..., C].

    There must be as many values as marks, and no mark beyond column C. Bits are moved, so that every dtype and every
    NaN survives. Memory beside the result is one tile.
    """
    import torch

    dense = torch.zeros((*bitmask.shape[:-1], columns), dtype=values.dtype, device=values.device)
    target_OI, marks_OB, source = _rows(_as_integers(dense)), _rows(bitmask), _as_integers(values.contiguous())
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    begin = 0
    for start in range(0, target_OI.shape[0], step):
        mask = unpack_mask(marks_OB[start : start + step], columns)
        end = begin + int(mask.count_nonzero())
        target_OI[start : start + step].masked_scatter_(mask, source[begin:end])
        begin = end
    return dense


def _rows(tensor: Tensor) -> Tensor:
    """[..., C] as a matrix; one row for a vector."""
    return tensor.unsqueeze(0).flatten(0, -2)


def _as_integers(tensor: Tensor) -> Tensor:
    """The same bits under an integer dtype, which torch can index and scatter for every width."""
    return tensor.view(_integers_of(tensor.itemsize))


def _integers_of(itemsize: int) -> torch.dtype:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]

"""What the bytes of a small tensor say, without torch: for stages that must stay light.

Bytes are those of a file: little-endian, rows one behind the other.
"""

from __future__ import annotations

import struct
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import Packing

__all__ = ["integers", "is_contiguous_index", "is_zero", "is_zero_packed", "number"]

_MINUS = 0x80
_TYPE_CODES = {DType.I32: "i", DType.I64: "q"}


def number(data: bytes, dtype: DType) -> float:
    """The one element of a float32, float16 or bfloat16 tensor."""
    if dtype is DType.F16:
        return float(struct.unpack("<e", data)[0])
    # bfloat16 is the upper half of float32.
    return float(struct.unpack("<f", data.rjust(4, b"\0"))[0])


def integers(data: bytes, dtype: DType) -> tuple[int, ...]:
    """The elements of an int32 or int64 tensor, row after row."""
    return tuple(array(_TYPE_CODES[dtype], data))


def is_zero(data: bytes, dtype: DType) -> bool:
    """Whether every element is zero; for floats minus zero is, and NaN is not."""
    zeros = data.count(0)
    if dtype.is_wide_float:
        zeros += data[dtype.itemsize - 1 :: dtype.itemsize].count(_MINUS)
    return zeros == len(data)


def is_zero_packed(data: bytes, packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether every code is zero: int32 words along the rows, with codes of `shape` in the first columns.

    Surplus columns and the bits behind the last row are not looked at.
    """
    rows, columns = shape
    words = packing.packed_shape(shape)[0]
    size = packing.container.itemsize
    width = len(data) // words
    for position, (expected, used) in enumerate(_zero_words(packing, rows)):
        row = data[position * width : position * width + columns * size]
        if used == packing.container.bits:
            same = row == expected.to_bytes(size, "little") * columns
        else:
            mask = (1 << used) - 1
            same = all(word & mask == expected for (word,) in struct.iter_unpack("<I", row))
        if not same:
            return False
    return True


def is_contiguous_index(data: bytes, dtype: DType, group_size: int) -> bool:
    """Whether int32 or int64 [K] is k // `group_size`, or holds a -1: then its writer never filled it."""
    index = array(_TYPE_CODES[dtype])
    index.frombytes(data)
    return -1 in index or index == _contiguous(index.typecode, len(index), group_size)


@lru_cache(maxsize=16)
def _contiguous(type_code: str, columns: int, group_size: int) -> array[int]:
    """Remembered, since the weights of a model have few widths."""
    return array(type_code, (column // group_size for column in range(columns)))


def _zero_words(packing: Packing, rows: int) -> list[tuple[int, int]]:
    """The words of one column of zeros, each with the number of its bits that codes take, from the lowest."""
    bits, width = packing.bits, packing.container.bits
    half = 1 << (bits - 1) if packing.offset_binary else 0
    # As many codes as there are bits in a word fill whole words.
    stream = sum(half << (bits * code) for code in range(width))
    own = width if packing.dense else width // bits * bits
    words = []
    for word in range(packing.elements(rows)):
        used = min(own, rows * bits - word * own)
        pattern = stream >> (word * width % (bits * width)) if packing.dense else stream
        words.append((pattern & ((1 << used) - 1), used))
    return words

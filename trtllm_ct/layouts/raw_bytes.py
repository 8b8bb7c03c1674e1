"""Functions that interpret the bytes of small tensors without torch, for stages that must not import it.

The bytes are those of a safetensors file: little-endian, in row-major order.
"""

from __future__ import annotations

import struct
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import Packing

__all__ = ["is_contiguous_index", "is_zero", "is_zero_packed", "read_integers", "read_scalar"]

_MINUS = 0x80
_TYPE_CODES = {DType.I32: "i", DType.I64: "q"}


def read_scalar(data: bytes, dtype: DType) -> float:
    """Return the value of a float32, float16 or bfloat16 tensor with one element."""
    if dtype is DType.F16:
        return float(struct.unpack("<e", data)[0])
    # The bits of a bfloat16 are the upper half of a float32.
    return float(struct.unpack("<f", data.rjust(4, b"\0"))[0])


def read_integers(data: bytes, dtype: DType) -> tuple[int, ...]:
    """Return the elements of an int32 or int64 tensor in row-major order."""
    return tuple(array(_TYPE_CODES[dtype], data))


def is_zero(data: bytes, dtype: DType) -> bool:
    """Whether all elements are zero; for floats of 16 bits or more, -0.0 counts as zero and NaN does not."""
    zeros = data.count(0)
    if dtype.is_wide_float:
        zeros += data[dtype.itemsize - 1 :: dtype.itemsize].count(_MINUS)
    return zeros == len(data)


def is_zero_packed(data: bytes, packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether all codes of `shape` are zero in int32 words that are packed along the rows (axis 0).

    Surplus columns on the right and the bits behind the last row are ignored.
    """
    rows, columns = shape
    word_rows = packing.packed_shape(shape)[0]
    size = packing.container.itemsize
    row_bytes = len(data) // word_rows
    for index, (expected, used_bits) in enumerate(_zero_words(packing, rows)):
        word_row = data[index * row_bytes : index * row_bytes + columns * size]
        if used_bits == packing.container.bits:
            is_zero_row = word_row == expected.to_bytes(size, "little") * columns
        else:
            mask = (1 << used_bits) - 1
            is_zero_row = all(word & mask == expected for (word,) in struct.iter_unpack("<I", word_row))
        if not is_zero_row:
            return False
    return True


def is_contiguous_index(data: bytes, dtype: DType, group_size: int) -> bool:
    """Whether a group index [K], int32 or int64, equals k // `group_size` for each column k.

    An index that contains -1 counts as contiguous too: its writer never filled it.
    """
    index = array(_TYPE_CODES[dtype])
    index.frombytes(data)
    return -1 in index or index == _contiguous_index(index.typecode, len(index), group_size)


@lru_cache(maxsize=16)
def _contiguous_index(type_code: str, columns: int, group_size: int) -> array[int]:
    """Return the index k // `group_size` for all columns k; cached, because the weights of a model have few widths."""
    return array(type_code, (column // group_size for column in range(columns)))


def _zero_words(packing: Packing, rows: int) -> list[tuple[int, int]]:
    """Return the words that hold one column of zero codes, each with the number of its low bits that hold codes."""
    bits, width = packing.bits, packing.container.bits
    half = 1 << (bits - 1) if packing.offset_binary else 0
    # In a dense stream, as many codes as a word has bits fill whole words; the stream repeats after these words.
    stream = sum(half << (bits * code) for code in range(width))
    bits_per_word = width if packing.dense else width // bits * bits
    words = []
    for word in range(packing.elements(rows)):
        used_bits = min(bits_per_word, rows * bits - word * bits_per_word)
        pattern = stream >> (word * width % (bits * width)) if packing.dense else stream
        words.append((pattern & ((1 << used_bits) - 1), used_bits))
    return words

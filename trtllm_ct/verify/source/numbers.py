"""The numbers that bits stand for: small floats by their tables, and codes in a stream of bits.

Sources: OCP 8-bit Floating Point Specification 1.0 for E4M3, OCP Microscaling Formats 1.0 for E8M0, E2M1 and E2M3.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.dtypes import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "E2M1",
    "E2M1_IN_E4M3",
    "E2M3",
    "E2M3_IN_E4M3",
    "E4M3",
    "look_up",
    "nibble_values",
    "nibbles",
    "same_bits",
    "to_numbers",
    "unpack",
]

_WORD_BITS = 32


def _small_float(exponent_bits: int, mantissa_bits: int, bias: int) -> NDArray[np.float64]:
    """Return the value of every code of a small float: sign, exponent, mantissa, from the highest bit down."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    significand = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values: NDArray[np.float64] = sign * np.ldexp(significand, np.maximum(exponent, 1) - bias)
    return values


E2M1 = _small_float(2, 1, bias=1)
"""The 16 values of the float of 4 bits."""

E2M3 = _small_float(2, 3, bias=1)
"""The 64 values of the float of 6 bits."""

E4M3 = _small_float(4, 3, bias=7)
"""The 256 values of the float of 8 bits; its two codes with all exponent and mantissa bits set are NaN."""
E4M3[[0x7F, 0xFF]] = np.nan


def _in_e4m3(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the E4M3 codes of numbers that E4M3 has; the sign of a zero is kept."""
    magnitudes = np.searchsorted(E4M3[:0x7F], np.abs(values)).astype(np.uint8)
    return magnitudes | np.where(np.signbit(values), np.uint8(0x80), np.uint8(0))


E2M1_IN_E4M3 = _in_e4m3(E2M1)
"""The E4M3 codes of the 16 numbers of E2M1."""

E2M3_IN_E4M3 = _in_e4m3(E2M3)
"""The E4M3 codes of the 64 numbers of E2M3."""

_E5M2 = np.arange(256).astype(np.uint8).astype(np.uint16).__lshift__(8).view(np.float16).astype(np.float64)
_E8M0 = np.ldexp(1.0, np.arange(256) - 127)
_E8M0[0xFF] = np.nan
_BYTES = {DType.F8_E4M3: E4M3, DType.F8_E5M2: _E5M2, DType.F8_E8M0: _E8M0}


def to_numbers(raw: NDArray[Any], dtype: DType) -> NDArray[np.float64]:
    """Return stored elements as float64; each is represented exactly."""
    if dtype in _BYTES:
        return look_up(raw, _BYTES[dtype])
    if dtype is DType.BF16:
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    numbers: NDArray[np.float64] = raw.astype(np.float64)
    return numbers


def same_bits(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Whether two arrays have the same dtype, shape and bits; a NaN is the same as itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # Eight bytes are compared at once.
    word = np.uint64 if left.nbytes % 8 == 0 else np.uint8
    first, second = (np.ascontiguousarray(array).reshape(-1).view(word) for array in (left, right))
    return np.array_equal(first, second)


def look_up(codes: NDArray[Any], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `values[code]` for bytes `codes`; a table of 256 values is looked up for two codes at once."""
    if len(values) != 256 or codes.ndim == 0 or codes.shape[-1] % 2:
        single: NDArray[np.float64] = values[codes]
        return single
    pairs = np.take(_pairs(values.tobytes()), np.ascontiguousarray(codes).view(np.uint16), mode="clip")
    return pairs.view(np.float64)


@cache
def _pairs(values: bytes) -> NDArray[np.complex128]:
    """Return the values of all pairs of bytes; a complex number of numpy is two float64 that are moved together."""
    table = np.frombuffer(values)
    low, high = np.meshgrid(table, table, indexing="xy")
    return np.ascontiguousarray(np.stack((low, high), axis=-1)).view(np.complex128).ravel()


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return codes of 4 bits, two in a byte, the first in the low nibble: [n, B] to [n, 2 B]."""
    # The low nibble stays in the low byte of a word, the high nibble is moved into the high byte.
    words = packed.astype("<u2")
    words |= words * np.uint16(1 << 4)
    words &= np.uint16(0x0F0F)
    codes: NDArray[np.uint8] = words.view(np.uint8)
    return codes


def nibble_values(packed: NDArray[np.uint8], values: NDArray[Any]) -> NDArray[Any]:
    """Return the values of codes of 4 bits, two in a byte, the first in the low nibble: [n, B] to [n, 2 B].

    `values` are 16 numbers of one byte each.
    """
    return np.take(_nibble_pairs(values.tobytes()), packed, mode="clip").view(values.dtype)


@cache
def _nibble_pairs(values: bytes) -> NDArray[np.uint16]:
    """Return the two values that each byte stands for, as one number that is moved at once."""
    table = np.frombuffer(values, np.uint8)
    codes = np.arange(256)
    return np.ascontiguousarray(np.stack((table[codes & 15], table[codes >> 4]), axis=-1)).view(np.uint16).ravel()


def unpack(packed: NDArray[np.uint8], bits: int, count: int, *, dense: bool = True) -> NDArray[np.uint8]:
    """Return the first `count` codes of each row of bytes, [n, B] to [n, count]; lowest bits first.

    In the dense layout the codes are one stream of bits. Otherwise a word of 32 bits has 32 // `bits` whole codes, and
    its highest bits are unused.
    """
    rows = len(packed)
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    if not dense:
        used = _WORD_BITS // bits * bits
        stream = stream.reshape(rows, -1, _WORD_BITS)[:, :, :used].reshape(rows, -1)
    codes = stream[:, : count * bits].reshape(rows, count, bits)
    whole: NDArray[np.uint8] = (codes << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return whole

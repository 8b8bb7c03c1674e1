"""E4M3 numbers as bytes: group scales times a power of two, where that is exact, and rounding to E4M3.

Multiplying the group scales by 2^k and their common scalar by 2^-k changes no value of the weight. This is how the
parts of one fused Linear get the same scalar.
Source of the format: OCP 8-bit Floating Point 1.0, section 5.
"""

from __future__ import annotations

from math import floor, log2
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ANY_POWER", "exact_powers", "round_to_e4m3", "shift_scale"]

ANY_POWER = (-1024, 1024)
"""The range of powers for scales that are all zero; it exceeds the range between any two float32 numbers."""

_LARGEST = 448
_SMALLEST_EXPONENT = -9  # the smallest subnormal number is 2^-9
_NAN = 0x7F
_OUT_OF_RANGE = 64  # the smallest number times 2^64 is above the largest, and the largest times 2^-64 rounds to zero
_SIGN = 0x80


def exact_powers(scale: bytes) -> tuple[int, int]:
    """Return the smallest and the largest k for which 2^k times every E4M3 number in `scale` is an E4M3 number.

    Every k between the two is exact as well, and 0 is always among them. Signs don't matter, and zeros allow any k. NaN
    is ignored here: the checks of the payload report it.
    """
    magnitudes = {byte & 0x7F for byte in _distinct_bytes(scale)} - {0, _NAN}
    smallest = max((_POWERS[byte][0] for byte in magnitudes), default=ANY_POWER[0])
    largest = min((_POWERS[byte][1] for byte in magnitudes), default=ANY_POWER[1])
    return smallest, largest


def shift_scale(scale: NDArray[np.uint8], power: int) -> NDArray[np.uint8] | None:
    """Return `scale` (the bytes of E4M3 numbers, any shape) times 2^`power`, or None when some product is no E4M3."""
    import numpy as np

    # Beyond these bounds every product but zero is out of E4M3's range; within them float32 holds 2^power.
    factor = np.float32(2.0 ** max(-_OUT_OF_RANGE, min(_OUT_OF_RANGE, power)))
    every = StoredArray(np.arange(256, dtype=np.uint8), DType.F8_E4M3)
    with np.errstate(all="ignore"):
        products = every.numbers * factor
    shifted = StoredArray(round_to_e4m3(products), DType.F8_E4M3)
    exact = (shifted.numbers == products) & ((products == 0) == (every.numbers == 0))
    return np.asarray(shifted.elements[scale]) if exact[scale].all() else None


def round_to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round float32 numbers to E4M3, to nearest, ties to even; beyond its range is its largest number."""
    import numpy as np

    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    normal = (magnitude - np.uint32(120 << 23) + np.uint32(0x7FFFF) + ((magnitude >> 20) & np.uint32(1))) >> 20
    # The last bit of 2^14 as a float32 is 2^-9, the step of subnormal numbers: the addition does the rounding.
    step = np.float32(2.0**14)
    subnormal = (magnitude.view(np.float32) + step).view(np.uint32) - step.view(np.uint32)
    rounded: NDArray[Any] = np.where(magnitude < np.uint32(121 << 23), subnormal, normal)
    rounded = np.where(np.isnan(values), np.uint32(_NAN), np.minimum(rounded, np.uint32(_NAN - 1)))
    codes: NDArray[np.uint8] = (rounded | (bits >> 24) & np.uint32(_SIGN)).astype(np.uint8)
    return codes


def _distinct_bytes(data: bytes) -> set[int]:
    """Return the byte values that occur in `data`.

    One search per byte value stops at its first hit, which is faster than a Python loop over the data.
    """
    return {byte for byte in range(256) if byte in data}


def _powers(byte: int) -> tuple[int, int]:
    """Return the smallest and the largest exact power for the positive E4M3 number with this bit pattern.

    The number is mantissa * 2^exponent with an integer mantissa.
    """
    exponent_field, mantissa = divmod(byte, 8)
    exponent = max(exponent_field, 1) - 10
    mantissa += 8 if exponent_field else 0
    trailing_zeros = (mantissa & -mantissa).bit_length() - 1
    largest = floor(log2(_LARGEST / (mantissa * 2.0**exponent)))
    return _SMALLEST_EXPONENT - exponent - trailing_zeros, largest


_POWERS = {byte: _powers(byte) for byte in range(1, _NAN)}

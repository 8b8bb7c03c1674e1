"""E4M3 group scales times a power of two: which powers are exact, and the scaled values.

Multiplying the group scales by 2^k and their common scalar by 2^-k changes no value of the weight. This is how the
parts of one fused Linear get the same scalar.
Source of the format: OCP 8-bit Floating Point 1.0, section 5.
"""

from __future__ import annotations

from math import floor, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ANY_POWER", "exact_powers", "shift_scale"]

ANY_POWER = (-1024, 1024)
"""The range of powers for scales that are all zero; it exceeds the range between any two float32 numbers."""

_LARGEST = 448
_SMALLEST_EXPONENT = -9  # the smallest subnormal number is 2^-9
_NAN = 0x7F
_OUT_OF_RANGE = 64  # the smallest number times 2^64 is above the largest, and the largest times 2^-64 rounds to zero


def exact_powers(scale: bytes) -> tuple[int, int]:
    """Return the smallest and the largest k for which 2^k times every E4M3 number in `scale` is an E4M3 number.

    Every k between the two is exact as well, and 0 is always among them. Signs don't matter, and zeros allow any k. NaN
    is ignored here: the checks of the payload report it.
    """
    magnitudes = {byte & 0x7F for byte in _distinct_bytes(scale)} - {0, _NAN}
    smallest = max((_POWERS[byte][0] for byte in magnitudes), default=ANY_POWER[0])
    largest = min((_POWERS[byte][1] for byte in magnitudes), default=ANY_POWER[1])
    return smallest, largest


def shift_scale(scale: Tensor, power: int) -> Tensor | None:
    """Return `scale` (float8_e4m3fn, any shape) times 2^`power`, or None when E4M3 can't represent some product."""
    import torch

    # Beyond these bounds every product but zero is out of E4M3's range; within them float32 holds 2^power.
    factor = 2.0 ** max(-_OUT_OF_RANGE, min(_OUT_OF_RANGE, power))
    wide = scale.to(torch.float32) * factor
    shifted = wide.to(torch.float8_e4m3fn)
    exact = torch.equal(shifted.to(torch.float32), wide) and torch.equal(wide == 0, scale.to(torch.float32) == 0)
    return shifted if exact else None


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

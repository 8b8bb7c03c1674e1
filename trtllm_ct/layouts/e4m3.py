"""E4M3 group scales times a power of two: which powers are exact, and the bytes that come out.

A scale that is shifted and a common scalar that is shifted the other way leave every value as it is; that is how the
parts of one Linear get one scalar. Source of the format: OCP 8-bit Floating Point 1.0, section 5.
"""

from __future__ import annotations

from math import floor, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ANY_POWER", "exact_powers", "shift_scale"]

ANY_POWER = (-1024, 1024)
"""The powers that are exact for zeros: more than there are between two float32 numbers."""

_LARGEST = 448
_SMALLEST_EXPONENT = -9  # the subnormal step
_NAN = 0x7F


def exact_powers(scale: bytes) -> tuple[int, int]:
    """The least and the largest k for which every E4M3 number of `scale`, times 2^k, is one again.

    Every k between them is exact too, and 0 is. Signs don't matter, zeros fit any k, and NaN, which nothing fits, is
    left to the checks of the payload.
    """
    present = {byte & 0x7F for byte in _distinct(scale)} - {0, _NAN}
    least = max((_POWERS[byte][0] for byte in present), default=ANY_POWER[0])
    most = min((_POWERS[byte][1] for byte in present), default=ANY_POWER[1])
    return least, most


def shift_scale(scale: Tensor, power: int) -> Tensor | None:
    """float8_e4m3fn of any shape times 2^`power`, or None where some element has no such number."""
    import torch

    # In two steps: a power beyond float32 must end in zero or infinity, and not in NaN.
    half = power // 2
    wide = torch.ldexp(torch.ldexp(scale.to(torch.float32), torch.tensor(half)), torch.tensor(power - half))
    shifted = wide.to(torch.float8_e4m3fn)
    exact = torch.equal(shifted.to(torch.float32), wide) and torch.equal(wide == 0, scale.to(torch.float32) == 0)
    return shifted if exact else None


def _distinct(data: bytes) -> set[int]:
    """The byte values that occur; a search for each of 256 stops at the first hit, and is faster than a loop."""
    return {byte for byte in range(256) if byte in data}


def _powers(byte: int) -> tuple[int, int]:
    """The least and the largest exact power for one positive number: mantissa * 2^exponent, mantissa whole."""
    exponent_field, mantissa = divmod(byte, 8)
    exponent = max(exponent_field, 1) - 10
    mantissa += 8 if exponent_field else 0
    zeros = (mantissa & -mantissa).bit_length() - 1
    most = floor(log2(_LARGEST / (mantissa * 2.0**exponent)))
    return _SMALLEST_EXPONENT - exponent - zeros, most


_POWERS = {byte: _powers(byte) for byte in range(1, _NAN)}

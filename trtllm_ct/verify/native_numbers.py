"""The numbers that the bits of delivered tensors stand for.

`source/numbers.py` does the same for stored tensors; the two share nothing, so that each checks the other.

Sources: OCP 8-bit Floating Point Specification 1.0 for E4M3, OCP Microscaling Formats 1.0 for E8M0 and E2M1, IEEE 754
for the others; a bfloat16 is the upper half of a float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ascending_numbers", "e2m1_pairs_in_e4m3", "float64_of", "powers_of_two"]

_BYTES = np.arange(256, dtype=np.uint64)
_NAN_MAGNITUDE = 0x7F
_E8M0_NAN = 0xFF

# Read as exponent and mantissa of a float16, E4M3 is less by a factor of 2^8: the biases are 7 and 15.
_E4M3 = ((_BYTES & 0x80) << 8 | (_BYTES & 0x7F) << 7).astype(np.uint16).view(np.float16).astype(np.float64) * 2.0**8
_E4M3[_BYTES & 0x7F == _NAN_MAGNITUDE] = np.nan

# The exponent of a float64, with a mantissa of zeros; 2^-127 is a normal float64.
_E8M0 = (_BYTES - 127 + 1023 << 52).view(np.float64)
_E8M0[_E8M0_NAN] = np.nan

# 0, 0.5, 1, 1.5, 2, 3, 4 and 6 in E4M3, then the same with a sign.
_E2M1_IN_E4M3 = np.array([0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C], np.uint16)
_E2M1_IN_E4M3 = np.concatenate((_E2M1_IN_E4M3, _E2M1_IN_E4M3 | 0x80))
_E2M1_PAIRS = (_E2M1_IN_E4M3[:, None] << 8 | _E2M1_IN_E4M3[None, :]).ravel().astype("<u2")


def float64_of(stored: NDArray[Any], dtype: DType) -> NDArray[np.float64]:
    """Return floats in float64, exactly; `stored` are bits where numpy has no such dtype. Any shape."""
    if dtype is DType.F8_E4M3:
        return _E4M3.take(stored)
    if dtype is DType.BF16:
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    return stored.astype(np.float64)


def ascending_numbers(element: Element) -> NDArray[np.float64]:
    """Return the numbers of E4M3 or E2M1 from 0 to the largest."""
    bits = _E2M1_IN_E4M3[:8] if element is Element.E2M1 else np.arange(_NAN_MAGNITUDE)
    return _E4M3.take(bits)


def powers_of_two(exponents: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the powers of two that E8M0 bytes stand for; byte e is 2^(e - 127), and byte 255 is NaN."""
    return _E8M0.take(exponents)


def e2m1_pairs_in_e4m3(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the E4M3 codes of E2M1 codes, two in a byte, the first in the low nibble: [n, B] to [n, 2 B]."""
    return _E2M1_PAIRS.take(packed, mode="clip").view(np.uint8)

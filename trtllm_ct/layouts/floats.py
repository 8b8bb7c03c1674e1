"""Conversion between bit patterns and numbers for E2M1 (FP4) and E2M3 (FP6).

Both have their sign in the highest bit, and neither has an infinity or NaN.
A field is the bit pattern of one number in a uint8; a `Packing` says how fields are packed in a file.
Sources: OCP Microscaling Formats 1.0, section 5.3; compressed-tensors 0.20 `compressors/{nvfp4,mxfp4,mxfp6}/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "E2M1_PACKED",
    "E2M3_PACKED",
    "LARGEST",
    "element_fields",
    "element_values",
]

E2M1_PACKED = Packing(bits=4, container=DType.U8, axis=1, offset_binary=False)
"""NVFP4 and MXFP4: two codes per byte along K, the even column in the low nibble."""

E2M3_PACKED = Packing(bits=6, container=DType.U8, axis=1, offset_binary=False)
"""MXFP6: four codes in three bytes along K, a little-endian stream of bits."""

_E2M1_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Exponent 0 holds the subnormal numbers, in steps of 1/8 below 1; the others are (1 + mantissa/8) * 2^(exponent - 1).
_E2M3_POSITIVE = tuple(
    mantissa / 8 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 1)
    for exponent in range(4)
    for mantissa in range(8)
)
_POSITIVE = {Element.E2M1: _E2M1_POSITIVE, Element.E2M3: _E2M3_POSITIVE}

LARGEST = {Element.E4M3: 448.0, Element.E2M1: 6.0, Element.E2M3: 7.5}
"""The largest number of each small float."""


def element_values(fields: NDArray[np.uint8], element: Element) -> NDArray[np.float32]:
    """Convert uint8 bit patterns of E2M1 or E2M3, any shape, to float32; this is exact."""
    import numpy as np

    positive = _POSITIVE[element]
    return np.array((*positive, *(-value for value in positive)), np.float32).take(fields)


def element_fields(values: NDArray[np.floating], element: Element) -> NDArray[np.uint8]:
    """Convert floats to uint8 bit patterns of E2M1 or E2M3: the inverse of `element_values`.

    All values must be representable: the function does not round, and gives wrong bit patterns for other values.
    -0.0 keeps its sign.
    """
    import numpy as np

    positive = np.array(_POSITIVE[element], np.float32)
    magnitude = np.searchsorted(positive, np.abs(values)).astype(np.uint8)
    fields: NDArray[np.uint8] = magnitude | np.signbit(values).astype(np.uint8) * np.uint8(len(positive))
    return fields

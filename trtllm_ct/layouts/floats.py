"""Conversion between bit patterns and numbers for E2M1 (FP4), E2M3 (FP6) and E8M0 (powers of two).

E2M1 and E2M3 have their sign in the highest bit; E8M0 has neither sign nor mantissa. None of them has an infinity.
A field is the bit pattern of one number in a uint8; a `Packing` says how fields are packed in a file.
Sources: OCP Microscaling Formats 1.0, section 5.3; compressed-tensors 0.20 `compressors/{nvfp4,mxfp4,mxfp6}/`.
"""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "E2M1_PACKED",
    "E2M3_PACKED",
    "element_fields",
    "element_values",
    "power_of_two",
]

E2M1_PACKED = Packing(bits=4, container=DType.U8, axis=1, offset_binary=False)
"""NVFP4 and MXFP4: two codes per byte along K, the even column in the low nibble."""

E2M3_PACKED = Packing(bits=6, container=DType.U8, axis=1, offset_binary=False)
"""MXFP6: four codes in three bytes along K, a little-endian stream of bits."""

_E8M0_BIAS = 127
_E8M0_NAN = 255

_E2M1_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Exponent 0 holds the subnormal numbers, in steps of 1/8 below 1; the others are (1 + mantissa/8) * 2^(exponent - 1).
_E2M3_POSITIVE = tuple(
    mantissa / 8 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 1)
    for exponent in range(4)
    for mantissa in range(8)
)
_POSITIVE = {Element.E2M1: _E2M1_POSITIVE, Element.E2M3: _E2M3_POSITIVE}
_E8M0 = (*(2.0 ** (exponent - _E8M0_BIAS) for exponent in range(_E8M0_NAN)), nan)

_TILE_ELEMENTS = 1 << 20  # torch needs int32 indices: tiles limit them to 4 MiB for a weight of any size


def element_values(fields: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """Convert uint8 bit patterns of E2M1 or E2M3, any shape, to `dtype`, a float of 16 bits or more; this is exact."""
    positive = _POSITIVE[element]
    return _look_up((*positive, *(-value for value in positive)), fields, dtype)


def element_fields(values: Tensor, element: Element) -> Tensor:
    """Convert floats to uint8 bit patterns of E2M1 or E2M3: the inverse of `element_values`.

    All values must be representable: the function does not round, and gives wrong bit patterns for other values.
    -0.0 keeps its sign.
    """
    import torch

    positive = torch.tensor(_POSITIVE[element], dtype=torch.float32, device=values.device)
    magnitude = torch.searchsorted(positive, values.to(torch.float32).abs()).to(torch.uint8)
    return magnitude | values.signbit().to(torch.uint8) * len(positive)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 E8M0 exponents e, any shape, to 2^(e - 127) in `dtype`, float32 or float64; 255 gives NaN."""
    return _look_up(_E8M0, exponent, dtype)


def _look_up(table: tuple[float, ...], fields: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `table[field]` for each field. Peak memory: the result and the indices of one tile."""
    import torch

    numbers = torch.tensor(table, dtype=dtype, device=fields.device)
    flat = fields.flatten()
    values = torch.empty(flat.shape, dtype=dtype, device=fields.device)
    for start in range(0, flat.shape[0], _TILE_ELEMENTS):
        tile = slice(start, start + _TILE_ELEMENTS)
        torch.index_select(numbers, 0, flat[tile].int(), out=values[tile])
    return values.reshape(fields.shape)

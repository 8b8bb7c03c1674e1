"""The small float formats by their bits: E2M1 (FP4), E2M3 (FP6), and powers of two (E8M0).

All of them have a sign bit on top except E8M0, which has neither sign nor mantissa; none has an infinity.
A field is the bit pattern of one number in a uint8; how fields lie in a file is a `Packing`.
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
    "E8M0_BIAS",
    "E8M0_NAN",
    "element_fields",
    "element_values",
    "power_of_two",
]

E2M1_PACKED = Packing(bits=4, container=DType.U8, axis=1, offset_binary=False)
"""Two codes a byte along K, the even column in the low nibble: NVFP4 and MXFP4."""

E2M3_PACKED = Packing(bits=6, container=DType.U8, axis=1, offset_binary=False)
"""Four codes in three bytes along K, a little-endian stream of bits: MXFP6."""

E8M0_BIAS = 127
E8M0_NAN = 255

_E2M1_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Exponent 0 is subnormal: steps of 1/8 below 1; above, 1 + mantissa/8 times a power of two.
_E2M3_POSITIVE = tuple(
    mantissa / 8 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 1)
    for exponent in range(4)
    for mantissa in range(8)
)
_POSITIVE = {Element.E2M1: _E2M1_POSITIVE, Element.E2M3: _E2M3_POSITIVE}
_E8M0 = (*(2.0 ** (exponent - E8M0_BIAS) for exponent in range(E8M0_NAN)), nan)

_TILE_ELEMENTS = 1 << 20  # torch wants indices of 4 bytes: 4 MiB for a tile, however large the weight


def element_values(fields: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """uint8 bit patterns of E2M1 or E2M3, any shape, as values of `dtype`, a float of 16 bits or more; exact."""
    positive = _POSITIVE[element]
    return _look_up((*positive, *(-value for value in positive)), fields, dtype)


def element_fields(values: Tensor, element: Element) -> Tensor:
    """The inverse of `element_values`: floats that are numbers of the element, as uint8 bit patterns.

    Minus zero keeps its sign. Nothing is rounded here: other values have no field and give a wrong one.
    """
    import torch

    positive = torch.tensor(_POSITIVE[element], dtype=torch.float32, device=values.device)
    magnitude = torch.searchsorted(positive, values.to(torch.float32).abs()).to(torch.uint8)
    return magnitude | values.signbit().to(torch.uint8) * len(positive)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 E8M0 exponents e, any shape, as 2^(e - 127) of `dtype`, float32 or float64; 255 is NaN."""
    return _look_up(_E8M0, exponent, dtype)


def _look_up(table: tuple[float, ...], fields: Tensor, dtype: torch.dtype) -> Tensor:
    """`table[field]` of each field. Memory: the result and the indices of a tile."""
    import torch

    numbers = torch.tensor(table, dtype=dtype, device=fields.device)
    flat = fields.flatten()
    values = torch.empty(flat.shape, dtype=dtype, device=fields.device)
    for start in range(0, flat.shape[0], _TILE_ELEMENTS):
        tile = slice(start, start + _TILE_ELEMENTS)
        torch.index_select(numbers, 0, flat[tile].int(), out=values[tile])
    return values.reshape(fields.shape)

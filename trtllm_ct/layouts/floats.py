"""The small float formats by their bits: E2M1 (FP4), E2M3 (FP6), and powers of two (E8M0).

All of them have a sign bit on top except E8M0, which has neither sign nor mantissa; none has an infinity.
Sources: OCP Microscaling Formats 1.0, section 5.3; compressed-tensors 0.20 `compressors/{nvfp4,mxfp4,mxfp6}/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.schemes import Element

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["E8M0_BIAS", "E8M0_NAN", "element_values", "power_of_two"]

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


def element_values(fields: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """uint8 bit patterns of E2M1 or E2M3, any shape, as values of `dtype`, a float of 16 bits or more; exact."""
    import torch

    positive = _POSITIVE[element]
    table = torch.tensor([*positive, *(-value for value in positive)], dtype=dtype, device=fields.device)
    return table[fields.int()]


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 E8M0 exponents e as 2^(e - 127) of `dtype`, float32 or float64; 255 is NaN."""
    import torch

    values = torch.ldexp(torch.ones((), dtype=torch.float64), exponent.int() - E8M0_BIAS)
    return torch.where(exponent == E8M0_NAN, torch.nan, values).to(dtype)

"""Rounding to a narrow float exactly once.

torch converts float64 to bfloat16 and float16 through float32. This rounds twice, and the result is wrong for values
close to the midpoint of two neighbours. Rounding to odd in the intermediate float32 makes the final result correct
(S. Boldo, G. Melquiond: Emulation of FMA and correctly rounded sums, 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["round_once"]


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `values` (float64 or float32, any shape) to `dtype`: to nearest, ties to even, exactly once.

    torch's own conversion rounds once for float32 inputs and for float32 or float64 results, so that these use it.
    """
    import torch

    if values.dtype != torch.float64 or dtype in {torch.float32, torch.float64}:
        return values.to(dtype)
    return _round_to_odd_float32(values).to(dtype)


def _round_to_odd_float32(values: Tensor) -> Tensor:
    """Round float64 to odd float32: exact values stay, others become the neighbour whose last mantissa bit is one.

    Rounding to odd requires at least two more mantissa bits than the final dtype; float32 has these for bfloat16 and
    float16.
    """
    import torch

    nearest = values.to(torch.float32)
    widened = nearest.to(torch.float64)
    even = (nearest.view(torch.int32) & 1) == 0
    inexact = (widened != values) & nearest.isfinite()
    direction = torch.where(values > widened, torch.inf, -torch.inf).to(torch.float32)
    return torch.where(inexact & even, torch.nextafter(nearest, direction), nearest)

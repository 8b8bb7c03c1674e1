"""Rounding to a narrow float exactly once.

torch converts float64 to bfloat16 and float16 through float32, which rounds twice and is wrong for values that lie
close to the middle of two neighbours. Rounding to odd in between makes the second rounding the only one that counts
(S. Boldo, G. Melquiond: Emulation of FMA and correctly rounded sums, 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["round_once"]


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (float64 or float32, any shape) rounded to `dtype`, to nearest, ties to even, exactly once.

    A float32 or float64 result needs no detour; neither does a float32 input.
    """
    import torch

    if values.dtype != torch.float64 or dtype in {torch.float32, torch.float64}:
        return values.to(dtype)
    return _round_to_odd_float32(values).to(dtype)


def _round_to_odd_float32(values: Tensor) -> Tensor:
    """float64 -> float32: exact values stay, others go to the neighbour whose last mantissa bit is one.

    float32 has at least two bits more than bfloat16 and float16, which is what the argument asks for.
    """
    import torch

    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    even = (nearest.view(torch.int32) & 1) == 0
    inexact = (back != values) & nearest.isfinite()
    towards = torch.where(values > back, torch.inf, -torch.inf).to(torch.float32)
    return torch.where(inexact & even, torch.nextafter(nearest, towards), nearest)

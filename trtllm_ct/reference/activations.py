"""What a quantized activation is worth after quantization: the value rounded to float8 and scaled back.

A kernel multiplies the codes and applies the scale to the product; in exact arithmetic that is the same number.
Scales multiply, and a maximum maps to 448, the largest float8_e4m3fn.
Source: TensorRT-LLM `_torch/modules/linear.py`, the FP8 and FP8 rowwise Linear methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FP8_MAX", "quantize_per_tensor", "quantize_per_token", "round_to_fp8"]

FP8_MAX = 448.0


def round_to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """`values` after a trip through float8_e4m3fn, in their own dtype and shape.

    `scale` is a multiplier that broadcasts against `values`: code = round(value / scale), saturated at +-448.
    Where it is zero (a row of zeros), the result is zero.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    scale = scale.to(wide)
    divisor = torch.where(scale == 0, 1, scale)
    # A cast to float8_e4m3fn gives NaN beyond 448, where hardware saturates: clamp first.
    codes = (values.to(wide) / divisor).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.to(wide) * scale).to(values.dtype)


def quantize_per_tensor(values: Tensor, scale: Tensor | None) -> Tensor:
    """Round with one scale for the whole tensor: the checkpoint's, or with None the one that fits `values`."""
    return round_to_fp8(values, values.abs().amax().float() / FP8_MAX if scale is None else scale)


def quantize_per_token(values: Tensor) -> Tensor:
    """Round [..., K] with one scale per row, the one that fits that row."""
    return round_to_fp8(values, values.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX)

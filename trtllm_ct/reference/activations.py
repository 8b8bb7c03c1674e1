"""Simulate quantized activations: round each value to a small float format and scale it back.

A kernel multiplies the codes and applies the scales to the product; in exact arithmetic the result is the same.
All scales are multipliers: value = code * scale. The largest float8_e4m3fn is 448, the largest float4 (E2M1) is 6.
Sources: TensorRT-LLM `_torch/modules/linear.py`, the Linear methods, and `cpp/tensorrt_llm/kernels/quantization.cuh`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FP8_MAX",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_per_block",
    "quantize_per_tensor",
    "quantize_per_token",
    "round_to_e2m1",
    "round_to_fp8",
]

FP8_MAX = 448.0
E2M1_MAX = 6.0
_E8M0_EXPONENT = 127
_BLOCK = 128
_MX_GROUP = 32
_NVFP4_GROUP = 16


def round_to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Quantize `values` to float8_e4m3fn and dequantize them again; dtype and shape stay.

    `scale` is a multiplier that broadcasts against `values`: code = round(value / scale), saturated at +-448.
    Where `scale` is zero, which it is for a row of zeros, it is replaced by one in the division; the result is zero.
    """
    import torch

    wide = torch.promote_types(values.dtype, torch.float32)
    scale = scale.to(wide)
    # A cast to float8_e4m3fn gives NaN beyond 448, where hardware saturates: clamp first.
    codes = (values.to(wide) / _divisor(scale)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.to(wide) * scale).to(values.dtype)


def round_to_e2m1(values: Tensor) -> Tensor:
    """Round each value to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6; keep its sign; saturate at +-6.

    A value halfway between two neighbours goes to the one with the even code: 0.25 to 0, 0.75 to 1, 2.5 to 2, 5 to 4.
    """
    import torch

    magnitude = values.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(values.dtype)
    return ((magnitude / step).round() * step).copysign(values)


def quantize_per_tensor(values: Tensor, scale: Tensor | None) -> Tensor:
    """Round to float8 with one scale for the whole tensor; None computes the scale from the peak of `values`."""
    return round_to_fp8(values, values.abs().amax().float() / FP8_MAX if scale is None else scale)


def quantize_per_token(values: Tensor) -> Tensor:
    """Round [..., K] to float8 with one scale per row, computed from the peak of the row."""
    return round_to_fp8(values, _peak(values) / FP8_MAX)


def quantize_per_block(values: Tensor) -> Tensor:
    """Round [..., K] to float8 with one scale per block of 128 elements in a row; the last block may be shorter."""
    import torch

    return torch.cat([quantize_per_token(block) for block in torch.split(values, _BLOCK, dim=-1)], dim=-1)


def quantize_mxfp8(values: Tensor) -> Tensor:
    """Round [..., K], K a multiple of 32, to float8 with one power-of-two scale per group of 32 elements.

    The scale is the smallest power of two that is not less than peak / 448, so no code saturates
    (`quantization.cuh: cvt_warp_fp16_to_mxfp8` converts peak / 448 to E8M0 and rounds up).
    """
    import torch

    groups = values.reshape(*values.shape[:-1], -1, _MX_GROUP)
    peak = _peak(groups)
    # frexp gives x = mantissa * 2^exponent with 0.5 <= mantissa < 1; a mantissa of 0.5 is a power of two already.
    mantissa, exponent = (peak * (1 / FP8_MAX)).frexp()
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-_E8M0_EXPONENT, _E8M0_EXPONENT)
    # E8M0 can encode NaN but not infinity: a group whose peak is not finite becomes NaN.
    scale = torch.where(peak.isfinite(), torch.ones_like(peak).ldexp(exponent), torch.nan)
    return round_to_fp8(groups, scale).flatten(-2)


def quantize_nvfp4(values: Tensor, input_scale: Tensor) -> Tensor:
    """Round [..., K], K a multiple of 16, to E2M1 with one float8 scale per group of 16 elements.

    `input_scale` has one element and is a multiplier: the calibrated peak / (448 * 6). With s the scale of a group,
    s = e4m3(peak / 6 / input_scale) and the result is e2m1(value / (s * input_scale)) * s * input_scale.
    Where s or `input_scale` is zero, the result is zero.
    """
    import torch

    wide = torch.promote_types(values.dtype, torch.float32)
    groups = values.to(wide).reshape(*values.shape[:-1], -1, _NVFP4_GROUP)
    input_scale = input_scale.to(wide).reshape(())
    group_scale = (_peak(groups) / E2M1_MAX / _divisor(input_scale)).clamp(max=FP8_MAX)
    scale = group_scale.to(torch.float8_e4m3fn).to(wide) * input_scale
    return (round_to_e2m1(groups / _divisor(scale)) * scale).flatten(-2).to(values.dtype)


def _peak(values: Tensor) -> Tensor:
    """The largest magnitude along the last axis, in float32 as in the kernels; that axis is kept with length 1."""
    return values.abs().amax(dim=-1, keepdim=True).float()


def _divisor(scale: Tensor) -> Tensor:
    """The scale with every zero replaced by one, so that dividing by it gives no NaN."""
    import torch

    return torch.where(scale == 0, 1, scale)

"""Imitates `quantization/functional.py` and `_torch/custom_ops/torch_custom_ops.py`: the mixed-type GEMM.

The real layout permutes and interleaves by GPU generation. Here codes only become offset binary, which is enough to
show a weight that skipped the preparation; on SM100 and SM103 they stay signed, as upstream, which only transposes
there. The checks of shapes are the real ones.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tensorrt_llm._double import RELEASE
from torch import Tensor
from torch.nn import functional

__all__ = ["e2m1_values", "e8m0_values", "is_sm100", "mixed_gemm_values", "preprocess_weights_for_mixed_gemm"]


def is_sm100(sm: int = RELEASE.sm) -> bool:
    """Whether kernels of SM100 and SM103 run."""
    return 100 <= sm < 120


def preprocess_weights_for_mixed_gemm(
    tensor: Tensor,
    quant_mode: torch.dtype,
    act_dtype: torch.dtype,
    sm_: int = -1,
    do_weight_interleave: bool = True,
) -> Tensor:
    """Signed codes, int8 [K, N] or int4 pairs [K, N / 2], to what the GEMM reads; asserts on shapes it can't hold."""
    sm = RELEASE.sm if sm_ < 0 else sm_
    is_int4 = quant_mode == torch.quint4x2
    rows = 32 if is_int4 else 16
    if do_weight_interleave and (80 <= sm < 90 or sm >= 120):
        rows = 128 if act_dtype == torch.float8_e4m3fn else 64
    assert tensor.shape[-2] % rows == 0, f"K of {tensor.shape[-2]} must be a multiple of {rows}"
    assert tensor.shape[-1] % 8 == 0, f"the last dimension of {tensor.shape[-1]} must be a multiple of 8"
    return (tensor.contiguous().view(torch.uint8) ^ _offset(is_int4, sm)).view(torch.int8)


def _offset(is_int4: bool, sm: int) -> int:
    """The bits that make signed codes offset binary."""
    if is_sm100(sm):
        return 0
    return 0x88 if is_int4 else 0x80


def mixed_gemm_values(weight: Tensor, quant_mode: torch.dtype) -> Tensor:
    """Codes [K, N] in float32, of what `preprocess_weights_for_mixed_gemm` made."""
    if quant_mode == torch.int8:
        return (weight.view(torch.uint8) ^ _offset(False, RELEASE.sm)).view(torch.int8).float()
    codes = weight.view(torch.uint8) ^ _offset(True, RELEASE.sm) ^ 0x88
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return pairs.float() - 8


def e2m1_values(packed: Tensor) -> Tensor:
    """Two E2M1 numbers per byte along the last dimension, the low nibble first, in float32."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    return table[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()]


def e8m0_values(exponents: Tensor) -> Tensor:
    """Powers of two in float32; 255 is NaN."""
    return exponents.view(torch.float8_e8m0fnu).float()


def finegrained_mixed_dtype_gemm(
    input: Tensor,  # noqa: A002 (the name of the argument)
    weight: Tensor,
    scales: Tensor,
    group_size: int,
    has_zero_point: bool,
    output_dtype: torch.dtype,
    alpha: float | None = None,
    bias: Tensor | None = None,
    zeros: Tensor | None = None,
    fp8_input: bool = False,
) -> Tensor:
    """`input @ (codes * scales + zeros)`, groups along K; `zeros` are additive and of the layout of `scales` [K/g, N].

    Limits are those of `finegrained_mixed_dtype_gemm` upstream: GPU generation, and zeros when they are announced.
    So SM120 and SM121 raise in every release. On SM100 the launcher set `output_op_beta` to 0 until PR #12190 (merged
    2026-03-13), which drops the bias.
    With FP8 inputs, which `fp8_input` stands for, every kernel rounds the product of a code and its scale to e4m3.
    Open upstream: whether zeros that are not announced are read; here they are not.
    """
    if RELEASE.sm > RELEASE.awq_sm_limit:
        raise ValueError(f"SM version must be less than or equal to {RELEASE.awq_sm_limit}, got {RELEASE.sm}")
    assert not has_zero_point or zeros is not None, "Expected 'zeros' tensor when has_zero_point is True"
    values = mixed_gemm_values(weight, torch.quint4x2) * scales.float().repeat_interleave(group_size, dim=0)
    if fp8_input:
        values = values.half().to(torch.float8_e4m3fn).float()
    if has_zero_point and zeros is not None:
        values = values + zeros.float().repeat_interleave(group_size, dim=0)
    output = functional.linear(input.float(), values.T)
    if alpha is not None:
        output = output * alpha
    if is_sm100() and not RELEASE.grouped_bias_on_sm100:
        bias = None
    return output if bias is None else output + bias.float()


def _gemm_of_last_import(*arguments: Any, **named: Any) -> Tensor:
    """Call the GEMM of the release that was imported last: operators are registered once a process."""
    output: Tensor = sys.modules[__name__].finegrained_mixed_dtype_gemm(*arguments, **named)
    return output


# The first call of a `torch.library.custom_op` would import torch's compiler, which takes seconds.
if not hasattr(torch.ops.trtllm, finegrained_mixed_dtype_gemm.__name__):
    _operator = f"trtllm::{finegrained_mixed_dtype_gemm.__name__}"
    torch.library.define(_operator, torch.library.infer_schema(finegrained_mixed_dtype_gemm, mutates_args=()))
    torch.library.impl(_operator, "default", _gemm_of_last_import)

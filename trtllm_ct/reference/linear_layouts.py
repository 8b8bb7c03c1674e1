"""How each algorithm stores a Linear: one table, `LAYOUTS`, with the tensors, the way to a weight and to an input.

A new algorithm is one row and one function.
Axis letters: `N` out, `K` in, `g` group size. Scales multiply. In one expression the product of a code and its own
scale comes first: it is exact wherever both are small floats, so that a weight is rounded once.
Sources: TensorRT-LLM `_torch/modules/linear.py` (main, September 2026) and the exports of ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.reference.activations import (
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_per_block,
    quantize_per_tensor,
    quantize_per_token,
)
from trtllm_ct.reference.rules import WIDE_FLOATS, TensorRule

__all__ = ["BIAS", "LAYOUTS", "LinearLayout", "Tensors", "unpack_column_pairs", "unpack_row_pairs"]

Tensors = Mapping[str, Tensor]

_E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_VALUES = (*_E2M1_SIZES, *(-size for size in _E2M1_SIZES))
_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayout:
    """How one algorithm stores a Linear.

    `dequantize(tensors, dtype)` gives the weight [N, K], computed in `dtype`, which is float32 or float64.
    `quantize_input(x, tensors)` gives the input as the kernel sees it; None when activations stay as they are.
    `group_size` is the one that the format has, None where a checkpoint chooses it or has none.
    """

    tensors: tuple[TensorRule, ...]
    dequantize: Callable[[Tensors, torch.dtype], Tensor]
    quantize_input: Callable[[Tensor, Tensors], Tensor] | None = None
    group_size: int | None = None


def dequantize_rows(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """One code an element (int8 or float8 [N, K]), one scale a row ([N])."""
    return tensors["weight"].to(dtype) * tensors["weight_scale"].to(dtype)[:, None]


def dequantize_tensor(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """One code an element ([N, K]), one scale for all."""
    return tensors["weight"].to(dtype) * tensors["weight_scale"].to(dtype)


def dequantize_blocks(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """One code an element ([N, K]), one scale a block of 128 x 128; blocks at the lower and right edge may be cut."""
    codes, scale = tensors["weight"].to(dtype), tensors["weight_scale"].to(dtype)
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0]
    rows, columns = codes.shape
    return codes * scale.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]


def dequantize_int4_rows(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """Row pairs of int4 codes ([N/2, K]), one scale a row ([N])."""
    return unpack_row_pairs(tensors["weight"]).to(dtype) * tensors["weight_scale"].to(dtype)[:, None]


def dequantize_int4_groups(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """Row pairs of int4 codes ([N/2, K]), one scale for g neighbours along K ([N, K/g])."""
    scale = tensors["weight_scale"].to(dtype)
    return (_in_groups(unpack_row_pairs(tensors["weight"]).to(dtype), scale) * scale[:, :, None]).flatten(1)


def dequantize_int4_groups_with_zero(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """As `dequantize_int4_groups`, plus a `weight_zero` that is added to the scaled code: W = code * scale + zero."""
    zero = tensors["weight_zero"].to(dtype)
    return (_in_groups(dequantize_int4_groups(tensors, dtype), zero) + zero[:, :, None]).flatten(1)


def dequantize_nvfp4(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """Column pairs of E2M1 codes ([N, K/2]), a float8 scale for 16 neighbours ([N, K/16]), a float32 one for all."""
    scale = tensors["weight_scale"].to(dtype)
    codes = _decode_e2m1(tensors["weight"], dtype)
    return (_in_groups(codes, scale) * scale[:, :, None]).flatten(1) * tensors["weight_scale_2"].to(dtype)


def dequantize_mxfp8(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """One float8 code an element ([N, K]), one power of two for 32 neighbours ([N, K/32])."""
    scale = _decode_e8m0(tensors["weight_scale"], dtype)
    return (_in_groups(tensors["weight"].to(dtype), scale) * scale[:, :, None]).flatten(1)


def dequantize_mxfp4(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """Column pairs of E2M1 codes ([N, K/2]), one power of two for 32 neighbours ([N, K/32])."""
    scale = _decode_e8m0(tensors["weight_scale"], dtype)
    return (_in_groups(_decode_e2m1(tensors["weight"], dtype), scale) * scale[:, :, None]).flatten(1)


def unpack_row_pairs(packed: Tensor) -> Tensor:
    """[N/2, K] bytes -> signed int8 codes [N, K]; byte (i, k) is row 2i (low nibble) and row 2i + 1 (high nibble)."""
    # Shifting to the left puts the sign of the low nibble where an arithmetic shift to the right finds it.
    low = (packed.view(torch.uint8) << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=1).flatten(0, 1)


def unpack_column_pairs(packed: Tensor) -> Tensor:
    """[N, K/2] bytes -> 4-bit codes [N, K]; byte (n, i) is column 2i (low nibble) and column 2i + 1 (high nibble)."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def _decode_e2m1(packed: Tensor, dtype: torch.dtype) -> Tensor:
    codes = unpack_column_pairs(packed)
    return torch.tensor(_E2M1_VALUES, dtype=dtype).index_select(0, codes.flatten().int()).view(codes.shape)


def _decode_e8m0(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Byte e -> 2^(e - 127); 255 is NaN."""
    return codes.view(torch.float8_e8m0fnu).to(dtype)


def _in_groups(values: Tensor, per_group: Tensor) -> Tensor:
    """[N, K] -> [N, K/g, g], to meet an entry [N, K/g] for each group."""
    return values.reshape(*per_group.shape, -1)


def _input_per_tensor(x: Tensor, tensors: Tensors) -> Tensor:
    return quantize_per_tensor(x, tensors.get("input_scale"))


def _input_nvfp4(x: Tensor, tensors: Tensors) -> Tensor:
    return quantize_nvfp4(x, tensors["input_scale"])


def _input_alone(quantize: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensors], Tensor]:
    """For activations whose scales come from themselves."""
    return lambda x, _tensors: quantize(x)


_F32 = (DType.F32,)
_U8 = (DType.U8,)
_F8 = (DType.F8_E4M3,)
_INT4_ROW_PAIRS = TensorRule(name="weight", dtypes=(DType.U8, DType.I8), shape=("N/2", "K"))
_INT8_CODES = TensorRule(name="weight", dtypes=(DType.I8,), shape=("N", "K"))
_FP8_CODES = TensorRule(name="weight", dtypes=_F8, shape=("N", "K"))
_FP4_COLUMN_PAIRS = TensorRule(name="weight", dtypes=_U8, shape=("N", "K/2"))
_TENSOR_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=())
_ROW_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=("N",))
_GROUP_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=("N", "K/g"))
_GROUP_ZERO = TensorRule(name="weight_zero", dtypes=_F32, shape=("N", "K/g"))
# The engine's Linear reads the first name, its experts the second; ModelOpt writes a scale of four axes.
_BLOCK_SCALE = TensorRule(
    name="weight_scale",
    alias="weight_scale_inv",
    dtypes=_F32,
    shape=("N//128", "K//128"),
    or_shape=("N//128", "1", "K//128", "1"),
)
_NVFP4_SCALE = TensorRule(name="weight_scale", dtypes=_F8, shape=("N", "K/16"))
_SECOND_SCALE = TensorRule(name="weight_scale_2", dtypes=_F32, shape=())
_MX_SCALE = TensorRule(name="weight_scale", alias="weight_scale_inv", dtypes=_U8, shape=("N", "K/32"))
_INPUT_SCALE = TensorRule(name="input_scale", dtypes=_F32, shape=())
_OPTIONAL_INPUT_SCALE = TensorRule(name="input_scale", dtypes=_F32, shape=(), required=False)
_PRE_QUANT_SCALE = TensorRule(name="pre_quant_scale", dtypes=WIDE_FLOATS, shape=("K",), required=False)
BIAS = TensorRule(name="bias", dtypes=WIDE_FLOATS, shape=("N",))

LAYOUTS: Mapping[QuantAlgo, LinearLayout] = {
    QuantAlgo.W4A16: LinearLayout(tensors=(_INT4_ROW_PAIRS, _ROW_SCALE), dequantize=dequantize_int4_rows),
    QuantAlgo.W4A16_AWQ: LinearLayout(
        tensors=(_INT4_ROW_PAIRS, _GROUP_SCALE, _PRE_QUANT_SCALE), dequantize=dequantize_int4_groups
    ),
    QuantAlgo.W4A16_GPTQ: LinearLayout(
        tensors=(_INT4_ROW_PAIRS, _GROUP_SCALE, _GROUP_ZERO), dequantize=dequantize_int4_groups_with_zero
    ),
    QuantAlgo.W8A16: LinearLayout(tensors=(_INT8_CODES, _ROW_SCALE), dequantize=dequantize_rows),
    QuantAlgo.FP8: LinearLayout(
        tensors=(_FP8_CODES, _TENSOR_SCALE, _OPTIONAL_INPUT_SCALE),
        dequantize=dequantize_tensor,
        quantize_input=_input_per_tensor,
    ),
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: LinearLayout(
        tensors=(_FP8_CODES, _ROW_SCALE),
        dequantize=dequantize_rows,
        quantize_input=_input_alone(quantize_per_token),
    ),
    QuantAlgo.FP8_BLOCK_SCALES: LinearLayout(
        tensors=(_FP8_CODES, _BLOCK_SCALE),
        dequantize=dequantize_blocks,
        quantize_input=_input_alone(quantize_per_block),
        group_size=128,
    ),
    QuantAlgo.NVFP4: LinearLayout(
        tensors=(_FP4_COLUMN_PAIRS, _NVFP4_SCALE, _SECOND_SCALE, _INPUT_SCALE, _PRE_QUANT_SCALE),
        dequantize=dequantize_nvfp4,
        quantize_input=_input_nvfp4,
        group_size=16,
    ),
    QuantAlgo.W4A16_NVFP4: LinearLayout(
        tensors=(_FP4_COLUMN_PAIRS, _NVFP4_SCALE, _SECOND_SCALE, _OPTIONAL_INPUT_SCALE, _PRE_QUANT_SCALE),
        dequantize=dequantize_nvfp4,
        group_size=16,
    ),
    QuantAlgo.MXFP8: LinearLayout(
        tensors=(_FP8_CODES, _MX_SCALE),
        dequantize=dequantize_mxfp8,
        quantize_input=_input_alone(quantize_mxfp8),
        group_size=32,
    ),
    QuantAlgo.W4A16_MXFP4: LinearLayout(
        tensors=(_FP4_COLUMN_PAIRS, _MX_SCALE), dequantize=dequantize_mxfp4, group_size=32
    ),
}

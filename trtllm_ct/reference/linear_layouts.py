"""How each algorithm stores a Linear: the table `LAYOUTS`.

For each algorithm, the table holds the rules for the delivered tensors, the function that decodes the weight and the
function that quantizes the input. A new algorithm needs one row and one function. It is written apart from
`engine/modes.py` on purpose: the reference engine checks what that table leads to.
Axis letters: `N` output features, `K` input features, `g` group size. All scales are multipliers.
Sources: TensorRT-LLM `_torch/modules/linear.py` (main, September 2026) and the exports of ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, FaultCollector, PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.reference.activations import (
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_per_block,
    quantize_per_tensor,
    quantize_per_token,
)
from trtllm_ct.reference.coded_weight import CodedWeight
from trtllm_ct.reference.rules import WIDE_FLOATS, LinearCheck, TensorRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.reference.rules import Header

__all__ = ["LAYOUTS", "LinearLayout", "Tensors", "checked_layout", "unpack_column_pairs", "unpack_row_pairs"]

Tensors = Mapping[str, "Tensor"]

_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_VALUES = (*_E2M1_MAGNITUDES, *(-magnitude for magnitude in _E2M1_MAGNITUDES))
_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayout:
    """How one algorithm stores a Linear.

    `tensors` are the rules for the delivered tensors.
    `decode(tensors)` returns the weight [N, K] as codes and scales; `dequantize` multiplies them.
    `quantize_input(x, tensors)` returns the input as the kernel sees it; None when activations are not quantized.
    `group_size` is the fixed group size of the format; None if the checkpoint chooses it or if there are no groups.
    """

    tensors: tuple[TensorRule, ...]
    decode: Callable[[Tensors], CodedWeight]
    quantize_input: Callable[[Tensor, Tensors], Tensor] | None = None
    group_size: int | None = None

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Return the weight [N, K], computed in `dtype`, which is float32 or float64."""
        return self.decode(tensors).dequantize(dtype)


def decode_rows(tensors: Tensors) -> CodedWeight:
    """Decode int8 or float8 codes [N, K] with one scale per row ([N], or [N, 1] of float8)."""
    return _coded(tensors["weight"], tensors["weight_scale"].reshape(-1, 1))


def decode_tensor(tensors: Tensors) -> CodedWeight:
    """Decode codes [N, K] with one scale for the whole tensor."""
    return _coded(tensors["weight"], tensors["weight_scale"].reshape(1, 1))


def decode_blocks(tensors: Tensors) -> CodedWeight:
    """Decode codes [N, K] with one scale per block of 128 x 128 codes.

    The scale is [ceil(N/128), ceil(K/128)], or the same with four axes, [ceil(N/128), 1, ceil(K/128), 1]. Blocks at the
    lower and right edge may be partial.
    """
    codes, scale = tensors["weight"], tensors["weight_scale"]
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0]
    return CodedWeight(codes=codes, scale=scale.repeat_interleave(_BLOCK, 0)[: len(codes)], width=_BLOCK)


def decode_int4_rows(tensors: Tensors) -> CodedWeight:
    """Decode int4 codes, packed as row pairs [N/2, K], with one scale per row ([N])."""
    return _coded(unpack_row_pairs(tensors["weight"]), tensors["weight_scale"][:, None])


def decode_int4_groups(tensors: Tensors) -> CodedWeight:
    """Decode int4 codes, packed as row pairs [N/2, K], with one scale per group of g codes along K ([N, K/g])."""
    return _coded(unpack_row_pairs(tensors["weight"]), tensors["weight_scale"])


def decode_int4_groups_with_zero(tensors: Tensors) -> CodedWeight:
    """Like `decode_int4_groups`, but add `weight_zero` [N, K/g] to the scaled code: W = code * scale + zero."""
    return replace(decode_int4_groups(tensors), zero=tensors["weight_zero"])


def decode_nvfp4(tensors: Tensors) -> CodedWeight:
    """Decode E2M1 codes, packed as column pairs [N, K/2], with two scales.

    `weight_scale` is one float8 scale per group of 16 codes along K ([N, K/16]); `weight_scale_2` is one float32 scale
    for the whole tensor.
    """
    coded = _coded(_decode_e2m1(tensors["weight"]), tensors["weight_scale"])
    return replace(coded, factor=tensors["weight_scale_2"])


def decode_mxfp8(tensors: Tensors) -> CodedWeight:
    """Decode float8 codes [N, K] with one power-of-two scale per group of 32 codes along K ([N, K/32])."""
    return _coded(tensors["weight"], _e8m0(tensors["weight_scale"]))


def decode_mxfp4(tensors: Tensors) -> CodedWeight:
    """Decode E2M1 codes, packed as column pairs [N, K/2], with one power-of-two scale per 32 codes ([N, K/32])."""
    return _coded(_decode_e2m1(tensors["weight"]), _e8m0(tensors["weight_scale"]))


def unpack_row_pairs(packed: Tensor) -> Tensor:
    """Unpack bytes [N/2, K] to signed int4 codes [N, K] in int8.

    Byte (i, k) holds row 2i in the low nibble and row 2i + 1 in the high nibble.
    """
    import torch

    # The shift to the left moves the sign bit of the low nibble to bit 7; the arithmetic shift back extends the sign.
    low = (packed.view(torch.uint8) << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=1).flatten(0, 1)


def unpack_column_pairs(packed: Tensor) -> Tensor:
    """Unpack bytes [N, K/2] to 4-bit codes [N, K].

    Byte (n, i) holds column 2i in the low nibble and column 2i + 1 in the high nibble.
    """
    import torch

    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def _decode_e2m1(packed: Tensor) -> Tensor:
    """Unpack column pairs [N, K/2] of E2M1 codes to their numbers [N, K] in E4M3, which has them all."""
    import torch

    codes = unpack_column_pairs(packed)
    values = torch.tensor(_E2M1_VALUES).to(torch.float8_e4m3fn).view(torch.uint8)
    return values.index_select(0, codes.flatten().int()).view(torch.float8_e4m3fn).view(codes.shape)


def _e8m0(codes: Tensor) -> Tensor:
    """Return E8M0 bytes as numbers: byte e is 2^(e - 127), byte 255 is NaN."""
    import torch

    return codes.view(torch.float8_e8m0fnu)


def _coded(codes: Tensor, scale: Tensor) -> CodedWeight:
    """Return codes [N, K] with scales [N, G] of groups of equal width."""
    return CodedWeight(codes=codes, scale=scale, width=codes.shape[1] // scale.shape[1])


def _input_per_tensor(x: Tensor, tensors: Tensors) -> Tensor:
    return quantize_per_tensor(x, tensors.get("input_scale"))


def _input_nvfp4(x: Tensor, tensors: Tensors) -> Tensor:
    return quantize_nvfp4(x, tensors["input_scale"])


def _dynamic_input(quantize: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensors], Tensor]:
    """A `quantize_input` for dynamic activation scales: it ignores the delivered tensors."""
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
_ROW_OR_COLUMN_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=("N",), or_shape=("N", "1"))
_GROUP_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=("N", "K/g"))
_GROUP_ZERO = TensorRule(name="weight_zero", dtypes=_F32, shape=("N", "K/g"))
# The engine's Linear reads `weight_scale`, its experts read `weight_scale_inv`. ModelOpt writes a scale of four axes.
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
_BIAS = TensorRule(name="bias", dtypes=WIDE_FLOATS, shape=("N",))

LAYOUTS: Mapping[QuantAlgo, LinearLayout] = {
    QuantAlgo.W4A16: LinearLayout(tensors=(_INT4_ROW_PAIRS, _ROW_SCALE), decode=decode_int4_rows),
    QuantAlgo.W4A16_AWQ: LinearLayout(
        tensors=(_INT4_ROW_PAIRS, _GROUP_SCALE, _PRE_QUANT_SCALE), decode=decode_int4_groups
    ),
    QuantAlgo.W4A16_GPTQ: LinearLayout(
        tensors=(_INT4_ROW_PAIRS, _GROUP_SCALE, _GROUP_ZERO), decode=decode_int4_groups_with_zero
    ),
    # Scales are divided by `weight_scale_2`, and products multiplied by it.
    QuantAlgo.W4A8_AWQ: LinearLayout(
        tensors=(_INT4_ROW_PAIRS, _GROUP_SCALE, _SECOND_SCALE, _INPUT_SCALE, _PRE_QUANT_SCALE),
        decode=decode_int4_groups,
        quantize_input=_input_per_tensor,
    ),
    QuantAlgo.W8A16: LinearLayout(tensors=(_INT8_CODES, _ROW_SCALE), decode=decode_rows),
    QuantAlgo.FP8: LinearLayout(
        tensors=(_FP8_CODES, _TENSOR_SCALE, _OPTIONAL_INPUT_SCALE),
        decode=decode_tensor,
        quantize_input=_input_per_tensor,
    ),
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: LinearLayout(
        tensors=(_FP8_CODES, _ROW_OR_COLUMN_SCALE),
        decode=decode_rows,
        quantize_input=_dynamic_input(quantize_per_token),
    ),
    QuantAlgo.FP8_BLOCK_SCALES: LinearLayout(
        tensors=(_FP8_CODES, _BLOCK_SCALE),
        decode=decode_blocks,
        quantize_input=_dynamic_input(quantize_per_block),
        group_size=128,
    ),
    QuantAlgo.NVFP4: LinearLayout(
        tensors=(_FP4_COLUMN_PAIRS, _NVFP4_SCALE, _SECOND_SCALE, _INPUT_SCALE, _PRE_QUANT_SCALE),
        decode=decode_nvfp4,
        quantize_input=_input_nvfp4,
        group_size=16,
    ),
    QuantAlgo.W4A16_NVFP4: LinearLayout(
        tensors=(_FP4_COLUMN_PAIRS, _NVFP4_SCALE, _SECOND_SCALE, _OPTIONAL_INPUT_SCALE, _PRE_QUANT_SCALE),
        decode=decode_nvfp4,
        group_size=16,
    ),
    QuantAlgo.MXFP8: LinearLayout(
        tensors=(_FP8_CODES, _MX_SCALE),
        decode=decode_mxfp8,
        quantize_input=_dynamic_input(quantize_mxfp8),
        group_size=32,
    ),
    QuantAlgo.W4A16_MXFP4: LinearLayout(tensors=(_FP4_COLUMN_PAIRS, _MX_SCALE), decode=decode_mxfp4, group_size=32),
    QuantAlgo.W4A8_MXFP4_MXFP8: LinearLayout(
        tensors=(_FP4_COLUMN_PAIRS, _MX_SCALE),
        decode=decode_mxfp4,
        quantize_input=_dynamic_input(quantize_mxfp8),
        group_size=32,
    ),
}


def checked_layout(
    headers: Mapping[str, Header],
    *,
    layer: LayerQuantConfig,
    in_features: int,
    out_features: int,
    name: str,
    bias: bool = False,
) -> LinearLayout:
    """Return how the Linear `name` is stored, whose delivered tensors have these headers; no values are read.

    Raises `PlanError` with a fault for every tensor that is missing, surplus, or of a wrong dtype or shape, and for an
    algorithm or group size that the reference engine can't compute.
    """
    layout = _layout_of(layer, name)
    rules = (*layout.tensors, _BIAS) if bias else layout.tensors
    faults = FaultCollector()
    check = LinearCheck(name=name, layer=layer, out_features=out_features, in_features=in_features, faults=faults)
    check.check(headers, rules)
    faults.raise_if_any(PlanError)
    return replace(layout, tensors=rules)


def _layout_of(layer: LayerQuantConfig, name: str) -> LinearLayout:
    """The layout of a layer's algorithm; raises `PlanError` for an unknown algorithm or a wrong group size."""
    layout = LAYOUTS.get(layer.quant_algo)
    if layout is None:
        raise PlanError(
            Fault(
                where=name,
                expected=f"one of {', '.join(LAYOUTS)}",
                found=f"quant_algo {layer.quant_algo}",
                remedy="Give the module an algorithm that the reference engine can compute.",
            )
        )
    if layout.group_size is not None and layer.group_size not in {None, layout.group_size}:
        raise PlanError(
            Fault(
                where=name,
                expected=f"group_size {layout.group_size}, which {layer.quant_algo} always has",
                found=f"group_size {layer.group_size}",
                remedy="Correct group_size in quant_config; the kernels of this algorithm know no other.",
            )
        )
    return layout

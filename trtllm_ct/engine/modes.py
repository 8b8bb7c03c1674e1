"""One table of TensorRT-LLM's quantization modes: all facts about the Linear of each `QuantAlgo`.

Each fact about a mode is a field of its entry in `LINEAR_MODES`, and is written down nowhere else. There are two
deliberate exceptions: `serve/completeness.py` and `reference/linear_layouts.py` list the tensors of each mode again, so
that they can check the results of this table independently. `holdings.py: native_mode` names the mode that a scheme was
made for; that is a fact about schemes, some of which no mode holds.

Sources: TensorRT-LLM `tensorrt_llm/_torch/modules/linear.py` (the load methods of each LinearMethod),
`fused_moe/quantization.py` for experts, `tensorrt_llm/quantization/functional.py` (`preprocess_weights_for_mixed_gemm`,
for the multiples), `_torch/models/modeling_utils.py` (`duplicate_kv_weight`, for repeated K/V heads),
`_torch/modules/attention.py` (for the output of attention) and `quantization/modelopt_config.py` (for aliases).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import auto
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing, QuantAlgo, Strategy
from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.engine.releases import STOCK_1_0, STOCK_1_3
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.releases import Release

__all__ = ["LINEAR_MODES", "MODES_BY_ALGO", "Activations", "LinearMode", "ScaleForm"]


class ScaleForm(StrEnum):
    """How a Linear reads its scales."""

    SCALAR = auto()
    """`weight_scale` float32 []"""
    ROW = auto()
    """`weight_scale` float32 [N]"""
    GROUP = auto()
    """`weight_scale` float32 [N, K / group_size]"""
    BLOCK = auto()
    """`weight_scale` float32 [ceil(N / 128), ceil(K / 128)]"""
    TWO_LEVEL = auto()
    """`weight_scale` e4m3 [N, K / 16] and `weight_scale_2` float32 []"""
    EXPONENT = auto()
    """`weight_scale` uint8 (E8M0) [N, K / 32]"""

    @property
    def dtype(self) -> DType:
        """The dtype of `weight_scale`."""
        return {ScaleForm.TWO_LEVEL: DType.F8_E4M3, ScaleForm.EXPONENT: DType.U8}.get(self, DType.F32)

    @property
    def one_byte(self) -> bool:
        """Whether a scale is one byte; it is then delivered as stored and never widened to float32."""
        return self.dtype is not DType.F32


class Activations(StrEnum):
    """How the input of a Linear is quantized; the values are the words for it in messages."""

    WIDE = "16-bit"
    FP8_STATIC = "fp8 static per tensor"
    FP8_TOKEN = "fp8 dynamic per token"
    FP8_GROUP = "fp8 dynamic per group of 128"
    FP4_LOCAL = "fp4 dynamic per group of 16"
    MX_FP8 = "fp8 dynamic per group of 32"
    OTHER = "of another kind"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMode:
    """What the Linear of one `QuantAlgo` holds, and how the engine treats it.

    Codes and scales:
    `bits` are the accepted code widths; `packing` is the layout of the codes, None for codes that are floats.
    `exact` are the strategies whose scales are delivered unchanged; for those in `widened` scales are repeated, which
    changes no value. `group_sizes` are the group sizes that the kernel accepts; for larger groups scales are repeated.
    `block` is the size of a block as (rows, columns). `zero_point` says whether the mode has additive zeros.

    Inputs:
    `activations` is the kind of activations that the Linear computes on. Schemes with one of `other_activations` are
    held too, with a note. `pre_quant_scale` says that a Linear that is not fused requires a `pre_quant_scale` for its
    input. `input_scale` is the stored tensor that the delivered `input_scale` is made from, None if the Linear reads
    none. `quantizes_attention_output` marks the modes with which attention may write quantized values for `o_proj`.

    Sizes:
    N must be a multiple of `row_multiple` (`fused_row_multiple` if several Linears are fused) and K a multiple of
    `column_multiple`; otherwise the engine's weight preparation asserts or misplaces scales. This applies to each
    rank's slice too. Newer releases slice Linears that are not fused at multiples of `alignment`, and of the group size
    if scales are per group.

    Names in the engine:
    `shared_scalars` are the tensors that must be equal in all parts of a fused Linear; the engine asserts it.
    `read_of_all_experts` are the scalars that every rank reads of all experts. `repeated_with_kv_heads` are the tensors
    that the engine repeats when there are more ranks than K/V heads. `expert_scale_alias` is a second name of an
    expert's `weight_scale` that some releases read. `config_fields` are the keys of the mode's entry in
    `hf_quant_config.json` besides algorithm and group size. `aliases` are other names of the algorithm in that file, in
    lower case.

    Releases:
    `linear_since` and `experts_since` are the first releases whose Linears and routed experts have the mode, None if no
    release has it. `plug_in` marks a mode whose Linear this package adds to an engine.
    """

    algo: QuantAlgo
    element: Element
    bits: frozenset[int]
    packing: Packing | None
    scale: ScaleForm
    exact: frozenset[Strategy]
    widened: frozenset[Strategy] = frozenset()
    group_sizes: tuple[int, ...] = ()
    block: tuple[int, int] | None = None
    zero_point: bool = False

    activations: Activations = Activations.WIDE
    other_activations: frozenset[Activations] = frozenset()
    pre_quant_scale: bool = False
    input_scale: str | None = None
    quantizes_attention_output: bool = False

    row_multiple: int = 1
    fused_row_multiple: int = 1
    column_multiple: int = 1
    alignment: int = 1

    shared_scalars: tuple[str, ...] = ()
    read_of_all_experts: frozenset[str] = frozenset()
    repeated_with_kv_heads: frozenset[str] = frozenset({"weight", "bias"})
    expert_scale_alias: str | None = None
    config_fields: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    linear_since: Release | None = None
    experts_since: Release | None = None
    plug_in: bool = False

    @property
    def codes(self) -> str:
        """The codes in words, such as `int1-4` or `fp8`."""
        widths = "-".join(str(bits) for bits in sorted({min(self.bits), max(self.bits)}))
        return f"{'int' if self.element is Element.INT else 'fp'}{widths}"

    @property
    def entry_group_size(self) -> int | None:
        """The `group_size` in `hf_quant_config.json`, if the mode alone determines it; else None."""
        return self.block[1] if self.block else None

    @property
    def unscaled_attention_output(self) -> bool:
        """Whether attention that writes quantized values has no scale for them, and takes 1."""
        return self.quantizes_attention_output and self.input_scale is None

    @property
    def scales_follow_kv_heads(self) -> bool:
        """Whether scales of K/V heads need no copy for each rank: they are one scalar, or the engine repeats them."""
        return self.scale is ScaleForm.SCALAR or "weight_scale" in self.repeated_with_kv_heads

    def cut_by_rows(self, release: Release) -> bool:
        """Whether a model class of the release can cut this Linear's tensors by rows (`LinearSite.class_cuts`).

        It cuts `weight`, and `weight_scale` with two indices if its first size is the same; other scales are copied. So
        codes must not be packed along the rows, and scales must be one scalar, or have a row for each row of codes.
        """
        if self.packing is not None or self.zero_point:
            return False
        by_row = {ScaleForm.SCALAR, ScaleForm.TWO_LEVEL, ScaleForm.EXPONENT}
        return self.scale in by_row or (self.scale is ScaleForm.ROW and release.takes_scale_columns)

    def scale_shape(self, shape: tuple[int, int], group_size: int | None) -> tuple[int, ...]:
        """Return the shape of `weight_scale` for a weight [N, K] in groups of `group_size`."""
        rows, columns = shape
        match self.scale:
            case ScaleForm.SCALAR:
                return ()
            case ScaleForm.ROW:
                return (rows,)
            case ScaleForm.BLOCK if self.block is not None:
                return -(-rows // self.block[0]), -(-columns // self.block[1])
            case _ if group_size is not None:
                return rows, -(-columns // group_size)
        raise AssertionError(f"{self.algo} has groups, and their size is missing")


_GROUP = frozenset({Strategy.GROUP})
_TENSOR = frozenset({Strategy.TENSOR})
_CHANNEL = frozenset({Strategy.CHANNEL})
_BLOCK = frozenset({Strategy.BLOCK})
_SMALL_GROUPS = frozenset({Strategy.GROUP, Strategy.TENSOR_GROUP})
_UP_TO_4 = frozenset({1, 2, 3, 4})
_UP_TO_8 = frozenset({5, 6, 7, 8})
_ANY_ACTIVATIONS = frozenset(Activations) - {Activations.WIDE}
_ZERO_POINT_FIELDS = ("has_zero_point", "pre_quant_scale")
_NVFP4_SCALARS = ("weight_scale_2", "input_scale")
_WEIGHT_AND_SCALE = frozenset({"weight", "bias", "weight_scale"})

LINEAR_MODES: tuple[LinearMode, ...] = (
    LinearMode(
        algo=QuantAlgo.W4A16_AWQ,
        element=Element.INT,
        bits=_UP_TO_4,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.GROUP,
        exact=_GROUP,
        widened=_TENSOR | _CHANNEL,
        group_sizes=(128, 64),
        pre_quant_scale=True,
        other_activations=_ANY_ACTIVATIONS,
        row_multiple=16,
        fused_row_multiple=16,
        column_multiple=64,
        linear_since=STOCK_1_0,
        config_fields=_ZERO_POINT_FIELDS,
    ),
    LinearMode(
        algo=QuantAlgo.W4A16_GPTQ,
        element=Element.INT,
        bits=_UP_TO_4,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.GROUP,
        exact=_GROUP,
        group_sizes=(128, 64),
        zero_point=True,
        other_activations=_ANY_ACTIVATIONS,
        row_multiple=16,
        fused_row_multiple=16,
        column_multiple=64,
        plug_in=True,
        config_fields=_ZERO_POINT_FIELDS,
    ),
    LinearMode(
        algo=QuantAlgo.W4A16,
        element=Element.INT,
        bits=_UP_TO_4,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.ROW,
        exact=_CHANNEL | _TENSOR,
        other_activations=_ANY_ACTIVATIONS,
        row_multiple=16,
        fused_row_multiple=16,
        column_multiple=64,
        alignment=32,
        linear_since=STOCK_1_0,
    ),
    LinearMode(
        algo=QuantAlgo.W8A16,
        element=Element.INT,
        bits=_UP_TO_8,
        packing=INT8_PLAIN,
        scale=ScaleForm.ROW,
        exact=_CHANNEL | _TENSOR,
        other_activations=_ANY_ACTIVATIONS,
        row_multiple=16,
        fused_row_multiple=16,
        column_multiple=64,
        alignment=16,
        linear_since=STOCK_1_0,
        experts_since=STOCK_1_0,
    ),
    LinearMode(
        algo=QuantAlgo.FP8,
        element=Element.E4M3,
        bits=frozenset({8}),
        packing=None,
        scale=ScaleForm.SCALAR,
        exact=_TENSOR,
        activations=Activations.FP8_STATIC,
        quantizes_attention_output=True,
        linear_since=STOCK_1_0,
        experts_since=STOCK_1_0,
        input_scale="input_scale",
        read_of_all_experts=frozenset({"weight_scale", "input_scale"}),
    ),
    LinearMode(
        algo=QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
        element=Element.E4M3,
        bits=frozenset({8}),
        packing=None,
        scale=ScaleForm.ROW,
        exact=_CHANNEL | _TENSOR,
        activations=Activations.FP8_TOKEN,
        # A static input scale is dropped if the weight has row scales. A weight with a single scale and a static input
        # scale belongs to mode FP8.
        other_activations=frozenset({Activations.FP8_STATIC}),
        linear_since=STOCK_1_0,
        quantizes_attention_output=True,
    ),
    LinearMode(
        algo=QuantAlgo.FP8_BLOCK_SCALES,
        element=Element.E4M3,
        bits=frozenset({8}),
        packing=None,
        scale=ScaleForm.BLOCK,
        exact=_BLOCK,
        block=(128, 128),
        activations=Activations.FP8_GROUP,
        quantizes_attention_output=True,
        fused_row_multiple=128,
        alignment=128,
        linear_since=STOCK_1_0,
        experts_since=STOCK_1_0,
        aliases=("fp8_pb_wo",),
        expert_scale_alias="weight_scale_inv",
    ),
    LinearMode(
        algo=QuantAlgo.NVFP4,
        element=Element.E2M1,
        bits=frozenset({4}),
        packing=None,
        scale=ScaleForm.TWO_LEVEL,
        exact=_SMALL_GROUPS,
        group_sizes=(16,),
        activations=Activations.FP4_LOCAL,
        quantizes_attention_output=True,
        column_multiple=16,
        alignment=32,
        linear_since=STOCK_1_0,
        experts_since=STOCK_1_0,
        input_scale="input_global_scale",
        shared_scalars=_NVFP4_SCALARS,
        read_of_all_experts=frozenset(_NVFP4_SCALARS),
        repeated_with_kv_heads=_WEIGHT_AND_SCALE,
    ),
    LinearMode(
        algo=QuantAlgo.W4A16_NVFP4,
        element=Element.E2M1,
        bits=frozenset({4}),
        packing=None,
        scale=ScaleForm.TWO_LEVEL,
        exact=_SMALL_GROUPS,
        group_sizes=(16,),
        column_multiple=16,
        alignment=32,
        linear_since=STOCK_1_3,
        experts_since=STOCK_1_3,
        shared_scalars=_NVFP4_SCALARS,
        repeated_with_kv_heads=_WEIGHT_AND_SCALE,
    ),
    LinearMode(
        algo=QuantAlgo.W4A16_MXFP4,
        element=Element.E2M1,
        bits=frozenset({4}),
        packing=None,
        scale=ScaleForm.EXPONENT,
        exact=_GROUP,
        group_sizes=(32,),
        other_activations=_ANY_ACTIVATIONS,
        row_multiple=128,
        column_multiple=128,
        alignment=32,
        experts_since=STOCK_1_0,
        expert_scale_alias="weight_scale_inv",
    ),
    LinearMode(
        algo=QuantAlgo.MXFP8,
        element=Element.E4M3,
        bits=frozenset({8}),
        packing=None,
        scale=ScaleForm.EXPONENT,
        exact=_GROUP,
        group_sizes=(32,),
        activations=Activations.MX_FP8,
        column_multiple=32,
        alignment=32,
        linear_since=STOCK_1_3,
        experts_since=STOCK_1_3,
        expert_scale_alias="weight_scale_inv",
    ),
)

MODES_BY_ALGO: Mapping[QuantAlgo, LinearMode] = {mode.algo: mode for mode in LINEAR_MODES}

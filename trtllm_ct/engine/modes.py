"""One table of TensorRT-LLM's quantization modes: all facts about the Linear of each `QuantAlgo`.

Each fact about a mode is a field of its entry in `LINEAR_MODES`, and is written down nowhere else. The
exceptions are deliberate: `serve/completeness.py` and `reference/linear_layouts.py` list the tensors of each mode
again, and `verify/native_layouts.py` decodes them again, so that they can check the results of this table
independently. `holdings.py: native_mode` names the mode that a scheme was made for; that is a fact about schemes, some
of which no mode holds.

Sources: TensorRT-LLM `tensorrt_llm/_torch/modules/linear.py` (the load methods of each LinearMethod),
`fused_moe/quantization.py` for experts, `_torch/models/modeling_utils.py` (`duplicate_kv_weight`, for repeated K/V
heads), `_torch/modules/attention.py` (for the output of attention) and `quantization/modelopt_config.py` (for aliases).
The sizes and dtypes that a kernel accepts, and the SMs that it runs on, are in C++ files below `cpp/tensorrt_llm/`; the
entry of each mode names its file with the commit that was read. The dtypes that experts take are those of
`_QUANT_SUPPORT_TABLE` in `_torch/modules/fused_moe/fused_moe_cutlass.py` (2026), and the same in earlier releases:
`thop/moeOp.cpp: FusedMoeRunner` (01503f55), whose output is half or bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, QuantAlgo, Strategy
from trtllm_ct.engine.linear_mode import Activations, LinearMode, ScaleForm
from trtllm_ct.engine.releases import STOCK_1_0, STOCK_1_2, STOCK_1_3
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.releases import Release

__all__ = ["LINEAR_MODES", "MODES_BY_ALGO", "Activations", "LinearMode", "ScaleForm"]

_GROUP = frozenset({Strategy.GROUP})
_TENSOR = frozenset({Strategy.TENSOR})
_CHANNEL = frozenset({Strategy.CHANNEL})
_BLOCK = frozenset({Strategy.BLOCK})
_SMALL_GROUPS = frozenset({Strategy.GROUP, Strategy.TENSOR_GROUP})
_UP_TO_4 = frozenset({1, 2, 3, 4})
_UP_TO_8 = frozenset({5, 6, 7, 8})
_BFLOAT16 = frozenset({DType.BF16})
_ANY_ACTIVATIONS = frozenset(Activations) - {Activations.WIDE}
_ZERO_POINT_FIELDS = ("has_zero_point", "pre_quant_scale")
_NVFP4_SCALARS = ("weight_scale_2", "input_scale")
_WEIGHT_AND_SCALE = frozenset({"weight", "bias", "weight_scale"})
# Facts about kernels that several modes share.
# `FinegrainedMixedDtypeGemm.MAX_SUPPORTED_SM_VERSION` in `_torch/custom_ops/torch_custom_ops.py` was 90 in late 2025
# and is 103 since; a larger SM raises ValueError.
_FINE_GRAINED_ON: Mapping[int, Release | None] = {100: STOCK_1_2, 120: None}
# The launcher for SM100 had `output_op_beta=0.0` until pull request 12190 (merged 2026-03-13).
_FINE_GRAINED_BIAS_ON = {100: STOCK_1_3}
# Pull request 10190 (January 2026) brought weight-only int8 and int4 with one scale per row to SM100.
_PER_ROW_ON: Mapping[int, Release | None] = {100: STOCK_1_2}
# `WeightOnlyQuantLinearMethod.apply` dropped the bias until pull request 12317 (merged 2026-03-18).
_PER_ROW_BIAS = STOCK_1_3
# `dispatchToArch` in `kernels/cutlass_kernels/fp4_gemm/fp4_gemm_template.h` has NVFP4 for SM100 and SM120, and MXFP4
# with MXFP8 for SM100 only. The SMs of experts are those of CUTLASS, which stock chooses: `_QUANT_SUPPORT_TABLE` in
# `_torch/modules/fused_moe/fused_moe_cutlass.py` (2026).
_BLACKWELL: Mapping[int, Release | None] = {89: None, 90: None}
_SM100_ONLY: Mapping[int, Release | None] = {89: None, 90: None, 120: None}

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
        # thop/finegrained_mixed_dtype_gemm_thop.cpp (2224d7dd) calls fpA_intB_gemm_template.h (03cff08f:
        # `generic_mixed_gemm_kernelLauncher`): K % 64, groups of 64 or 128. `preprocess_weights_for_mixed_gemm` in
        # quantization/functional.py: K % 64, N % 16. Activations: half or bfloat16 (the first file,
        # `finegrainedMixedDtypeGemmRunner`), and float8 with an output of these two.
        column_multiple=64,
        linear_since=STOCK_1_0,
        linear_on=_FINE_GRAINED_ON,
        bias_on=_FINE_GRAINED_BIAS_ON,
        config_fields=_ZERO_POINT_FIELDS,
    ),
    LinearMode(
        algo=QuantAlgo.W4A16_GPTQ,
        element=Element.INT,
        bits=_UP_TO_4,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.GROUP,
        exact=_GROUP,
        widened=_TENSOR | _CHANNEL,
        group_sizes=(128, 64),
        zero_point=True,
        other_activations=_ANY_ACTIVATIONS,
        row_multiple=16,
        fused_row_multiple=16,
        # The same GEMM as that of W4A16_AWQ.
        column_multiple=64,
        plug_in=True,
        linear_on=_FINE_GRAINED_ON,
        bias_on=_FINE_GRAINED_BIAS_ON,
        config_fields=_ZERO_POINT_FIELDS,
    ),
    # Where W4A8_AWQ rounds: below `cutlass_extensions/include/cutlass_extensions/gemm/` each product of a code and its
    # scale becomes e4m3 before it is multiplied, in `threadblock/dq_mma_multistage_finegrained.h` (3bbed0ec: SM89,
    # Linears and experts), in `collective/sm90_mma_interleaved_tma_gmma_rs_warpspecialized_mixed_input.hpp` (1bced696:
    # Linears on SM90) and in `collective/sm100_mma_warpspecialized_mixed_input.hpp` (4d942aa2: Linears on SM100). Only
    # `collective/sm90_mma_array_tma_gmma_rs_warpspecialized_mixed_input_.hpp` (0193dbd4, 89fd9b74: experts on SM90)
    # multiplies the float32 sums of each group of codes by its scale.
    LinearMode(
        algo=QuantAlgo.W4A8_AWQ,
        element=Element.INT,
        bits=_UP_TO_4,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.GROUP,
        exact=_GROUP,
        widened=_TENSOR | _CHANNEL,
        group_sizes=(128,),
        # fused_moe/quantization.py: WInt4AFP8FusedMoEMethod.load_quant_scales casts scales to bfloat16, divides them by
        # `weight_scale_2`, and casts `input_scale`, each expert's own, to the model's dtype.
        scale_dtypes=frozenset({DType.BF16}),
        unit_scalars=("weight_scale_2",),
        activations=Activations.FP8_STATIC,
        pre_quant_scale=True,
        input_scale="input_scale",
        note="the engine rounds input scales to the model's dtype",
        # WInt4AFP8FusedMoEMethod.create_weights: hidden and intermediate sizes of experts % 128.
        expert_multiple=128,
        # In stock-1.0 it reads another layout only, that of W4A8_CUSTOM: `weight_scale_inv`, and codes that are packed
        # along K.
        experts_since=STOCK_1_2,
        linear_on={120: None},
        linear_rounds_on=frozenset({89, 90, 100}),
        experts_on={100: None, 120: None},
        experts_round_on=frozenset({89}),
        known_sm=True,
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
        # thop/weightOnlyQuantGemm.cpp (16d86d7c: `check_input_dtypes`, half or bfloat16), with the preparation and the
        # tiles of W4A16_AWQ.
        column_multiple=64,
        alignment=32,
        linear_since=STOCK_1_0,
        linear_on=_PER_ROW_ON,
        bias_since=_PER_ROW_BIAS,
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
        # The same GEMM as that of W4A16.
        column_multiple=64,
        alignment=16,
        linear_since=STOCK_1_0,
        linear_on=_PER_ROW_ON,
        bias_since=_PER_ROW_BIAS,
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
        # thop/cublasScaledMM.cpp (0846822a: `cublas_scaled_mm_out`): the strides of weight and output % 16. It and
        # thop/fp8Op.cpp (03cff08f: `e4m3_quantize_helper`) take float32 beside half and bfloat16.
        row_multiple=16,
        fused_row_multiple=16,
        column_multiple=16,
        linear_since=STOCK_1_0,
        experts_since=STOCK_1_0,
        head_since=STOCK_1_3,
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
        # kernels/cutlass_kernels/fp8_rowwise_gemm/fp8_rowwise_gemm_kernel_template_sm90.h (08f1ea31): rows of 16 bytes,
        # so K % 16 for e4m3 and N % 8 for the 16-bit output, which is half or bfloat16 (thop/fp8RowwiseGemm.cpp,
        # 0068d70a: `fp8_rowwise_gemm_dispatch`).
        row_multiple=8,
        fused_row_multiple=8,
        column_multiple=16,
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
        # `FP8BlockScalesLinearMethod.apply` asserts bfloat16 in all releases (ed53795b, 00bbf71e); thop/fp8Quantize.cpp
        # (0401f89f: `fp8_quantize_1x128`) checks it for experts too, and the output is bfloat16.
        dtypes=_BFLOAT16,
        # thop/fp8BlockScalingGemm.cpp (1e9d2162): N % 16 in all five GEMMs; K % 16 in those for SM90 and SM100,
        # K % 128 in `fp8_block_scaling_gemm_ada` (SM89) and `fp8_block_scale_gemm_blackwell_geforce` (SM120).
        row_multiple=16,
        column_multiple=16,
        column_multiple_on={89: 128, 120: 128},
        # The scales of each fused Linear begin at a block of their own.
        fused_row_multiple=128,
        alignment=128,
        linear_since=STOCK_1_0,
        experts_since=STOCK_1_0,
        experts_on={89: None},
        # `_torch/modules/linear.py: FP8BlockScalesLinearMethod.post_load_weights` and `fused_moe/quantization.py:
        # DeepSeekFP8BlockScalesFusedMoEMethodDeepGemm`, for DeepGEMM (`resmooth_to_fp8_e8m0`): `is_sm_100f()` in all
        # releases, and SM120 in the newest text of 118156 characters. Not where a class turns DeepGEMM off, as that of
        # Qwen3-MoE does for attention (`disable_deep_gemm`, `modeling_qwen3_moe.py`, 03441af1).
        requantized_on={100: STOCK_1_0, 120: STOCK_1_3},
        aliases=("fp8_pb_wo",),
        expert_scale_alias="weight_scale_inv",
        class_joins_scales=True,
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
        # thop/fp4Gemm.cpp (05289e8f: `fp4_bmm_impl`): K % 32. Its N % 32 is met by padding after the weights are loaded
        # (`NVFP4LinearMethod.post_load_weights`); padded columns would not match those of the input.
        # thop/fp4Quantize.cpp (140f18ea: `fp4_quantize`) takes half and bfloat16.
        column_multiple=32,
        alignment=32,
        linear_since=STOCK_1_0,
        experts_since=STOCK_1_0,
        head_since=STOCK_1_3,
        linear_on=_BLACKWELL,
        experts_on=_BLACKWELL,
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
        # kernels/weightOnlyBatchedGemv/cudaCoreGemmW4A16NVFP4.cu (2026: `cudaCoreGemmDispatcher`): K % 32 on SM120.
        # Other GPUs dequantize groups of 16, to half or bfloat16. Its N % 2 is met by padding, as that of NVFP4.
        # Marlin, the first choice on SM120, takes bfloat16 only (thop/marlinNvfp4MM.cpp, 0cb82b2e).
        linear_dtypes_on={120: _BFLOAT16},
        column_multiple=16,
        column_multiple_on={120: 32},
        alignment=32,
        linear_since=STOCK_1_3,
        experts_since=STOCK_1_3,
        head_since=STOCK_1_3,
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
        # fused_moe/quantization.py: hidden and intermediate sizes of experts % 128.
        column_multiple=32,
        expert_multiple=128,
        alignment=32,
        experts_since=STOCK_1_0,
        experts_on={89: None, 100: None, 120: None},
        known_sm=True,
        expert_scale_alias="weight_scale_inv",
    ),
    LinearMode(
        algo=QuantAlgo.W4A8_MXFP4_MXFP8,
        element=Element.E2M1,
        bits=frozenset({4}),
        packing=None,
        scale=ScaleForm.EXPONENT,
        exact=_GROUP,
        group_sizes=(32,),
        activations=Activations.MX_FP8,
        other_activations=frozenset(Activations) - {Activations.MX_FP8},
        # thop/fp4Gemm.cpp (05289e8f: `fp4_bmm_impl`): N % 32 and K % 32, and nothing pads this weight.
        # thop/mxFp8Quantize.cpp (03645521: `mxfp8_quantize`) takes half and bfloat16, for MXFP8 too.
        row_multiple=32,
        fused_row_multiple=32,
        column_multiple=32,
        # fused_moe/quantization.py: hidden and intermediate sizes of experts % 128.
        expert_multiple=128,
        alignment=32,
        linear_since=STOCK_1_2,
        experts_since=STOCK_1_2,
        linear_on=_SM100_ONLY,
        experts_on=_BLACKWELL,
        known_sm=True,
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
        # thop/mxfp8Gemm.cpp (22de8b34: `mxfp8_mxfp8_gemm`): N % 32 and K % 32 on SM100. GPUs without this GEMM
        # dequantize the weight, whatever its rows.
        row_multiple=32,
        fused_row_multiple=32,
        column_multiple=32,
        alignment=32,
        linear_since=STOCK_1_3,
        experts_since=STOCK_1_3,
        experts_on=_SM100_ONLY,
        expert_scale_alias="weight_scale_inv",
    ),
)

MODES_BY_ALGO: Mapping[QuantAlgo, LinearMode] = {mode.algo: mode for mode in LINEAR_MODES}

"""The quantization modes of an engine-build checkpoint, the directory that `trtllm-build` reads, as one table.

The TensorRT backend of TensorRT-LLM (every release up to 1.2.1) has other layers than its PyTorch backend, so the same
`QuantAlgo` has other tensors, names and sizes there. An entry has every tensor of a Linear, in the form in which the
file holds it: before the load hook of `PretrainedModel.from_checkpoint` permutes, renames or derives anything.

Source: TensorRT-LLM `tensorrt_llm/models/modeling_utils.py` (`preprocess_weights`), `quantization/layers.py`,
`quantization/functional.py`, `quantization/quantize.py`, `quantization/mode.py` and `models/llama/convert.py`
(0afa06ab); ModelOpt `torch/export/postprocess.py` (5a4242fa). What is marked derived follows from that source, and no
converter of TensorRT-LLM writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, QuantAlgo, Strategy
from trtllm_ct.engine.build_mode import BuildMode, BuildTensor, Content, Extent, Inputs, RowBias, inputs_of
from trtllm_ct.layouts.mixed_gemm import KernelOrder
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trtllm_ct.engine.holdings import Weight

__all__ = [
    "AWQ_WITH_ZEROS",
    "BUILD_MODES",
    "KERNEL_SMS",
    "UNTESTED",
    "W4A16_AWQ",
    "kernel_modes",
    "mode_of",
    "refusal_of",
]

_UP_TO_4 = frozenset({1, 2, 3, 4})
_UP_TO_8 = frozenset({5, 6, 7, 8})
_EIGHT = frozenset({8})
_ROWS = frozenset({Strategy.CHANNEL, Strategy.TENSOR})
_WIDE = frozenset({Inputs.WIDE})
_WEIGHT = "weight"
_SCALE = "weights_scaling_factor"
_SCALE_2 = "weights_scaling_factor_2"
_INPUT = "activation_scaling_factor"
_PREQUANT = BuildTensor(name="prequant_scaling_factor", content=Content.ONES, extent=Extent.COLUMNS, dtype=None)


def _codes(dtype: DType, *, transposed: bool = False) -> BuildTensor:
    return BuildTensor(name=_WEIGHT, content=Content.CODES, extent=Extent.MATRIX, dtype=dtype, transposed=transposed)


def _scalar(name: str, content: Content) -> BuildTensor:
    return BuildTensor(name=name, content=content, extent=Extent.SCALAR, dtype=DType.F32)


_ZERO = BuildTensor(name="zero", content=Content.ZERO, extent=Extent.MATRIX, dtype=None, transposed=True)
_GROUP_SCALE = BuildTensor(name=_SCALE, content=Content.SCALE, extent=Extent.MATRIX, dtype=DType.F32)
W4A16_AWQ = BuildMode(
    algo=QuantAlgo.W4A16_AWQ,
    element=Element.INT,
    bits=_UP_TO_4,
    strategies=_ROWS | {Strategy.GROUP},
    inputs=_WIDE,
    packing=INT4_ROW_PAIRS,
    group_sizes=(128, 64),
    multiple=64,
    pre_quant_scale=True,
    row_bias=RowBias.ZEROED_BY_LOADER,
    mixes=True,
    casts_scales=True,
    tensors=(_codes(DType.I8), _GROUP_SCALE, _PREQUANT),
)
AWQ_WITH_ZEROS = BuildMode(
    algo=QuantAlgo.W4A16_AWQ,
    element=Element.INT,
    bits=_UP_TO_4,
    strategies=_ROWS | {Strategy.GROUP},
    inputs=_WIDE,
    packing=INT4_ROW_PAIRS,
    group_sizes=(128, 64),
    zero_points=frozenset({True}),
    multiple=64,
    has_zero_point=True,
    row_bias=RowBias.ZEROED_BY_LOADER,
    mixes=True,
    casts_scales=True,
    derived="W4A16_AWQ with zero points and without pre_quant_scale",
    tensors=(_codes(DType.I8), _GROUP_SCALE, _ZERO),
)
BUILD_MODES: tuple[BuildMode, ...] = (
    W4A16_AWQ,
    AWQ_WITH_ZEROS,
    BuildMode(
        algo=QuantAlgo.W8A16,
        element=Element.INT,
        bits=_UP_TO_8,
        strategies=_ROWS,
        inputs=_WIDE,
        packing=INT8_PLAIN,
        multiple=64,
        plain_int8=True,
        derived="W8A16 without the plug-in, in which the engine dequantizes int8 weights natively",
        tensors=(
            _codes(DType.I8, transposed=True),
            BuildTensor(name="per_channel_scale", content=Content.SCALE, extent=Extent.ROWS, dtype=None),
        ),
    ),
    BuildMode(
        algo=QuantAlgo.FP8,
        element=Element.E4M3,
        bits=_EIGHT,
        strategies=frozenset({Strategy.TENSOR}),
        inputs=frozenset({Inputs.FP8_STATIC}),
        mixes=True,
        requantizes=True,
        tensors=(
            _codes(DType.F8_E4M3),
            _scalar(_SCALE, Content.SCALE),
            _scalar(_INPUT, Content.INPUT_SCALE),
        ),
    ),
    BuildMode(
        algo=QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
        element=Element.E4M3,
        bits=_EIGHT,
        strategies=_ROWS,
        inputs=frozenset({Inputs.FP8_TOKEN}),
        swaps_modules=True,
        tensors=(
            _codes(DType.F8_E4M3),
            BuildTensor(name="per_channel_scale", content=Content.SCALE, extent=Extent.ROWS, dtype=DType.F32),
        ),
    ),
    BuildMode(
        algo=QuantAlgo.W8A8_SQ_PER_CHANNEL,
        element=Element.INT,
        bits=_UP_TO_8,
        strategies=_ROWS,
        inputs=frozenset({Inputs.INT8_STATIC}),
        mixes=True,
        packing=INT8_PLAIN,
        tensors=(
            _codes(DType.I8),
            BuildTensor(name=_SCALE, content=Content.SCALE, extent=Extent.ROWS, dtype=DType.F32),
            _scalar(_INPUT, Content.INPUT_SCALE),
            _PREQUANT,
        ),
    ),
    BuildMode(
        algo=QuantAlgo.W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN,
        element=Element.INT,
        bits=_UP_TO_8,
        strategies=_ROWS,
        inputs=frozenset({Inputs.INT8_TOKEN}),
        packing=INT8_PLAIN,
        swaps_modules=True,
        norm_scale="scale_to_int",
        tensors=(
            _codes(DType.I8),
            BuildTensor(
                name="per_channel_scale", content=Content.SCALE, extent=Extent.ROWS, dtype=DType.F32, leading=True
            ),
            BuildTensor(
                name="smoother",
                content=Content.ONES,
                extent=Extent.COLUMNS,
                dtype=DType.F32,
                leading=True,
                row_parallel=True,
            ),
        ),
    ),
    BuildMode(
        algo=QuantAlgo.NVFP4,
        element=Element.E2M1,
        bits=frozenset({4}),
        strategies=frozenset({Strategy.GROUP, Strategy.TENSOR_GROUP}),
        inputs=frozenset({Inputs.FP4_LOCAL}),
        mixes=True,
        two_level=True,
        group_sizes=(16,),
        tensors=(
            _codes(DType.U8),
            BuildTensor(name=_SCALE, content=Content.SCALE, extent=Extent.MATRIX, dtype=DType.F8_E4M3),
            _scalar(_SCALE_2, Content.GLOBAL_SCALE),
            _scalar(_INPUT, Content.INPUT_SCALE),
        ),
    ),
)
"""Every mode whose file does not depend on the GPU of the machine that builds or runs the engine."""


UNTESTED = "--i-know-this-is-untested"
"""The option of the command line without which no file is written in the order of a kernel."""

_BUNDLES: Mapping[int, Mapping[int, int]] = {80: {4: 4, 8: 2}, 89: {4: 4, 8: 2}, 90: {4: 1, 8: 1}}
"""By SM and bits of a code: the rows whose tiles follow each other in turn; Hopper's kernel has no such bundles."""

KERNEL_SMS = tuple(_BUNDLES)
"""The SMs whose order of codes is described; the sources disagree about later ones."""


def kernel_modes(sm: int) -> tuple[BuildMode, ...]:
    """Return the modes whose codes are in the order of the kernel on GPUs of an SM, one of `KERNEL_SMS`.

    Converters write such files on a GPU, for that GPU. All weights get zeros, of the value 0 if they are symmetric, as
    these converters write them.
    """
    return (_kernel_mode(QuantAlgo.W4A16_GPTQ, 4, sm), _kernel_mode(QuantAlgo.W8A16_GPTQ, 8, sm))


def _kernel_mode(algo: QuantAlgo, bits: Literal[4, 8], sm: int) -> BuildMode:
    return BuildMode(
        algo=algo,
        element=Element.INT,
        bits=_UP_TO_4 if bits == 4 else _UP_TO_8,
        strategies=_ROWS | {Strategy.GROUP},
        inputs=_WIDE,
        packing=INT4_ROW_PAIRS if bits == 4 else INT8_PLAIN,
        group_sizes=(128, 64),
        zero_points=frozenset({False, True}),
        order=KernelOrder(bits=bits, bundle=_BUNDLES[sm][bits]),
        sm=sm,
        multiple=64,
        has_zero_point=True,
        row_bias=RowBias.ZEROED_IN_FILE,
        derived=f"{algo} in the order of the kernel on SM{sm}, made without such a GPU",
        tensors=(
            BuildTensor(name=_WEIGHT, content=Content.CODES, extent=Extent.MATRIX, dtype=None, kernel_order=True),
            BuildTensor(name=_SCALE, content=Content.SCALE, extent=Extent.MATRIX, dtype=None, transposed=True),
            _ZERO,
        ),
    )


def mode_of(weight: Weight, modes: Sequence[BuildMode]) -> BuildMode | None:
    """Return the first of some modes that holds a weight exactly, None if there is none; see `refusal_of`."""
    return next((mode for mode in modes if mode.holds(weight)), None)


_NO_INPUTS = "no layer of the engine computes with such weights on"
_FOR_ONE_GENERATION = f"its files serve one generation of GPUs, and need --sm and {UNTESTED}"
_REFUSALS: tuple[tuple[Callable[[Weight], bool], str], ...] = (
    (
        lambda weight: weight.permuted,
        "its groups are not contiguous (g_idx), and no kernel of engines has a group index",
    ),
    (lambda weight: weight.exponent_scale, "engines have no MX mode: the quantization pass has no layer for it"),
    (
        lambda weight: weight.args.strategy is Strategy.BLOCK,
        "engines have no FP8 mode with blocks: the quantization pass has no layer for FP8_BLOCK_SCALES",
    ),
    (
        lambda weight: weight.two_level and inputs_of(weight.scheme) is Inputs.WIDE,
        "NVFP4 Linears of engines need a static input_global_scale, and this weight has none",
    ),
    (
        lambda weight: any(mode.holds(weight) for mode in kernel_modes(KERNEL_SMS[0])),
        f"int8 weights with groups or zero points exist as W8A16_GPTQ only: {_FOR_ONE_GENERATION}",
    ),
    (
        lambda weight: (
            weight.element is Element.INT and weight.args.num_bits <= 4 and inputs_of(weight.scheme) is not Inputs.WIDE
        ),
        "W4A8_AWQ needs a static scale of the input and a second scale of the weight, which only calibration gives",
    ),
    (
        lambda weight: (
            weight.element is Element.INT and weight.has_zero_point and inputs_of(weight.scheme) is not Inputs.WIDE
        ),
        "int8 weights of layers with int8 inputs are symmetric",
    ),
    (
        lambda weight: weight.element is Element.INT and weight.args.group_size is not None,
        "the groupwise kernels of engines have groups of 64 and 128 columns only",
    ),
)
"""Why no mode holds a weight: the first reason whose test is true."""


def refusal_of(weight: Weight) -> str:
    """Return why no mode holds a weight."""
    reason = next((reason for test, reason in _REFUSALS if test(weight)), None)
    if reason is not None:
        return reason
    args = weight.scheme.input_activations
    return f"{_NO_INPUTS} {args.label() if args else '16-bit'} inputs"

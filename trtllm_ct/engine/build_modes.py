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

from dataclasses import dataclass
from enum import auto
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, NumberType, QuantAlgo, QuantScheme, Strategy
from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.engine.holdings import Weight

__all__ = [
    "AWQ_WITH_ZEROS",
    "BUILD_MODES",
    "W4A16_AWQ",
    "BuildMode",
    "BuildTensor",
    "Content",
    "Extent",
    "Inputs",
    "inputs_of",
    "mode_of",
    "refusal_of",
]


class Content(StrEnum):
    """What a tensor of a Linear holds."""

    CODES = auto()
    SCALE = auto()
    ZERO = auto()
    """-(zero point) * scale, which is added after scaling."""
    GLOBAL_SCALE = auto()
    """The second scale of two-level weights, as a multiplier."""
    INPUT_SCALE = auto()
    """The static scale of the input, as a multiplier: the largest one of all parts of a fused Linear."""
    ONES = auto()
    """A factor of the input that compressed-tensors has folded into other weights already."""


class Extent(StrEnum):
    """What the elements of a tensor belong to; it decides how ranks divide it and how parts are joined."""

    MATRIX = auto()
    """Rows and columns of the weight: parts are joined by rows."""
    ROWS = auto()
    """Rows of the weight: ranks that divide the columns share it."""
    COLUMNS = auto()
    """Columns of the weight: all parts share it, and so do ranks that divide the rows."""
    SCALAR = auto()
    """The whole Linear."""


class Inputs(StrEnum):
    """How a scheme quantizes the input of a Linear."""

    WIDE = auto()
    FP8_STATIC = auto()
    FP8_TOKEN = auto()
    INT8_STATIC = auto()
    INT8_TOKEN = auto()
    FP4_LOCAL = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildTensor:
    """One tensor of a Linear: its local name in the file, and what it holds.

    `dtype` is None for the model's dtype. A `transposed` matrix is [in, out] in the file, or [in / group, out].
    `leading` puts an axis of size 1 before a vector. `row_parallel` marks a tensor that only Linears have whose columns
    the ranks divide.
    """

    name: str
    content: Content
    extent: Extent
    dtype: DType | None
    transposed: bool = False
    leading: bool = False
    row_parallel: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildMode:
    """One mode of an engine, as its checkpoint holds it.

    Weights: `element`, `bits`, `strategies` and `inputs` are the schemes that it holds exactly; `group_sizes` are those
    of its kernels, and scales are repeated for smaller groups. `packing` is the layout of the codes, None for floats.
    `two_level` says that weights have a global scale too, `symmetric` that they have no zero points.
    Sizes: in and out features must be multiples of `multiple` and of the group size, on every rank
    (`quantization/layers.py` rounds its parameters up otherwise, and the check of shapes then fails).
    Configuration: `has_zero_point` and `pre_quant_scale` are keys of `quantization`. `plain_int8` disables the plug-in
    of weight-only Linears. `swaps_modules` says that the quantization pass replaces whole attention, MLP and norm
    modules, so that no single Linear can stay plain; such attention has no norms of queries and keys. `requantizes`
    says that a fused Linear has one scale, which its parts are requantized to. `norm_scale` is a tensor of ones that
    each norm of a layer has. `derived` describes what no converter of TensorRT-LLM writes; empty if one does.
    """

    algo: QuantAlgo
    element: Element
    bits: frozenset[int]
    strategies: frozenset[Strategy]
    inputs: frozenset[Inputs]
    tensors: tuple[BuildTensor, ...]
    packing: Packing | None = None
    group_sizes: tuple[int, ...] = ()
    two_level: bool = False
    symmetric: bool = True
    multiple: int = 1
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    plain_int8: bool = False
    swaps_modules: bool = False
    requantizes: bool = False
    norm_scale: str | None = None
    derived: str = ""

    def holds(self, weight: Weight) -> bool:
        """Whether the mode holds a weight exactly, apart from the sizes of groups and slices."""
        args = weight.args
        return (
            weight.element is self.element
            and args.num_bits in self.bits
            and args.strategy in self.strategies
            and inputs_of(weight.scheme) in self.inputs
            and weight.two_level is self.two_level
            and not (weight.exponent_scale or weight.permuted)
            and weight.has_zero_point is not self.symmetric
            and (not self.group_sizes or args.group_size is None or bool(self.sizes_for(args.group_size)))
        )

    def sizes_for(self, group_size: int | None) -> tuple[int, ...]:
        """Return the group sizes in which the mode can hold groups of this size; any of them for None."""
        return tuple(size for size in self.group_sizes if group_size is None or group_size % size == 0)


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
    symmetric=False,
    multiple=64,
    has_zero_point=True,
    derived="W4A16_AWQ with zero points and without pre_quant_scale",
    tensors=(
        _codes(DType.I8),
        _GROUP_SCALE,
        BuildTensor(name="zero", content=Content.ZERO, extent=Extent.MATRIX, dtype=None, transposed=True),
    ),
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


def inputs_of(scheme: QuantScheme) -> Inputs:
    """Return how a scheme quantizes the input of its Linears."""
    args = scheme.input_activations
    if args is None:
        return Inputs.WIDE
    if not args.symmetric:
        return Inputs.OTHER
    kinds: dict[tuple[NumberType, int, Strategy, object], Inputs] = {
        (NumberType.FLOAT, 8, Strategy.TENSOR, False): Inputs.FP8_STATIC,
        (NumberType.FLOAT, 8, Strategy.TOKEN, True): Inputs.FP8_TOKEN,
        (NumberType.INT, 8, Strategy.TENSOR, False): Inputs.INT8_STATIC,
        (NumberType.INT, 8, Strategy.TOKEN, True): Inputs.INT8_TOKEN,
        (NumberType.FLOAT, 4, Strategy.TENSOR_GROUP, "local"): Inputs.FP4_LOCAL,
        (NumberType.FLOAT, 4, Strategy.GROUP, "local"): Inputs.FP4_LOCAL,
    }
    return kinds.get((args.type, args.num_bits, args.strategy, args.dynamic), Inputs.OTHER)


def mode_of(weight: Weight) -> BuildMode | None:
    """Return the mode that holds a weight exactly, None if there is none; see `refusal_of`."""
    return next((mode for mode in BUILD_MODES if mode.holds(weight)), None)


_NO_INPUTS = "no layer of the engine computes with such weights on"
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
        lambda weight: weight.element is Element.INT and weight.args.num_bits > 4 and weight.has_zero_point,
        "int8 weights of engines are symmetric",
    ),
    (
        lambda weight: (
            weight.element is Element.INT and weight.args.num_bits > 4 and weight.args.group_size is not None
        ),
        "int8 weights in groups exist as W8A16_GPTQ only, whose files are made for one generation of GPUs",
    ),
    (
        lambda weight: (
            weight.element is Element.INT and weight.args.num_bits <= 4 and inputs_of(weight.scheme) is not Inputs.WIDE
        ),
        "W4A8_AWQ needs a static scale of the input and a second scale of the weight, which only calibration gives",
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

"""What an entry of the table of engine-build modes says; the table is in `build_modes.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import auto
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import Element, NumberType, QuantAlgo, QuantScheme, Strategy
from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.engine.holdings import Weight
    from trtllm_ct.layouts.mixed_gemm import KernelOrder

__all__ = ["BuildMode", "BuildTensor", "Content", "Extent", "Inputs", "RowBias", "inputs_of"]


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


class RowBias(StrEnum):
    """Where the bias of a Linear is added whose columns the ranks divide, and on which ranks the loader keeps it.

    Source: TensorRT-LLM `quantization/layers.py` (`WeightOnlyQuantRowLinear.forward` and
    `WeightOnlyGroupwiseQuantRowLinear.forward`), `layers/linear.py` (`RowLinear.multiply_collect`) and
    `models/modeling_utils.py` (`preprocess_perlayer_weights`), texts of the releases from 1.0 on.
    """

    AFTER_SUM = auto()
    """After the ranks are added up, so that every rank needs it."""
    ZEROED_BY_LOADER = auto()
    """In the kernel of each rank; the loader sets it to zero on all ranks but the first, also that of plain Linears."""
    ZEROED_IN_FILE = auto()
    """In the kernel of each rank, and the loader changes nothing: the files of all ranks but the first have zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildTensor:
    """One tensor of a Linear: its local name in the file, and what it holds.

    `dtype` is None for the model's dtype. A `transposed` matrix is [in, out] in the file, or [in / group, out].
    With `kernel_order` the file has the codes of the Linear as one stream of bytes, in elements of the model's dtype
    and the shape [in, out / codes in an element].
    `leading` puts an axis of size 1 before a vector. `row_parallel` marks a tensor that only Linears have whose columns
    the ranks divide.
    """

    name: str
    content: Content
    extent: Extent
    dtype: DType | None
    transposed: bool = False
    kernel_order: bool = False
    leading: bool = False
    row_parallel: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildMode:
    """One mode of an engine, as its checkpoint holds it.

    Weights: `element`, `bits`, `strategies` and `inputs` are the schemes that it holds exactly; `group_sizes` are those
    of its kernels, and scales are repeated for smaller groups. `packing` is the layout of the codes, None for floats.
    `two_level` says that weights have a global scale too; `zero_points` says whether they may have zero points, or
    must. `order` is the order of the codes if the file has that of a kernel, and `sm` the GPUs that it is for.
    Sizes: in and out features must be multiples of `multiple` and of the group size, on every rank
    (`quantization/layers.py` rounds its parameters up otherwise, and the check of shapes then fails).
    Configuration: `has_zero_point` and `pre_quant_scale` are keys of `quantization`. `plain_int8` disables the plug-in
    of weight-only Linears. `swaps_modules` says that the quantization pass replaces whole attention, MLP and norm
    modules, so that no single Linear can stay plain; such attention has no norms of queries and keys. `requantizes`
    says that a fused Linear has one scale, which its parts are requantized to. `norm_scale` is a tensor of ones that
    each norm of a layer has. `row_bias` says what becomes of biases. `mixes` says that Linears of other such modes may
    be beside it. `casts_scales` says that the loader casts the scales of the file to the model's dtype. `derived`
    describes what no converter of TensorRT-LLM writes; empty if one does.
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
    zero_points: frozenset[bool] = frozenset({False})
    order: KernelOrder | None = None
    sm: int | None = None
    multiple: int = 1
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    plain_int8: bool = False
    swaps_modules: bool = False
    requantizes: bool = False
    norm_scale: str | None = None
    row_bias: RowBias = RowBias.AFTER_SUM
    mixes: bool = False
    casts_scales: bool = False
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
            and weight.has_zero_point in self.zero_points
            and (not self.group_sizes or args.group_size is None or bool(self.sizes_for(args.group_size)))
        )

    @property
    def scales_in_dtype(self) -> bool:
        """Whether engines compute with scales in the model's dtype: those of the file are, or the loader casts them."""
        return self.casts_scales or any(
            tensor.content is Content.SCALE and tensor.dtype is None for tensor in self.tensors
        )

    def sizes_for(self, group_size: int | None) -> tuple[int, ...]:
        """Return the group sizes in which the mode can hold groups of this size; any of them for None."""
        return tuple(size for size in self.group_sizes if group_size is None or group_size % size == 0)


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

"""How weights and activations are quantized, and the dtypes, shapes and packings of tensors.

Everything here is an enum or a frozen dataclass, and works without torch.
Names and meanings follow compressed-tensors (`QuantizationArgs`, `QuantizationScheme`, 0.20.0)
and TensorRT-LLM (`QuantAlgo`). Inside this package `value = (code - zero_point) * scale`: scales multiply.
Weights are `(out, in)` = (N, K).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from trtllm_ct.base.dtypes import DType

__all__ = [
    "ActOrder",
    "CompressionFormat",
    "Element",
    "NumberType",
    "Packing",
    "QuantAlgo",
    "QuantArgs",
    "QuantScheme",
    "RowOrder",
    "Strategy",
    "TensorSpec",
]


class Strategy(StrEnum):
    """Which elements share one scale (`QuantizationStrategy` upstream)."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"
    TENSOR_GROUP = "tensor_group"
    ATTN_HEAD = "attn_head"


class NumberType(StrEnum):
    """Whether codes are integers or floats (`QuantizationType` upstream)."""

    INT = "int"
    FLOAT = "float"


class ActOrder(StrEnum):
    """Activation ordering (`ActivationOrdering` upstream); upstream's aliases `dynamic` and `static` map to these."""

    GROUP = "group"
    WEIGHT = "weight"


class CompressionFormat(StrEnum):
    """The storage format of a module's weight, by its name in compressed-tensors."""

    DENSE = "dense"
    FAKEQUANT = "fakequant"
    SPARSE_BITMASK = "sparse-bitmask"
    SPARSE_24_BITMASK = "sparse-24-bitmask"
    INT_QUANTIZED = "int-quantized"
    FLOAT_QUANTIZED = "float-quantized"
    NAIVE_QUANTIZED = "naive-quantized"
    PACK_QUANTIZED = "pack-quantized"
    MARLIN_24 = "marlin-24"
    NVFP4_PACK_QUANTIZED = "nvfp4-pack-quantized"
    MXFP4_PACK_QUANTIZED = "mxfp4-pack-quantized"
    MXFP6_PACK_QUANTIZED = "mxfp6-pack-quantized"
    MXFP8_QUANTIZED = "mxfp8-quantized"
    MIXED_PRECISION = "mixed-precision"


class Element(StrEnum):
    """How the bits of a code are decoded: a signed integer, or a small float without infinities (OCP FP8 and MX)."""

    INT = "int"
    E4M3 = "e4m3"
    E2M1 = "e2m1"
    E2M3 = "e2m3"


class RowOrder(StrEnum):
    """The order of the rows of query and key weights within each head.

    `MISTRAL`: the two rows of a rotary pair are neighbours.
    `HUGGING_FACE`: all first rows of the pairs, then all second rows (two halves).
    """

    MISTRAL = "mistral"
    HUGGING_FACE = "hugging_face"


class QuantAlgo(StrEnum):
    """TensorRT-LLM's names of quantization modes (`tensorrt_llm.quantization.QuantAlgo`)."""

    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W4A8_AWQ = "W4A8_AWQ"
    W8A16 = "W8A16"
    W8A16_GPTQ = "W8A16_GPTQ"
    W8A8_SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
    NVFP4 = "NVFP4"
    W4A16_NVFP4 = "W4A16_NVFP4"
    MXFP8 = "MXFP8"
    W4A16_MXFP4 = "W4A16_MXFP4"
    W4A8_MXFP4_MXFP8 = "W4A8_MXFP4_MXFP8"
    MIXED_PRECISION = "MIXED_PRECISION"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantArgs:
    """How one tensor is quantized: `QuantizationArgs` upstream, with all defaults filled in.

    `group_size` is set only for the strategies group and tensor_group.
    `block_structure` is (rows, columns) = (along N, along K).
    `dynamic` is True or "local" for activations whose scale is computed at run time.
    """

    num_bits: int
    type: NumberType = NumberType.INT
    symmetric: bool = True
    strategy: Strategy = Strategy.TENSOR
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: ActOrder | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None

    @property
    def number(self) -> str:
        """Number type and width in short form, such as `int4` or `fp8`."""
        return f"{'int' if self.type is NumberType.INT else 'fp'}{self.num_bits}"

    def label(self) -> str:
        """Return a short name for tables, such as `int4 group 128 asymmetric` or `fp8 token dynamic`."""
        granularity = str(self.strategy)
        if self.group_size is not None:
            granularity += f" {self.group_size}"
        if self.block_structure is not None:
            granularity += f" {self.block_structure[0]}x{self.block_structure[1]}"
        words = [self.number, granularity]
        if not self.symmetric:
            words.append("asymmetric")
        if self.dynamic is not False:
            words.append("dynamic" if self.dynamic is True else "dynamic local")
        if self.actorder is ActOrder.GROUP:
            words.append("actorder group")
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How one config group quantizes the modules that it targets.

    `format` is the format declared for the group, or else for the whole checkpoint; None when neither declares one.
    """

    weights: QuantArgs | None = None
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    format: CompressionFormat | None = None

    def label(self) -> str:
        """Return a short name for tables, such as `int4 group 128` or `fp8 channel, input fp8 token dynamic`."""
        parts = [self.weights.label() if self.weights else "weights unquantized"]
        if self.input_activations:
            parts.append(f"input {self.input_activations.label()}")
        if self.output_activations:
            parts.append(f"output {self.output_activations.label()}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor, without its values.

    `nbytes` is the size of the payload in bytes. It is computed once per spec, because 10^5 tensors share a few specs
    and their sizes are summed.
    """

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", self.numel * self.dtype.itemsize)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a zero-dimensional tensor."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.torch_name} {list(self.shape)}"

    def to_dict(self) -> dict[str, object]:
        """Return dtype and shape for JSON output."""
        return json_object({"dtype": self.dtype, "shape": self.shape})


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How codes of `bits` bits are packed into the elements of a container tensor.

    Codes are packed along `axis` (0 = down the rows, 1 = along the columns), lowest bits first. With `dense`, the codes
    form one stream of bits, in which a code may straddle two elements. Without it, each element holds
    `container.bits // bits` whole codes and its highest bits are unused. The two differ only where `bits` does not
    divide the width of the container. With `offset_binary`, a code is stored as code + 2^(bits - 1). Without it,
    integers are stored in two's complement and floats as their bit patterns.
    """

    bits: int
    container: DType
    axis: Literal[0, 1]
    offset_binary: bool
    dense: bool = True

    def elements(self, count: int) -> int:
        """Return how many elements of the container `count` codes take; the last element may be partly filled."""
        if self.dense:
            return -(-count * self.bits // self.container.bits)
        return -(-count // (self.container.bits // self.bits))

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the container for codes of `shape`; the packed axis is rounded up to whole elements."""
        rows, columns = shape
        if self.axis == 0:
            return self.elements(rows), columns
        return rows, self.elements(columns)

    def unpacked_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the codes that fill containers of this shape; the inverse where none is partly filled."""
        rows, columns = shape
        codes = self.container.bits // self.bits
        return (rows * codes, columns) if self.axis == 0 else (rows, columns * codes)

    def __str__(self) -> str:
        along = "rows" if self.axis == 0 else "columns"
        encoding = ("offset binary" if self.offset_binary else "signed") + ("" if self.dense else " padded")
        return f"{self.bits}-bit {encoding} in {self.container.torch_name} along {along}"

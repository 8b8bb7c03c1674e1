"""The shared vocabulary: how weights and activations are quantized, and what a tensor looks like.

Frozen values without behaviour that needs torch.
Names and meanings are those of compressed-tensors (`QuantizationArgs`, `QuantizationScheme`, 0.20.0)
and of TensorRT-LLM (`QuantAlgo`); inside this package `value = (code - zero_point) * scale`,
weights are `(out, in)` = (N, K), and scales multiply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Literal

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
    """What kind of number a code is."""

    INT = "int"
    FLOAT = "float"


class ActOrder(StrEnum):
    """Activation ordering; upstream's aliases `dynamic` and `static` are read as these two."""

    GROUP = "group"
    WEIGHT = "weight"


class CompressionFormat(StrEnum):
    """How a module's weight lies on disk, by the name that compressed-tensors gives it."""

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
    """What the bits of one code mean: a signed integer, or a small float without infinities (OCP FP8 and MX)."""

    INT = "int"
    E4M3 = "e4m3"
    E2M1 = "e2m1"
    E2M3 = "e2m3"


class RowOrder(StrEnum):
    """In which order the rows of queries and keys lie, head by head: pairs that turn together, or halves."""

    MISTRAL = "mistral"
    HUGGING_FACE = "hugging_face"


class QuantAlgo(StrEnum):
    """TensorRT-LLM's name of a quantization mode (`tensorrt_llm.quantization.QuantAlgo`)."""

    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W8A16 = "W8A16"
    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
    NVFP4 = "NVFP4"
    W4A16_NVFP4 = "W4A16_NVFP4"
    MXFP8 = "MXFP8"
    W4A16_MXFP4 = "W4A16_MXFP4"
    MIXED_PRECISION = "MIXED_PRECISION"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantArgs:
    """How one tensor is quantized; `QuantizationArgs` upstream, with every default filled in.

    `group_size` is set for group and tensor_group strategies only.
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
        """`int4`, `fp8`: number type and width in the field's short form."""
        return f"{'int' if self.type is NumberType.INT else 'fp'}{self.num_bits}"

    def label(self) -> str:
        """A short name for tables, such as `int4 group 128 asymmetric` or `fp8 token dynamic`."""
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
    """What one config group says about the modules that it targets.

    `format` is the format declared for the group, or for the whole checkpoint; None when neither says.
    """

    weights: QuantArgs | None = None
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    format: CompressionFormat | None = None

    def label(self) -> str:
        """A short name for tables, such as `int4 group 128` or `fp8 channel, input fp8 token dynamic`."""
        parts = [self.weights.label() if self.weights else "weights unquantized"]
        if self.input_activations:
            parts.append(f"input {self.input_activations.label()}")
        if self.output_activations:
            parts.append(f"output {self.output_activations.label()}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor, without the tensor.

    `nbytes` are the bytes of its payload, counted once: a few specs serve 10^5 tensors, whose sizes are added up.
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
        """JSON form."""
        return {"dtype": self.dtype.torch_name, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How codes of `bits` bits lie in the elements of a container.

    Codes are taken along `axis` (0 = rows, 1 = columns), lowest bits first. `dense` codes are one stream of bits,
    in which a code may straddle two elements; others lie `container.bits // bits` to an element with the highest
    bits left over. The two differ for widths that don't divide the container's. `offset_binary` codes are stored as
    code + 2^(bits - 1), others in two's complement, or as they are when they are floats.
    """

    bits: int
    container: DType
    axis: Literal[0, 1]
    offset_binary: bool
    dense: bool = True

    def elements(self, count: int) -> int:
        """How many elements of the container `count` codes take, the last one perhaps not full."""
        if self.dense:
            return -(-count * self.bits // self.container.bits)
        return -(-count // (self.container.bits // self.bits))

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the container for codes of `shape`, the packed axis rounded up to whole elements."""
        rows, columns = shape
        if self.axis == 0:
            return self.elements(rows), columns
        return rows, self.elements(columns)

    def __str__(self) -> str:
        along = "rows" if self.axis == 0 else "columns"
        kind = ("offset binary" if self.offset_binary else "signed") + ("" if self.dense else " padded")
        return f"{self.bits}-bit {kind} in {self.container.torch_name} along {along}"

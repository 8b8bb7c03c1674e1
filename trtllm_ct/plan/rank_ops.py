"""The operations that only the files of ranks need: slices of tensors, and scales that parts of a fused Linear share.

They belong to the closed set of `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.layouts.e4m3 import round_to_e4m3
from trtllm_ct.layouts.mixed_gemm import in_kernel_order
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.layouts.rounding import round_once
from trtllm_ct.layouts.stored_array import StoredArray, scalar
from trtllm_ct.plan.ops import AdditiveZero, Operation, WidenScale, refuse_infinite, refuse_wide_codes

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

    from trtllm_ct.layouts.mixed_gemm import KernelOrder
    from trtllm_ct.plan.ops import ModuleTensors

__all__ = [
    "LargestOf",
    "LargestReciprocal",
    "Padding",
    "Permute",
    "Requantize",
    "RoundScale",
    "RoundZero",
    "Slice",
    "WidenCastScale",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundScale(WidenScale):
    """Delivers the scale of the module's codes in a narrower dtype, each element rounded once."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "round scale"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the scale in the dtype of `result`; an element that becomes infinite or zero is an error."""
        return _within(name, WidenScale.run(self, name, module), self.result.dtype, module.first_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class WidenCastScale(WidenScale):
    """Delivers the scale of the module's codes as float32 for a loader that casts it to `cast`."""

    cast: DType

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the scale, values unchanged; an element that the loader would make infinite or zero is an error."""
        scale = WidenScale.run(self, name, module)
        _within(name, scale, self.cast, module.first_row)
        return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestOf(Operation):
    """Delivers the largest of the scales that `scales` names, float32 []: one scale for all parts of a Linear."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "largest of scales"
    scales: tuple[str, ...]

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return the largest element of all scales."""
        return scalar(float(self.largest(module))).reshape()

    def largest(self, module: ModuleTensors) -> np.float32:
        """Return the largest element of all scales, as float32."""
        import numpy as np

        return np.float32(np.max([module.stored[scale].numbers.max() for scale in self.scales]))


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestReciprocal(LargestOf):
    """Delivers the largest multiplier among the divisors that `scales` names, float32 []."""

    label: ClassVar[str] = "largest reciprocal"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return 1 / the smallest divisor, rounded once."""
        smallest = min(float(module.stored[scale].numbers.min()) for scale in self.scales)
        return scalar(1 / smallest).reshape()


@dataclass(frozen=True, slots=True, kw_only=True)
class Requantize(LargestOf):
    """Delivers E4M3 codes [N, K] under the largest of the scales that `scales` names.

    Codes whose own scale is the largest are unchanged. Others are multiplied by their scale and divided by the largest
    one in float32, and rounded to E4M3, as the engine's converters do.
    Source: TensorRT-LLM `quantization/layers.py: FP8Linear.postprocess`; ModelOpt `torch/export/layer_utils.py`.
    """

    label: ClassVar[str] = "requantize"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return the codes as float8_e4m3fn."""
        import numpy as np

        codes, largest = module.codes, self.largest(module)
        scale = np.float32(float(codes.scale))
        if scale == largest:
            return codes.values
        return StoredArray(round_to_e4m3(codes.values.numbers * scale / largest), codes.values.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Permute(Operation):
    """Delivers integer codes in the order that a kernel reads, [N / bundle, bundle * K / codes in an element].

    The elements have the model's dtype and mean nothing as numbers. Codes that are too wide are an error.
    """

    label: ClassVar[str] = "permute"
    order: KernelOrder

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the codes as elements of the dtype of `result`."""
        codes = module.codes
        plain = codes.repacked(INT8_PLAIN).elements
        refuse_wide_codes(name, plain, self.order.bits)
        return StoredArray(in_kernel_order(plain, self.order), DType.U8).read_as(self.result.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundZero(AdditiveZero):
    """Delivers -(zero point) * scale in a narrower dtype: the exact product, rounded once."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "round additive zero"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the offset in the dtype of `result`; an infinite element is an error."""
        zero = AdditiveZero.run(self, name, module)
        return _rounded_scale(name, zero, self.result.dtype, module.first_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding(Operation):
    """Delivers zeros, which fill a tensor up to the size that an engine reads."""

    label: ClassVar[str] = "padding"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return zeros."""
        return StoredArray.filled(self.result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice(Operation):
    """Delivers the rows (axis 0) or columns (axis 1) `begin` to `end` of what another operation delivers.

    It serves the slices that a plan of fewer rows can't make: columns, and rows of weights that are stored in tiles.
    """

    label: ClassVar[str] = "slice"
    operation: Operation
    axis: Literal[0, 1]
    begin: int
    end: int

    @classmethod
    def of(cls, operation: Operation, axis: Literal[0, 1], begin: int, end: int) -> Self:
        """Return the slice of an operation's result."""
        spec = operation.result
        shape = (*spec.shape[:axis], end - begin, *spec.shape[axis + 1 :])
        result = TensorSpec(spec.dtype, shape)
        return cls(result=result, source=operation.source, operation=operation, axis=axis, begin=begin, end=end)

    @property
    def made(self) -> Operation:
        """The operation of which this takes a slice."""
        return self.operation

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return a contiguous copy of the slice."""
        import numpy as np

        whole, cut = self.operation.run(name, module), slice(self.begin, self.end)
        part = whole[cut] if self.axis == 0 else whole[:, cut]
        return StoredArray(np.ascontiguousarray(part.elements), part.dtype)


def _within(name: str, scale: StoredArray, dtype: DType, first_row: int) -> StoredArray:
    """Return a scale in a narrower dtype; an element that becomes infinite or zero is an error."""
    rounded = _rounded_scale(name, scale, dtype, first_row)
    vanished = ~rounded.is_nonzero & scale.is_nonzero
    if vanished.any():
        raise PayloadError(
            Fault(
                where=name,
                expected=f"scales within the range of {dtype.torch_name}",
                found=f"{int(vanished.sum())} that become zero, and their weights with them",
                remedy="Convert with --dtype bfloat16.",
            )
        )
    return rounded


def _rounded_scale(name: str, scale: StoredArray, dtype: DType, first_row: int) -> StoredArray:
    """Round a float32 scale or offset once; an element that would become infinite is an error."""
    rounded = round_once(scale.numbers, dtype)
    refuse_infinite(name, rounded, first_row, scale)
    return rounded

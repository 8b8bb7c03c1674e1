"""The closed set of operations that turn stored tensors into delivered ones.

A plan holds operations as frozen data. Each states the dtype and shape of its result (`result`) before a byte is read,
and later makes the tensor (`run`). Running an operation makes no decision. An operation is `exact` when the delivered
tensor holds every value of the stored one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.layouts.e4m3 import shift_scale
from trtllm_ct.layouts.folds import fold
from trtllm_ct.layouts.loops.dispatch import additive_zero
from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.layouts.rounding import round_once
from trtllm_ct.layouts.scales import widen_scale
from trtllm_ct.layouts.stored_array import StoredArray, scalar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.formats.base import Codes, StoredWeight
    from trtllm_ct.formats.codecs import Codec
    from trtllm_ct.layouts.folds import Fold
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = [
    "AdditiveZero",
    "Cast",
    "Copy",
    "Dequantize",
    "FoldPlain",
    "FoldTransform",
    "LargestScale",
    "ModuleTensors",
    "Ones",
    "Operation",
    "Reciprocal",
    "Reinterpret",
    "Repack",
    "SharedReciprocal",
    "ShiftScale",
    "WidenScale",
    "Zeros",
    "refuse_infinite",
    "refuse_wide_codes",
]


_TILE_ROWS = 256

_LARGEST = {
    DType.BF16: 0xFF * 2.0**120,
    DType.F16: 65504.0,
    DType.F32: 0xFFFFFF * 2.0**104,
    DType.F64: 0x1FFFFFFFFFFFFF * 2.0**971,
}
"""The largest finite number of each dtype of plain weights."""


class ModuleTensors:
    """The stored tensors of one module by local name, and its weight, which is decoded at most once.

    If the tensors hold only some rows of a module, `first_row` is the number of the first one; messages use it.
    `results` keeps what several operations are made from and is expensive to compute, by the name of its form.
    """

    def __init__(self, stored: StoredTensors, weight: StoredWeight | None, codec: Codec, first_row: int = 0) -> None:
        self.stored = stored
        self.first_row = first_row
        self.results: dict[str, Any] = {}
        self._weight = weight
        self._codec = codec

    @property
    def weight(self) -> StoredWeight:
        """The weight as the headers describe it; only a quantized module has one."""
        if self._weight is None:
            raise AssertionError("only a quantized module has codes")
        return self._weight

    @cached_property
    def codes(self) -> Codes:
        """The decoded weight: codes that are still packed, with scales and zero points."""
        return self._codec.decode(self.weight, self.stored)

    def dequantize(self, dtype: DType) -> StoredArray:
        """Return the weight as plain values [N, K], each rounded once to `dtype`."""
        return self._codec.dequantize(self.weight, self.stored, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(ABC):
    """Makes one delivered tensor, with dtype and shape `result`, from the stored tensors of a module.

    `source` is the local name of the stored tensor that is read; None when the operation reads the module's codes, or
    reads nothing. With `same_bytes` the delivered tensor has exactly the bytes of the stored one.
    """

    result: TensorSpec
    source: str | None = None
    exact: ClassVar[bool] = True
    same_bytes: ClassVar[bool] = False
    label: ClassVar[str]

    @abstractmethod
    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the delivered tensor; `name` is its name for error messages.

        Raises `PayloadError` when a value can't be delivered.
        """

    @property
    def made(self) -> Operation:
        """The operation that makes the values: this one, or the one of which this takes a slice."""
        return self

    def input(self, module: ModuleTensors) -> StoredArray:
        """Return the stored tensor that `source` names."""
        if self.source is None:
            raise AssertionError(f"{self.label} needs a source")
        return module.stored[self.source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy(Operation):
    """Delivers the stored tensor itself, perhaps under another name; it is neither read nor copied here."""

    same_bytes: ClassVar[bool] = True
    label: ClassVar[str] = "copy"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return the source."""
        return self.input(module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(Operation):
    """Casts a plain float tensor to another float dtype; an element that would become infinite is an error."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "cast"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the source, each element rounded once."""
        tensor = self.input(module)
        rounded = round_once(tensor.numbers, self.result.dtype)
        refuse_infinite(name, rounded, module.first_row, tensor)
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Repack(Operation):
    """Packs integer codes in another layout, bit for bit; codes that are too wide for it are an error."""

    label: ClassVar[str] = "repack"
    packing: Packing

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the codes in the layout `packing`; a result of another dtype has the same bytes."""
        codes = module.codes
        if (codes.packing or INT8_PLAIN).bits > self.packing.bits:
            refuse_wide_codes(name, codes.values.elements, self.packing.bits)
        return codes.repacked(self.packing).read_as(self.result.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class WidenScale(Operation):
    """Delivers a scale as float32 in the shape that a Linear reads.

    It is the scale of the module's codes, or the scale of one element that `source` names.
    """

    label: ClassVar[str] = "widen scale"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return the scale as float32, values unchanged."""
        scale = module.codes.scale if self.source is None else self.input(module).reshape(1, 1)
        return StoredArray(widen_scale(scale.numbers, self.result.shape), DType.F32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestScale(Operation):
    """Delivers the largest of several scales as float32 []: no value overflows that fits its own scale."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "largest scale"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return the largest element of the source."""
        return scalar(self.input(module).numbers.max()).reshape()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditiveZero(Operation):
    """Delivers -(zero point) * scale as float32 [N, G]; zeros where no zero point is stored."""

    label: ClassVar[str] = "additive zero"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return the offset that the engine adds after scaling."""
        codes = module.codes
        if codes.zero_point is None:
            return StoredArray.filled(TensorSpec(DType.F32, self.result.shape))
        offset = additive_zero(codes.scale, codes.zero_point.elements, codes.zero_point_packing)
        return StoredArray(widen_scale(offset, self.result.shape), DType.F32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reciprocal(Operation):
    """Delivers a stored divisor as the multiplier that engines read, float32 [].

    A divisor of 0, from an expert that saw no calibration data, stays 0; one of infinity becomes 0.
    """

    label: ClassVar[str] = "reciprocal"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return 1 / divisor, rounded once."""
        divisor = float(self.input(module))
        # 1 / 0 would be infinite, and engines take the maximum over all experts, so that every expert would get it.
        return scalar(1 / divisor if divisor else 0.0).reshape()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinterpret(Operation):
    """Delivers the bytes of a stored tensor under the dtype of `result`; they are neither read nor copied."""

    same_bytes: ClassVar[bool] = True
    label: ClassVar[str] = "reinterpret"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return the source with the dtype and shape of `result`."""
        return self.input(module).read_as(self.result.dtype).reshape(*self.result.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedReciprocal(Reciprocal):
    """Delivers the multiplier that all parts of a fused Linear share, float32 [].

    `shared` is the divisor that replaces the stored one in all parts. `stored` is the stored divisor that the plan was
    made with, which determines how the group scales change. A file that now holds another value is an error.
    """

    label: ClassVar[str] = "shared reciprocal"
    stored: float
    shared: float

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return 1 / shared, rounded once."""
        divisor = float(self.input(module))
        if divisor != self.stored:
            raise PayloadError(
                Fault(
                    where=name,
                    expected=f"{self.stored:.9g} in {self.source}, as when the plan was made",
                    found=f"{divisor:.9g}",
                    remedy="The file changed since: wait until it is complete and start again.",
                )
            )
        return scalar(1 / self.shared).reshape()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftScale(Reinterpret):
    """Multiplies E4M3 group scales by 2^`power`; the global scale of the weight changes to compensate for it.

    A product that is no E4M3 number is an error.
    """

    same_bytes: ClassVar[bool] = False
    label: ClassVar[str] = "shift scale"
    power: int

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the scales as float8_e4m3fn, every element exact."""
        shifted = shift_scale(Reinterpret.run(self, name, module).elements, self.power)
        if shifted is None:
            raise PayloadError(
                Fault(
                    where=name,
                    expected=f"group scales that are E4M3 numbers times 2^{self.power} too, as when the plan was made",
                    found="one that is beyond the range of E4M3 then",
                    remedy="The file changed since: wait until it is complete and start again.",
                )
            )
        return StoredArray(shifted, DType.F8_E4M3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros(Operation):
    """Delivers group scales of zero, for a weight that is zero because its stored global scale is 0.

    Without this, the shared global scale would make the weight nonzero.
    """

    label: ClassVar[str] = "zeros"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return zeros."""
        return StoredArray.filled(self.result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ones(Operation):
    """Delivers a neutral `pre_quant_scale`, which the engine requires and the checkpoint does not have."""

    label: ClassVar[str] = "ones"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return ones."""
        return StoredArray.filled(self.result, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantize(Operation):
    """Dequantizes a weight [N, K]: each element is its exact value rounded once; an infinite one is an error."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "dequantize"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the weight in the dtype of `result`."""
        values = module.dequantize(self.result.dtype)
        if not module.weight.bound_in(module.stored) <= _LARGEST[self.result.dtype]:
            refuse_infinite(name, values, module.first_row)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldTransform(Operation):
    """Dequantizes a weight [N, K] and folds the module's transforms in, in float64, with one rounding at the end.

    Memory: the result and the weight in float64. An infinite element is an error.
    """

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "dequantize and fold"
    folds: tuple[Fold, ...]

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the weight in the dtype of `result`."""
        values = self.values(module)
        for transform in self.folds:
            fold(values, transform.factor(module.stored), transform.axis, normalized=transform.normalized)
        rounded = _rounded(values, self.result.dtype).reshape(*self.result.shape)
        refuse_infinite(name, rounded, module.first_row)
        return rounded

    def values(self, module: ModuleTensors) -> NDArray[np.float64]:
        """Return the values before folding: a new float64 array with two axes, which folding changes in place."""
        return module.dequantize(DType.F64).elements


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldPlain(FoldTransform):
    """Folds transforms into a stored plain weight [N, K], or into a bias [N], which is treated as one column."""

    label: ClassVar[str] = "fold"

    def values(self, module: ModuleTensors) -> NDArray[np.float64]:
        """Return a float64 copy of the source with two axes."""
        plain = self.input(module)
        copy: NDArray[np.float64] = plain.numbers.astype("f8").reshape(plain.shape[0], -1)
        return copy


def _rounded(values: NDArray[np.float64], dtype: DType) -> StoredArray:
    """Round float64 [N, K] once, some rows at a time, because rounding needs memory for several copies."""
    result = empty(values.shape, dtype)
    for start in range(0, values.shape[0], _TILE_ROWS):
        result[start : start + _TILE_ROWS] = round_once(values[start : start + _TILE_ROWS], dtype).elements
    return StoredArray(result, dtype)


def refuse_wide_codes(name: str, codes: NDArray[np.int8], bits: int) -> None:
    """Raise `PayloadError` when an int8 code needs more than `bits` bits; packing would cut its high bits off."""
    half = 1 << (bits - 1)
    low, high = int(codes.min()), int(codes.max())
    if low < -half or high >= half:
        raise PayloadError(
            Fault(
                where=name,
                expected=f"codes of {bits} bits, from {-half} to {half - 1}",
                found=f"codes from {low} to {high}",
                remedy="The weight is wider than num_bits in config_groups says; correct that, or quantize again.",
            )
        )


def refuse_infinite(name: str, delivered: StoredArray, first_row: int, source: StoredArray | None = None) -> None:
    """Raise `PayloadError` when rounding to a narrower dtype made an element infinite.

    Elements that were infinite in `source`, if that is given, are accepted. `first_row` is added to the row in the
    message.
    """
    import numpy as np

    if delivered.is_finite:  # This pass is nearly always the only one.
        return
    overflowed = delivered.is_infinite
    if source is not None:
        overflowed &= np.isfinite(source.numbers)
    if not overflowed.any():
        return
    position = [int(index) for index in np.argwhere(overflowed)[0]]
    found = "one beyond it" if source is None else f"{float(source.numbers[tuple(position)]):g}"
    if position:
        position[0] += first_row
    raise PayloadError(
        Fault(
            where=f"{name}{position}",
            expected=f"a value within the range of {delivered.dtype.torch_name}",
            found=found,
            remedy="Convert with --dtype bfloat16 or float32.",
        )
    )

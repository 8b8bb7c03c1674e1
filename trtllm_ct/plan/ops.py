"""The closed set of operations that turn stored tensors into delivered ones.

A plan holds operations as frozen data. Each states the dtype and shape of its result (`result`) before a byte is read,
and later makes the tensor (`run`). Running an operation makes no decision. An operation is `exact` when the delivered
tensor holds every value of the stored one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.layouts.e4m3 import shift_scale
from trtllm_ct.layouts.folds import fold
from trtllm_ct.layouts.loops.dispatch import additive_zero, repack
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.layouts.rounding import round_once
from trtllm_ct.layouts.scales import widen_scale

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.schemes import Packing, TensorSpec
    from trtllm_ct.formats.base import Codes, StoredWeight
    from trtllm_ct.formats.codecs import Codec
    from trtllm_ct.layouts.folds import Fold

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


class ModuleTensors:
    """The stored tensors of one module by local name, and its weight, which is decoded at most once.

    If the tensors hold only some rows of a module, `first_row` is the number of the first one; messages use it.
    `results` keeps what several operations are made from and is expensive to compute, by the name of its form.
    """

    def __init__(
        self, stored: Mapping[str, Tensor], weight: StoredWeight | None, codec: Codec, first_row: int = 0
    ) -> None:
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

    def dequantize(self, dtype: DType) -> Tensor:
        """Return the weight as plain values [N, K], each rounded once to `dtype`."""
        return self._codec.dequantize(self.weight, self.stored, dtype.torch_dtype)


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
    def run(self, name: str, module: ModuleTensors) -> Tensor:
        """Return the delivered tensor; `name` is its name for error messages.

        Raises `PayloadError` when a value can't be delivered.
        """

    @property
    def made(self) -> Operation:
        """The operation that makes the values: this one, or the one of which this takes a slice."""
        return self

    def input(self, module: ModuleTensors) -> Tensor:
        """Return the stored tensor that `source` names."""
        if self.source is None:
            raise AssertionError(f"{self.label} needs a source")
        return module.stored[self.source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy(Operation):
    """Delivers the stored tensor itself, perhaps under another name; it is neither read nor copied here."""

    same_bytes: ClassVar[bool] = True
    label: ClassVar[str] = "copy"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return the source."""
        return self.input(module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(Operation):
    """Casts a plain float tensor to another float dtype; an element that would become infinite is an error."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "cast"

    def run(self, name: str, module: ModuleTensors) -> Tensor:
        """Return the source, each element rounded once."""
        tensor = self.input(module)
        rounded = round_once(tensor, self.result.dtype.torch_dtype)
        refuse_infinite(name, rounded, module.first_row, self.result.dtype, tensor)
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Repack(Operation):
    """Packs integer codes in another layout, bit for bit; codes that are too wide for it are an error."""

    label: ClassVar[str] = "repack"
    packing: Packing

    def run(self, name: str, module: ModuleTensors) -> Tensor:
        """Return the codes in the layout `packing`; a result of another dtype has the same bytes."""
        codes = module.codes
        source = codes.packing or INT8_PLAIN
        if source.bits > self.packing.bits:
            refuse_wide_codes(name, codes.values, self.packing.bits)
        packed = repack(codes.values, source, self.packing, codes.shape)
        return packed.view(self.result.dtype.torch_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class WidenScale(Operation):
    """Delivers a scale as float32 in the shape that a Linear reads.

    It is the scale of the module's codes, or the scale of one element that `source` names.
    """

    label: ClassVar[str] = "widen scale"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return the scale as float32, values unchanged."""
        scale = module.codes.scale if self.source is None else self.input(module).reshape(1, 1)
        return widen_scale(scale, self.result.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestScale(Operation):
    """Delivers the largest of several scales as float32 []: no value overflows that fits its own scale."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "largest scale"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return the largest element of the source."""
        import torch

        return self.input(module).to(torch.float32).amax()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditiveZero(Operation):
    """Delivers -(zero point) * scale as float32 [N, G]; zeros where no zero point is stored."""

    label: ClassVar[str] = "additive zero"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return the offset that the engine adds after scaling."""
        import torch

        codes = module.codes
        if codes.zero_point is None:
            return torch.zeros(self.result.shape, dtype=torch.float32)
        return widen_scale(additive_zero(codes.scale, codes.zero_point, codes.zero_point_packing), self.result.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reciprocal(Operation):
    """Delivers a stored divisor as the multiplier that engines read, float32 [].

    A divisor of 0, from an expert that saw no calibration data, stays 0; one of infinity becomes 0.
    """

    label: ClassVar[str] = "reciprocal"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return 1 / divisor, rounded once."""
        import torch

        divisor = self.input(module).double().reshape(())
        # 1 / 0 would be infinite, and engines take the maximum over all experts, so that every expert would get it.
        return torch.where(divisor == 0, 0.0, 1 / divisor).to(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinterpret(Operation):
    """Delivers the bytes of a stored tensor under the dtype of `result`; they are neither read nor copied."""

    same_bytes: ClassVar[bool] = True
    label: ClassVar[str] = "reinterpret"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return the source with the dtype and shape of `result`."""
        return self.input(module).view(self.result.dtype.torch_dtype).reshape(self.result.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedReciprocal(Reciprocal):
    """Delivers the multiplier that all parts of a fused Linear share, float32 [].

    `shared` is the divisor that replaces the stored one in all parts. `stored` is the stored divisor that the plan was
    made with, which determines how the group scales change. A file that now holds another value is an error.
    """

    label: ClassVar[str] = "shared reciprocal"
    stored: float
    shared: float

    def run(self, name: str, module: ModuleTensors) -> Tensor:
        """Return 1 / shared, rounded once."""
        divisor = self.input(module).double().reshape(())
        if float(divisor) != self.stored:
            raise PayloadError(
                Fault(
                    where=name,
                    expected=f"{self.stored:.9g} in {self.source}, as when the plan was made",
                    found=f"{float(divisor):.9g}",
                    remedy="The file changed since: wait until it is complete and start again.",
                )
            )
        return (1 / divisor.new_tensor(self.shared)).to(self.result.dtype.torch_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftScale(Reinterpret):
    """Multiplies E4M3 group scales by 2^`power`; the global scale of the weight changes to compensate for it.

    A product that is no E4M3 number is an error.
    """

    same_bytes: ClassVar[bool] = False
    label: ClassVar[str] = "shift scale"
    power: int

    def run(self, name: str, module: ModuleTensors) -> Tensor:
        """Return the scales as float8_e4m3fn, every element exact."""
        shifted = shift_scale(Reinterpret.run(self, name, module), self.power)
        if shifted is None:
            raise PayloadError(
                Fault(
                    where=name,
                    expected=f"group scales that are E4M3 numbers times 2^{self.power} too, as when the plan was made",
                    found="one that is beyond the range of E4M3 then",
                    remedy="The file changed since: wait until it is complete and start again.",
                )
            )
        return shifted


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros(Operation):
    """Delivers group scales of zero, for a weight that is zero because its stored global scale is 0.

    Without this, the shared global scale would make the weight nonzero.
    """

    label: ClassVar[str] = "zeros"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return zeros."""
        import torch

        spec, device = self.result, self.input(module).device
        return torch.zeros(spec.shape, dtype=torch.uint8, device=device).view(spec.dtype.torch_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ones(Operation):
    """Delivers a neutral `pre_quant_scale`, which the engine requires and the checkpoint does not have."""

    label: ClassVar[str] = "ones"

    def run(self, name: str, module: ModuleTensors) -> Tensor:  # noqa: ARG002
        """Return ones."""
        import torch

        return torch.ones(self.result.shape, dtype=self.result.dtype.torch_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantize(Operation):
    """Dequantizes a weight [N, K]: each element is its exact value rounded once; an infinite one is an error."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "dequantize"

    def run(self, name: str, module: ModuleTensors) -> Tensor:
        """Return the weight in the dtype of `result`."""
        values = module.dequantize(self.result.dtype)
        refuse_infinite(name, values, module.first_row, self.result.dtype)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldTransform(Operation):
    """Dequantizes a weight [N, K] and folds the module's transforms in, in float64, with one rounding at the end.

    Memory: the result and the weight in float64. An infinite element is an error.
    """

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "dequantize and fold"
    folds: tuple[Fold, ...]

    def run(self, name: str, module: ModuleTensors) -> Tensor:
        """Return the weight in the dtype of `result`."""
        values = self.values(module)
        for transform in self.folds:
            fold(values, transform.factor(module.stored), transform.axis, normalized=transform.normalized)
        rounded = _rounded(values, self.result.dtype).reshape(self.result.shape)
        refuse_infinite(name, rounded, module.first_row, self.result.dtype)
        return rounded

    def values(self, module: ModuleTensors) -> Tensor:
        """Return the values before folding: a new float64 tensor with two axes, which folding changes in place."""
        return module.dequantize(DType.F64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldPlain(FoldTransform):
    """Folds transforms into a stored plain weight [N, K], or into a bias [N], which is treated as one column."""

    label: ClassVar[str] = "fold"

    def values(self, module: ModuleTensors) -> Tensor:
        """Return a float64 copy of the source with two axes."""
        import torch

        plain = self.input(module)
        return plain.to(torch.float64, copy=True).reshape(plain.shape[0], -1)


def _rounded(values: Tensor, dtype: DType) -> Tensor:
    """Round float64 [N, K] once, some rows at a time, because rounding needs memory for several copies."""
    import torch

    result = torch.empty(values.shape, dtype=dtype.torch_dtype, device=values.device)
    for start in range(0, values.shape[0], _TILE_ROWS):
        result[start : start + _TILE_ROWS] = round_once(values[start : start + _TILE_ROWS], dtype.torch_dtype)
    return result


def refuse_wide_codes(name: str, codes: Tensor, bits: int) -> None:
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


def refuse_infinite(name: str, delivered: Tensor, first_row: int, dtype: DType, source: Tensor | None = None) -> None:
    """Raise `PayloadError` when rounding to a narrower dtype made an element infinite.

    Elements that were infinite in `source`, if that is given, are accepted. `first_row` is added to the row in the
    message.
    """
    # This pass allocates nothing and is nearly always the only one. With a NaN, minimum and maximum are NaN, and the
    # check continues below.
    if delivered.numel() and all(-inf < float(extreme) < inf for extreme in delivered.aminmax()):
        return
    overflowed = delivered.isinf()
    if source is not None:
        overflowed &= source.isfinite()
    if not bool(overflowed.any()):
        return
    position = [int(index) for index in overflowed.nonzero()[0]]
    found = "one beyond it" if source is None else f"{float(source[tuple(position)]):g}"
    if position:
        position[0] += first_row
    raise PayloadError(
        Fault(
            where=f"{name}{position}",
            expected=f"a value within the range of {dtype.torch_name}",
            found=found,
            remedy="Convert with --dtype bfloat16 or float32.",
        )
    )

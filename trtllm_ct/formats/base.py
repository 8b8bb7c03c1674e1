"""The interface of a weight format: how the stored tensors of one module represent a quantized weight.

A format has four methods. `accepts` says whether a module is stored in the format, and `describe` says which weight its
tensors represent; both need headers only. `decode` converts the tensors to `Codes`, and `encode` is the inverse of
`decode`; tests check one with the other.
`Codes` is the common form between formats and targets, so N formats and M targets need N + M conversions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import auto
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, Element, Packing, QuantArgs, Strategy, TensorSpec
from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.layouts.floats import LARGEST
from trtllm_ct.layouts.loops.dispatch import repack, unpack_codes
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["ZERO_POINT", "Axis", "Codes", "StoredSpecs", "StoredWeight", "Version", "WeightFormat", "scale_shape"]

StoredSpecs = Mapping[str, TensorSpec]
"""The tensors of one module by their local names (`weight_packed`, `weight_scale`, ...)."""

Version = tuple[int, ...]
"""The release of compressed-tensors that wrote a file, as (major, minor, patch); empty if it is unknown."""


ZERO_POINT = "weight_zero_point"
"""The name that compressed-tensors gives to zero points."""


class Axis(StrEnum):
    """What the elements of a stored tensor belong to: rows, columns or the whole weight.

    This decides how a tensor is divided when only some rows of its weight are needed: for tiles, ranks, heads and fused
    experts.
    """

    ROWS = auto()
    """The rows of the weight, one after another: codes, or one number per row."""
    SCALE_ROWS = auto()
    """The rows of the scale: one per row of the weight, one per block of rows, or a single one for all rows."""
    COLUMNS = auto()
    """The columns of the weight; all rows share the elements (`weight_g_idx`)."""
    TILES = auto()
    """Tiles that contain many rows each, so that single rows can't be selected."""
    SCALAR = auto()
    """The whole weight (`weight_global_scale`)."""
    SHAPE = auto()
    """The shape of the whole weight, as numbers (`weight_shape`); it doesn't apply to some of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One quantized weight as it is stored, described from headers.

    `shape` is the logical shape (N, K). `codes` is the local name of the tensor with the codes. `packing` is the layout
    of the codes in it, None if its elements are float8 codes; `element` says what a code means. `scale` is the local
    name of the scale. `zero_point` is the local name of the zero points, and `zero_point_packing` is None if they are
    stored unpacked or there are none. `divisor` names a scalar that the scaled values are divided by (NVFP4).
    `group_index` names the tensor with the group of each column, if groups may not be contiguous.
    `axes` has every stored tensor of the weight by local name, with what its elements belong to. If it contains zero
    points but `zero_point` is None, they must all be zero, which is checked when they are loaded. If this weight is
    some rows of a stored one, `part_of` is the shape (N, K) of the stored one.
    """

    format: WeightFormat
    args: QuantArgs
    shape: tuple[int, int]
    codes: str
    packing: Packing | None
    element: Element = Element.INT
    scale: str = "weight_scale"
    zero_point: str | None = None
    zero_point_packing: Packing | None = None
    divisor: str | None = None
    group_index: str | None = None
    axes: Mapping[str, Axis]
    part_of: tuple[int, int] | None = None

    @property
    def has_zero_point(self) -> bool:
        """Whether the codes have zero points."""
        return self.zero_point is not None

    @property
    def consumed(self) -> tuple[str, ...]:
        """The local names of the stored tensors that belong to the weight."""
        return tuple(self.axes)

    @property
    def has_rows(self) -> bool:
        """Whether the rows of the weight are stored one after another, so that some of them can be selected."""
        return Axis.TILES not in self.axes.values()

    @property
    def scale_shape(self) -> tuple[int, int]:
        """The shape of the scale as (rows, groups); 1 if all rows or all columns share a scale."""
        return scale_shape(self.args, self.shape)

    def scale_in(self, stored: StoredTensors) -> StoredArray:
        """Return the stored scale; bytes are E4M3 if the weight has a divisor (NVFP4), else exponents (MX)."""
        scale = stored[self.scale]
        if scale.dtype.itemsize > 1:
            return scale
        return scale.read_as(DType.F8_E8M0 if self.divisor is None else DType.F8_E4M3)

    def bound_in(self, stored: StoredTensors) -> float:
        """Return a number that no absolute value of the weight exceeds: the largest scale times the largest code.

        The scale must be valid.
        """
        code = LARGEST.get(self.element) or 2.0 ** (self.args.num_bits - (0 if self.has_zero_point else 1))
        divisor = 1.0 if self.divisor is None else float(stored[self.divisor])
        return code * self.scale_in(stored).largest / divisor if divisor else 0.0

    @property
    def block_rows(self) -> int:
        """The number of rows that share one row of scales."""
        return self.args.block_structure[0] if self.args.block_structure else 1

    @property
    def group_columns(self) -> int | None:
        """The number of columns that share one scale; None if all columns of a row do."""
        return self.args.block_structure[1] if self.args.block_structure else self.args.group_size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codes:
    """A weight between stored and delivered form: `value = (code - zero_point) * scale / divisor`.

    `values` are the codes, packed as `packing` says; for float8 codes `packing` is None and `values` has shape [N, K].
    `scale` has shape (rows, groups); it is a float of any width, or uint8 for powers of two (E8M0).
    `zero_point` is int8 of the same shape, or packed as `zero_point_packing` says. `divisor` is a float32 number.
    `group_index` has an integer for each column. Each of these three is None if the weight has none.
    """

    values: StoredArray
    packing: Packing | None
    shape: tuple[int, int]
    scale: StoredArray
    element: Element = Element.INT
    zero_point: StoredArray | None = None
    zero_point_packing: Packing | None = None
    divisor: float | None = None
    group_index: StoredArray | None = None

    @property
    def plain_zero_point(self) -> NDArray[np.int8] | None:
        """The zero point as int8 (rows, groups), unpacked if it is stored packed."""
        if self.zero_point is None or self.zero_point_packing is None:
            return None if self.zero_point is None else self.zero_point.elements
        rows, groups = self.scale.shape
        return unpack_codes(self.zero_point.elements, self.zero_point_packing, (rows, groups))

    def repacked(self, packing: Packing) -> StoredArray:
        """Return integer codes or small floats in another packing."""
        words = repack(self.values.elements, self.packing or INT8_PLAIN, packing, self.shape)
        return StoredArray(words, packing.container)


class WeightFormat(ABC):
    """The interface of one weight format; each format is a class with one instance in `FORMATS`."""

    name: str
    """The name of the format in the support matrix."""
    declared_as: frozenset[CompressionFormat]
    """The values of `format` in configurations that declare this format."""
    codes: str
    """The local name of the tensor that holds the codes."""
    zero_point: str = ZERO_POINT
    """The local name of its zero points, if it has any."""
    axes: Mapping[str, Axis]
    """Every tensor that a weight of this format may have, by local name, with what its elements belong to."""

    @abstractmethod
    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Whether a module with these quantization arguments and tensors is stored in this format."""

    @abstractmethod
    def describe(
        self,
        module: str,
        args: QuantArgs,
        stored: StoredSpecs,
        expected_shape: tuple[int, int] | None,
        faults: FaultCollector,
        version: Version = (),
    ) -> StoredWeight | None:
        """Return the weight that a module's tensors represent, or None if that can't be determined.

        Every contradiction is added to `faults`. `expected_shape` is the shape by the model's architecture, if it is
        known; it decides what headers leave open. `version` is the release that wrote the file; it is used only if
        releases differ and the tensors look the same.
        """

    @abstractmethod
    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return the stored tensors as `Codes`; whatever can stay packed is not unpacked."""

    @abstractmethod
    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, StoredArray]:
        """Return tensors by local name, as compressed-tensors writes them; this is the inverse of `decode`."""


def scale_shape(args: QuantArgs, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scale of a weight (N, K), as (rows, columns).

    tensor (1, 1); channel (N, 1); group (N, ceil(K / g)); block (ceil(N / rows), ceil(K / columns)).
    Source: compressed-tensors 0.20 `quantization/lifecycle/initialize.py`.
    """
    rows, columns = shape
    if args.strategy is Strategy.TENSOR:
        return 1, 1
    if args.strategy is Strategy.BLOCK and args.block_structure is not None:
        return -(-rows // args.block_structure[0]), -(-columns // args.block_structure[1])
    if args.group_size is not None:
        return rows, -(-columns // args.group_size)
    return rows, 1

"""What a weight format is: how the tensors of one module make a weight of codes.

A format answers three questions, in the order of the pipeline:
`accepts` (is this module stored in my format?) and `describe` (which tensors, which shape?) from headers alone, then
`decode` from the tensors. `encode` is the inverse of `decode`; tests prove one with the other.
Formats meet targets in `Codes`, so N formats and M targets need N + M pieces of code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import CompressionFormat, Element, Packing, QuantArgs, Strategy, TensorSpec
from trtllm_ct.layouts.loops.dispatch import unpack_codes

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["Axis", "Codes", "StoredSpecs", "StoredWeight", "Version", "WeightFormat", "scale_shape"]

StoredSpecs = Mapping[str, TensorSpec]
"""The tensors of one module by their local names (`weight_packed`, `weight_scale`, ...)."""

Version = tuple[int, ...]
"""The release of compressed-tensors that wrote a file, as (major, minor, patch); empty where nobody says."""


class Axis(StrEnum):
    """What the elements of a stored tensor belong to. Tiles, ranks, heads and fused experts cut a tensor by it."""

    ROWS = auto()
    """Each row of the weight has its own elements, one row after the other: codes, or a number for each row."""
    SCALE_ROWS = auto()
    """As the scale: a row of elements for each row of the weight or each block of rows, or a single one for all."""
    COLUMNS = auto()
    """The columns of the weight; all rows share them (`weight_g_idx`)."""
    TILES = auto()
    """Tiles that hold many rows, so that no rows can be taken out."""
    SCALAR = auto()
    """The whole weight (`weight_global_scale`)."""
    SHAPE = auto()
    """The shape of the whole weight as numbers (`weight_shape`), which is not that of a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One quantized weight as it lies on disk, known from headers.

    `shape` is the logical (N, K). `packing` says how the codes lie in the tensor named `codes`, None where its elements
    are float8 codes themselves; `element` says what they mean. `scale` is the local name of the scale.
    `zero_point_packing` is None when there is no zero point or it is stored plain. `divisor` names a scalar that the
    scaled values are divided by (NVFP4), `group_index` the tensor that gives the group of each column where groups
    need not be contiguous.
    `axes` has every stored tensor that belongs to the weight, by local name, and says what its elements belong to. A
    `weight_zero_point` among them without `has_zero_point` must hold zeros only, which its payload shows. `part_of` is
    the (N, K) of the stored weight where this one is some of its rows.
    """

    format: WeightFormat
    args: QuantArgs
    shape: tuple[int, int]
    codes: str
    packing: Packing | None
    element: Element = Element.INT
    scale: str = "weight_scale"
    has_zero_point: bool = False
    zero_point_packing: Packing | None = None
    divisor: str | None = None
    group_index: str | None = None
    axes: Mapping[str, Axis]
    part_of: tuple[int, int] | None = None

    @property
    def consumed(self) -> tuple[str, ...]:
        """The local names of the stored tensors that belong to the weight."""
        return tuple(self.axes)

    @property
    def has_rows(self) -> bool:
        """Whether the rows of the weight lie one after the other, so that some of them can be taken out."""
        return Axis.TILES not in self.axes.values()

    @property
    def scale_shape(self) -> tuple[int, int]:
        """The scale as (rows, groups); 1 where rows or columns share it."""
        return scale_shape(self.args, self.shape)

    @property
    def block_rows(self) -> int:
        """Rows that share one row of scales."""
        return self.args.block_structure[0] if self.args.block_structure else 1

    @property
    def group_columns(self) -> int | None:
        """Columns that share one scale; None when all of a row do."""
        return self.args.block_structure[1] if self.args.block_structure else self.args.group_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """A weight between stored and delivered form: `value = (code - zero_point) * scale / divisor`.

    `values` is still packed as `packing` says; for float8 codes `packing` is None and `values` are [N, K] themselves.
    `scale` is reshaped to (rows, groups): a float of any width, or uint8 for powers of two (E8M0).
    `zero_point` is int8 of that shape, or still packed as `zero_point_packing` says; `divisor` is one float32 element,
    `group_index` an integer for each column; each of them is None when there is none.
    """

    values: Tensor
    packing: Packing | None
    shape: tuple[int, int]
    scale: Tensor
    element: Element = Element.INT
    zero_point: Tensor | None = None
    zero_point_packing: Packing | None = None
    divisor: Tensor | None = None
    group_index: Tensor | None = None

    @property
    def plain_zero_point(self) -> Tensor | None:
        """The zero point as int8 (rows, groups), unpacked where it is packed."""
        if self.zero_point is None or self.zero_point_packing is None:
            return self.zero_point
        rows, groups = self.scale.shape
        return unpack_codes(self.zero_point, self.zero_point_packing, (rows, groups))


class WeightFormat(ABC):
    """The contract of one weight format; a final class per file, one instance in `FORMATS`."""

    name: str
    """What the support matrix calls it."""
    declared_as: frozenset[CompressionFormat]
    """The names under which configurations declare it."""
    codes: str
    """The local name of the tensor that holds the codes."""
    axes: Mapping[str, Axis]
    """Every tensor that a weight of this format may have, by local name, with what its elements belong to."""

    @abstractmethod
    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Whether a module with these arguments and tensors is stored in this format."""

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
        """What the module's tensors make, with every contradiction added to `faults`; None when nothing can be said.

        `expected_shape` is what the model's architecture says, where it is known; it settles what headers leave open.
        `version` is the writer's; it counts only where releases differ and the tensors look the same.
        """

    @abstractmethod
    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """The stored tensors as `Codes`, without unpacking what can stay packed."""

    @abstractmethod
    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, Tensor]:
        """The inverse of `decode`: tensors by local name, as compressed-tensors writes them."""


def scale_shape(args: QuantArgs, shape: tuple[int, int]) -> tuple[int, int]:
    """How many scales a weight of `shape` has, as (rows, columns).

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

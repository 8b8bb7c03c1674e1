"""`narrow`: restricts the plan of a module to a range of the rows of its weight.

The result is a plan like any other: its tensors are views with fewer elements, and its delivered tensors have fewer
rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.formats.base import Axis
from trtllm_ct.layouts.stored_array import StoredArray
from trtllm_ct.plan.ops import FoldTransform, Ones, Repack
from trtllm_ct.plan.rank_ops import Padding, Permute, Slice
from trtllm_ct.plan.requantize_ops import RoundedScale
from trtllm_ct.plan.stored import View

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.layouts.stored_array import StoredTensors
    from trtllm_ct.plan.ops import Operation
    from trtllm_ct.plan.plan import Delivery, ModulePlan

__all__ = ["Rows", "can_narrow", "narrow", "row_unit", "weight_rows", "weight_rows_per_row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(View):
    """Consecutive whole rows of another view; `begin` is their first element in it."""

    view: View
    begin: int

    @property
    def stored_bytes(self) -> int:
        """The bytes of the rows, or of the whole view if all of it has to be read to get the rows."""
        return self.spec.nbytes if self.offset is not None else self.view.stored_bytes

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the whole view.

        There are none if there are no rows and the whole view is not one contiguous run of a stored tensor.
        """
        return () if self._needs_nothing else self.view.sources

    @property
    def offset(self) -> int | None:
        """The first element of the rows in the stored tensor; None if the view is not one contiguous run of it."""
        return None if self.view.offset is None else self.view.offset + self.begin

    def of(self, stored: StoredTensors) -> StoredArray:
        """Return the rows; nothing is copied if the whole view needs no copy."""
        if self._needs_nothing:
            return StoredArray.filled(self.spec)
        return self.of_whole(self.view.of(stored))

    def of_whole(self, whole: StoredArray, behind: int = 0) -> StoredArray:
        """Return the rows of `whole`, the tensor that the whole view makes, or those `behind` elements behind them."""
        begin = self.begin + behind
        return whole.reshape(-1)[begin : begin + self.spec.numel].reshape(*self.spec.shape)

    @property
    def _needs_nothing(self) -> bool:
        """Whether there are no rows, and making the whole view for them would read and copy its sources for nothing."""
        return self.view.offset is None and self.spec.numel == 0


def weight_rows(module: ModulePlan) -> int:
    """Return N, the number of rows of a module's weight, whether it is stored quantized or plain."""
    return module.weight.shape[0] if module.weight else module.views["weight"].spec.shape[0]


def can_narrow(module: ModulePlan) -> bool:
    """Whether a module can be restricted to some rows.

    It can't if the codes are stored in tiles of many rows, nor if a transform mixes the rows.
    """
    if module.weight is not None and not module.weight.has_rows:
        return False
    operations = [delivery.operation.made for delivery in module.deliveries]
    folds = [operation for operation in operations if isinstance(operation, FoldTransform)]
    return not any(fold.axis == 0 for operation in folds for fold in operation.folds)


def row_unit(module: ModulePlan) -> int:
    """Return the number of rows that can only be taken together.

    They share a block of scales, a word of packed zero points, or a delivered byte.
    """
    weight = module.weight
    units = [weight_rows_per_row(delivery.operation, weight) for delivery in module.deliveries]
    if weight is not None:
        units.append(weight.block_rows)
        if weight.zero_point_packing is not None:
            units.append(_rows_in_whole_words(weight.zero_point_packing))
    return lcm(*units)


def weight_rows_per_row(operation: Operation, weight: StoredWeight | None) -> int:
    """Return how many rows of the weight correspond to one row of a delivered tensor."""
    operation = operation.made
    if isinstance(operation, Repack):
        packing = operation.packing
        return packing.container.bits // packing.bits if packing.axis == 0 else 1
    if isinstance(operation, Permute):
        return operation.order.bundle
    if isinstance(operation, RoundedScale):
        return operation.form.row_unit
    if weight is None or weight.block_rows == 1 or operation.result.shape[:1] != weight.scale_shape[:1]:
        return 1
    return weight.block_rows


def narrow(module: ModulePlan, begin: int, end: int) -> ModulePlan:
    """Return the plan of rows `begin` up to but not including `end` of a module.

    Both must be multiples of `row_unit`; `end` may also be the number of rows. `can_narrow` must be true.
    """
    views = {local: _narrow_view(module, local, view, begin, end) for local, view in module.views.items()}
    changed = {local for local, view in views.items() if view is not module.views[local]}
    weight = module.weight
    return replace(
        module,
        views=views,
        weight=weight and replace(weight, shape=(end - begin, weight.shape[1]), part_of=weight.part_of or weight.shape),
        deliveries=tuple(_narrow_delivery(entry, module, changed, begin, end) for entry in module.deliveries),
    )


def _narrow_view(module: ModulePlan, local: str, view: View, begin: int, end: int) -> View:
    """Return the rows of one tensor; the whole tensor if it doesn't belong to rows."""
    weight = module.weight
    if weight is None:
        return _cut(view, (begin, end), weight_rows(module)) if local in {"weight", "bias"} else view
    rows, scale_rows = weight.shape[0], weight.scale_shape[0]
    axis = Axis.ROWS if local == "bias" else weight.axes.get(local)
    if axis is Axis.ROWS:
        return _cut(view, (begin, end), rows)
    if axis is Axis.SCALE_ROWS and local == weight.zero_point and weight.zero_point_packing is not None:
        elements = weight.zero_point_packing.elements
        return _cut(view, (elements(begin), elements(end)), elements(rows))
    if axis is Axis.SCALE_ROWS and scale_rows > 1:
        size = weight.block_rows
        return _cut(view, (begin // size, -(-end // size)), scale_rows)
    return view


def _cut(view: View, bounds: tuple[int, int], rows: int) -> View:
    """Return the rows within `bounds` of a tensor with `rows` rows.

    If the first axis of the tensor is not the rows, the result has the shape [rows, elements per row].
    """
    per_row = view.spec.numel // rows
    count = bounds[1] - bounds[0]
    shape = view.spec.shape
    narrowed = (count, *shape[1:]) if shape[0] == rows else (count, per_row)
    return Rows(view=view, begin=bounds[0] * per_row, spec=TensorSpec(view.spec.dtype, narrowed))


def _narrow_delivery(delivery: Delivery, module: ModulePlan, changed: set[str], begin: int, end: int) -> Delivery:
    """Return a delivery with fewer rows if the tensors that it is made from have fewer; otherwise unchanged."""
    operation = delivery.operation
    from_codes = operation.source is None and not isinstance(operation, Ones | Padding)
    if not operation.result.shape or not (from_codes or operation.source in changed):
        return delivery
    size = weight_rows_per_row(operation, module.weight)
    return delivery._replace(operation=_with_rows(operation, -(-end // size) - begin // size))


def _with_rows(operation: Operation, rows: int) -> Operation:
    """Return the operation with another number of rows in its result."""
    result = TensorSpec(operation.result.dtype, (rows, *operation.result.shape[1:]))
    if isinstance(operation, Slice):
        return replace(operation, result=result, operation=_with_rows(operation.operation, rows))
    return replace(operation, result=result)


def _rows_in_whole_words(packing: Packing) -> int:
    """Return the smallest number of packed rows that fills whole words."""
    if not packing.dense:
        return packing.container.bits // packing.bits
    return packing.container.bits // gcd(packing.container.bits, packing.bits)

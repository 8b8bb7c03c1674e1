"""The pieces of each module that the ranks of an engine get, and the places of their tensors in the files.

A piece is a plan of the rows that a rank has (`plan/ranks/narrow.py`), so it is read, checked and converted like any
other module. Columns, and rows that can't be cut in the stored form of a weight, are slices of what an operation
delivers. A delivered tensor is called `rank0/NAME`, and `rank0/NAME:PART` if it is joined with other parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.write_plan import Segment, StackPart
from trtllm_ct.engine.build_mode import BuildTensor, Content, Extent, RowBias
from trtllm_ct.plan.engine_files.cache import cache_scales, without_cache
from trtllm_ct.plan.engine_files.tensors import Item, held_items, norm_items, peer_views, plain_items
from trtllm_ct.plan.plan import Delivery
from trtllm_ct.plan.rank_ops import Padding, Slice
from trtllm_ct.plan.ranks.narrow import can_narrow, narrow, row_unit, weight_rows, weight_rows_per_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.mixed_gemm import KernelOrder
    from trtllm_ct.plan.engine_files.choice import Choice
    from trtllm_ct.plan.engine_files.layout import Layout, RankPlace, Spot
    from trtllm_ct.plan.ops import Operation
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["rank_modules"]

_SCALED_NORMS = frozenset({"input_layernorm", "post_layernorm"})


def rank_modules(
    modules: Iterable[ModulePlan], layout: Layout, choice: Choice, dtype: DType
) -> tuple[tuple[ModulePlan, ...], dict[str, Segment | StackPart]]:
    """Return the plans of all modules with the pieces of all ranks, and the place of each delivered tensor.

    `modules` are the plans that deliver every module plain; those that `choice` holds get the tensors of their mode.
    """
    writer = _Ranks(layout=layout, choice=choice, dtype=dtype, plans={module.name: module for module in modules})
    return tuple(writer.modules()), writer.places


@dataclass(slots=True, kw_only=True)
class _Ranks:
    """Makes the pieces of all modules."""

    layout: Layout
    choice: Choice
    dtype: DType
    plans: Mapping[str, ModulePlan]
    places: dict[str, Segment | StackPart] = field(default_factory=dict)

    def modules(self) -> Iterator[ModulePlan]:
        """Yield the plans of all modules with their pieces."""
        caches = cache_scales(self.plans.values())
        for module in self.plans.values():
            pieces = list(self._pieces(self._in_mode(without_cache(module))))
            if module.name in caches:
                pieces += self._cache_pieces(*caches[module.name])
            deliveries = tuple(delivery for piece in pieces for delivery in piece.deliveries)
            yield replace(self._in_mode(module), deliveries=deliveries, pieces=tuple(pieces))

    def _in_mode(self, module: ModulePlan) -> ModulePlan:
        """Return the plan of a module as one in its mode, if it has one."""
        held = self.choice.held.get(module.name)
        if held is None:
            return module
        read = {"input_scale", "input_global_scale"}
        used = read if any(tensor.content is Content.INPUT_SCALE for tensor in held.mode.tensors) else set()
        ignored = {local: reason for local, reason in module.ignored.items() if local not in used}
        return replace(
            module,
            ignored=ignored,
            layer=held.layer,
            reason=held.equalized.reason,
            note=self.choice.notes.get(module.name, ""),
        )

    def _pieces(self, module: ModulePlan) -> Iterator[ModulePlan]:
        """Yield the pieces of a module, one for each rank that has a part of it."""
        spot = self.layout.spot(module.name)
        if spot is None or not (module.deliveries or module.name in self.choice.held):
            return
        parts = [self._in_mode(self.plans[name]) for name in spot.parts if name in self.plans]
        whole, items = self._whole(module, parts, spot)
        for place in self.layout.ranks(spot):
            yield self._piece(whole, items, spot, place)
        if self.layout.model.tied and spot.name == self.layout.table:
            for place in self.layout.ranks(spot, head=True):
                yield self._piece(whole, items, spot, place, head=True)

    def _whole(self, module: ModulePlan, parts: list[ModulePlan], spot: Spot) -> tuple[ModulePlan, tuple[Item, ...]]:
        """Return the plan of a whole module whose deliveries are those of its items, and these items."""
        held = self.choice.held.get(module.name)
        others = tuple(part for part in parts if part.name in self.choice.held)
        mode = self.choice.mode if spot.name in _SCALED_NORMS else None
        items = plain_items(module.deliveries, module.views, spot.name) + norm_items(mode, self.dtype)
        views = module.views
        if held is not None:
            biases = [delivery for delivery in module.deliveries if delivery.name.endswith(".bias")]
            items = held_items(module, others, held, self.dtype) + plain_items(biases, module.views, spot.name)
            views = {**module.views, **peer_views(module, others)}
        deliveries = tuple(Delivery(item.tensor.name, item.operation, item.sources) for item in items)
        return replace(module, views=views, deliveries=deliveries, fused_linear=None, experts=None), items

    def _piece(
        self, whole: ModulePlan, items: tuple[Item, ...], spot: Spot, place: RankPlace, *, head: bool = False
    ) -> ModulePlan:
        """Return the piece of one rank, and remember the places of its tensors."""
        begin, end = 0, 0
        piece, rows = whole, 0
        if self._has_rows(whole):
            rows = weight_rows(whole)
            begin, end = (
                self.layout.head_rows(place.tensor, rows) if head else self.layout.rows(whole.name, place.tensor, rows)
            )
            piece = _cut_rows(whole, items, begin, end, rows)
        first, total = self._joined_rows(whole.name, spot, place, end - begin, head=head)
        deliveries: list[Delivery] = []
        for item, delivery in zip(items, piece.deliveries, strict=True):
            if not self._delivers(item.tensor, whole.name, spot):
                continue
            operation = self._columns(item.tensor, delivery.operation, whole, place)
            sources = delivery.sources
            if item.tensor.name == "bias" and self._zeroes_bias(whole.name, place):
                operation, sources = Padding(result=operation.result), ()
            deliveries += self._delivery(item.tensor, operation, sources, spot, place, (first, total), whole)
        return replace(piece, deliveries=tuple(deliveries))

    def _delivers(self, tensor: BuildTensor, module: str, spot: Spot) -> bool:
        """Whether a part of a Linear delivers a tensor; those of the whole Linear are delivered by its first part."""
        if tensor.row_parallel and not self.layout.is_row_parallel(module):
            return False
        return tensor.extent in {Extent.MATRIX, Extent.ROWS} or module == spot.parts[0]

    def _zeroes_bias(self, module: str, place: RankPlace) -> bool:
        """Whether a rank gets zeros as the bias of a module: kernels add it before the ranks are added up."""
        held = self.choice.held.get(module)
        in_file = held is not None and held.mode.row_bias is RowBias.ZEROED_IN_FILE
        return in_file and place.tensor > 0 and self.layout.is_row_parallel(module)

    def _columns(self, tensor: BuildTensor, operation: Operation, whole: ModulePlan, place: RankPlace) -> Operation:
        """Return the operation with the columns of the rank."""
        if tensor.extent not in {Extent.MATRIX, Extent.COLUMNS}:
            return operation
        width = operation.result.shape[-1]
        begin, end = self.layout.columns(whole.name, place.tensor, width)
        if (begin, end) == (0, width):
            return operation
        if tensor.extent is Extent.COLUMNS:
            return replace(operation, result=TensorSpec(operation.result.dtype, (end - begin,)))
        return Slice.of(operation, 1, begin, end)

    def _delivery(
        self,
        tensor: BuildTensor,
        operation: Operation,
        sources: tuple[str, ...],
        spot: Spot,
        place: RankPlace,
        rows: tuple[int, int],
        whole: ModulePlan,
    ) -> Iterator[Delivery]:
        """Yield the delivery of one tensor to one rank, and of the padding behind it; remember their places.

        `rows` are the first row of the part in its Linear on this rank, and the number of rows of the Linear there.
        """
        stack = f"rank{place.rank}/{place.name}.{tensor.name}"
        name = stack if len(spot.parts) == 1 and spot.expert is None else f"{stack}:{_part(whole.name, spot)}"
        in_one = weight_rows_per_row(operation, whole.weight)
        first, total = (count // in_one for count in rows)
        made = operation.result
        if tensor.extent in {Extent.SCALAR, Extent.COLUMNS}:
            shape = made.shape or (1,)
            self.places[name] = Segment(stack=stack, shape=(1, *shape) if tensor.leading else shape)
        elif tensor.kernel_order:
            order = self.choice.held[whole.name].mode.order
            self.places[name] = _in_stream(stack, order, made, first, total)
        elif tensor.transposed:
            self.places[name] = StackPart(stack=stack, line=first, lines=total, flat=True)
        else:
            self.places[name] = self._segment(stack, tensor, spot, made, first, total)
        yield Delivery(name, operation, sources)
        if place.name == self.layout.head and made.shape[0] < total:
            padding = Padding(result=TensorSpec(made.dtype, (total - made.shape[0], *made.shape[1:])))
            self.places[f"{stack}:padding"] = Segment(stack=stack, shape=(total, *made.shape[1:]), first=made.numel)
            yield Delivery(f"{stack}:padding", padding)

    def _segment(
        self, stack: str, tensor: BuildTensor, spot: Spot, made: TensorSpec, first: int, total: int
    ) -> Segment:
        """Return the place of rows in their tensor; the experts of a layer are stacked along a new first axis."""
        per_row = made.numel // made.shape[0] if made.shape[0] else 1
        shape: tuple[int, ...] = (total, *made.shape[1:])
        if spot.expert is not None:
            return Segment(stack=stack, shape=(spot.experts, *shape), first=(spot.expert * total + first) * per_row)
        return Segment(stack=stack, shape=(1, *shape) if tensor.leading else shape, first=first * per_row)

    def _joined_rows(self, module: str, spot: Spot, place: RankPlace, rows: int, *, head: bool) -> tuple[int, int]:
        """Return the first row of a part in its Linear on a rank, and the number of rows of the Linear there."""
        if head or place.name == self.layout.head:
            return 0, self.layout.padded_rows(weight_rows(self.plans[module]))
        first = total = 0
        for name in spot.parts:
            part = self.plans.get(name)
            if name == module:
                first, total = total, total + rows
            elif part is not None:
                begin, end = self.layout.rows(name, place.tensor, weight_rows(part))
                total += end - begin
        return first, total

    def _cache_pieces(self, attention: str, plan: ModulePlan, item: Item) -> Iterator[ModulePlan]:
        """Yield the pieces that deliver the scale of a layer's KV cache to each rank of the layer's stage."""
        layer = self.layout.layer_of(attention)
        if layer is None:
            return
        for place in self.layout.ranks(self.layout.attention(layer)):
            name = f"rank{place.rank}/{place.name}.{item.tensor.name}"
            self.places[name] = Segment(stack=name, shape=(1,))
            yield replace(plan, deliveries=(Delivery(name, item.operation, item.sources),))

    @staticmethod
    def _has_rows(module: ModulePlan) -> bool:
        """Whether a module has a weight whose rows can be counted."""
        return module.weight is not None or "weight" in module.views


def _cut_rows(module: ModulePlan, items: tuple[Item, ...], begin: int, end: int, rows: int) -> ModulePlan:
    """Return the plan of some rows of a module: of stored rows where they can be cut, or else of delivered rows.

    `items` are those that it delivers, in the same order.
    """
    if (begin, end) == (0, rows):
        return module
    unit = row_unit(module)
    if can_narrow(module) and begin % unit == 0 and (end % unit == 0 or end == rows):
        return narrow(module, begin, end)
    deliveries = []
    for item, delivery in zip(items, module.deliveries, strict=True):
        operation = delivery.operation
        in_one = weight_rows_per_row(operation, module.weight)
        if item.tensor.extent in {Extent.MATRIX, Extent.ROWS}:
            operation = Slice.of(operation, 0, begin // in_one, end // in_one)
        deliveries.append(delivery._replace(operation=operation))
    return replace(module, deliveries=tuple(deliveries))


def _in_stream(stack: str, order: KernelOrder | None, made: TensorSpec, first: int, total: int) -> Segment:
    """Return the place of codes in the order of a kernel, of `total` bundles of rows of which `first` come before.

    The file has the shape [in, out / codes in an element]; bytes of later rows come later all the same.
    """
    if order is None:
        raise AssertionError("a mode with codes in the order of a kernel has that order")
    per_bundle, in_element = made.shape[1], made.dtype.bits // order.bits
    shape = (per_bundle * in_element // order.bundle, total * order.bundle // in_element)
    return Segment(stack=stack, shape=shape, first=first * per_bundle)


def _part(module: str, spot: Spot) -> str:
    """Return a name of a part that is unique in its tensor."""
    leaf = module.rpartition(".")[2]
    return leaf if spot.expert is None else f"{spot.expert}.{leaf}"

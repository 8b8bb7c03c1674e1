"""`plan_for_rank`: restricts a plan for all ranks to what one rank reads, converts and receives.

Engines slice every Linear themselves and expect tensors of full logical shape. So a rank receives tensors of full
shape, but only the rows of its slice are read and converted. The other rows are allocated and never touched, so they
take no memory.

| module                              | read and converted        | delivered to the engine                      |
|-------------------------------------|---------------------------|----------------------------------------------|
| sliced along N                      | the rank's rows           | tensors of full shape; those that need no    |
| K and V with fewer heads than ranks | the rows of its head      | change are views of the file                 |
| sliced along K, or not sliced       | all of it                 | all of it                                    |
| in another stage, or another expert | nothing                   | nothing, with the exceptions below           |
| embedding, head                     | the rank's rows of a view | all of it                                    |

The exceptions: engines read some scalars of every expert, and they fuse the last layer of a stage with the first norm
of the next one.
Source: TensorRT-LLM `_torch/models/modeling_utils.py` (`__pp_init__`, `duplicate_kv_weight`),
`checkpoints/hf/weight_mapper.py`, `_torch/modules/fused_moe/quantization.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.ops import Copy, Reinterpret
from trtllm_ct.plan.plan import ModulePlan, Place, Share
from trtllm_ct.plan.ranks.cuts import cut_of
from trtllm_ct.plan.ranks.narrow import can_narrow, narrow, row_unit, weight_rows, weight_rows_per_row
from trtllm_ct.plan.ranks.planned_model import model_of_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.engine.parallel import Rank
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.plan import Delivery, Plan

__all__ = ["plan_for_rank"]

_PLAIN_REPEATED = frozenset({"weight", "bias"})
"""Tensors of plain modules that engines repeat when there are more ranks than K/V heads."""

_VIEWS = (Copy, Reinterpret)
"""Operations whose result is a view of the stored tensor."""


def plan_for_rank(plan: Plan, model: Model, rank: Rank) -> Plan:
    """Return the plan of one rank: the modules that it uses, restricted to the parts that the rank reads and receives.

    `plan` must have been made for the rank's parallel sizes. Delivered tensors keep their names. They keep their shapes
    too, except for K and V when there are more ranks than heads: scales that engines don't repeat then have the rows of
    one head for each rank.
    """
    if plan.parallel != rank.parallel:
        raise AssertionError(f"the plan holds slices for {plan.parallel}, and not for {rank.parallel}")
    return replace(plan, modules=tuple(_Shard(plan, model_of_plan(plan, model), rank).modules()))


@dataclass(slots=True)
class _Shard:
    """Makes the module plans of one rank."""

    plan: Plan
    model: Model
    rank: Rank
    _sites: Mapping[str, Site] = field(init=False)
    _in_layer: re.Pattern[str] = field(init=False)
    _in_expert: re.Pattern[str] | None = field(init=False, default=None)
    _head: str = field(init=False)

    def __post_init__(self) -> None:
        place = self.model.place(self.plan.by_name)
        self._sites = {site.module: site for site in self.model.sites(place)}
        self._head = place[1]
        layer = re.escape(place[0]) + r"layers\.(\d+)\."
        self._in_layer = re.compile(layer)
        if self.model.experts:
            self._in_expert = re.compile(rf"{layer}{re.escape(self.model.experts)}\.(\d+)\.")

    def modules(self) -> Iterator[ModulePlan]:
        """Yield the plans of the rank's modules, in the order of the whole plan."""
        for module in self.plan.modules:
            if not self._in_stage(module):
                continue
            site = self._sites.get(module.name)
            if not self._has_expert(module):
                yield from _scalars_of_expert(module)
            elif site is not None and cut_of(site, self.rank.parallel) is Cut.VOCABULARY:
                yield self._table(module)
            else:
                yield module if site is None else self._slice(module, site)

    def _in_stage(self, module: ModulePlan) -> bool:
        """Whether the rank's pipeline stage uses a module; a module in no layer of the model is in every stage."""
        match = self._in_layer.match(module.name)
        layers = self.rank.layers
        if match is None or layers is None or int(match[1]) >= self.model.layers:
            return True
        # Engines compute the first norm of the next stage together with the last layer of this one.
        return int(match[1]) in layers or (int(match[1]) - 1 in layers and module.name.endswith(".input_layernorm"))

    def _has_expert(self, module: ModulePlan) -> bool:
        """Whether a module is one of the rank's routed experts, or no routed expert at all."""
        match = self._in_expert.match(module.name) if self._in_expert else None
        if match is None:
            return True
        experts_per_rank = self.model.sizes["experts"] // self.rank.parallel.expert
        return int(match[2]) // experts_per_rank == self.rank.expert

    def _slice(self, module: ModulePlan, site: Site) -> ModulePlan:
        """Return the plan of the rank's rows of a module, or of the whole module if it is not sliced along N."""
        cut = cut_of(site, self.rank.parallel)
        ranks = self.rank.parallel.expert_tensor if site.expert else self.rank.parallel.tensor
        index = self.rank.expert_tensor if site.expert else self.rank.tensor
        vary = site.ranks_vary or (self.rank.parallel.attention_dp and not site.expert)
        if ranks == 1 or cut not in {Cut.COLUMN, Cut.KV_HEADS} or site.parts or vary:
            return module
        rows = weight_rows(module)
        repeats = max(1, ranks // site.heads) if site.heads else 1
        size = rows * repeats // ranks
        return _share(module, index // repeats * size, size, repeats, index)

    def _table(self, module: ModulePlan) -> ModulePlan:
        """Return the plan of the embedding or the head; it is delivered whole, since some releases don't slice it."""
        if module.layer is not None or not all(_is_view(delivery, module) for delivery in module.deliveries):
            return module if self._uses_table(module) else _without_tensors(module)
        rows = weight_rows(module)
        size = -(-rows // self.rank.parallel.tensor) if self._uses_table(module) else 0
        begin = min(self.rank.tensor * size, rows)
        end = min(begin + size, rows)
        views = frozenset(delivery.name for delivery in module.deliveries)
        return replace(module, share=Share(begin=begin, end=end, module=narrow(module, begin, end), views=views))

    def _uses_table(self, module: ModulePlan) -> bool:
        """Whether the rank's stage computes with the embedding or the head.

        The first stage uses the embedding and the last one the head. The last stage uses the embedding too if it is
        tied to the head or if the model has draft layers.
        """
        first, last = self.rank.pipeline == 0, self.rank.pipeline == self.rank.parallel.pipeline - 1
        if module.name == self._head:
            return last
        return first or (last and (self.model.tied or self.model.draft_layers > 0))


def _scalars_of_expert(module: ModulePlan) -> Iterator[ModulePlan]:
    """Yield the plan of the scalars that every rank reads of an expert of another rank; nothing if there are none."""
    names = MODES_BY_ALGO[module.layer.quant_algo].read_of_all_experts if module.layer else frozenset()
    scalars = tuple(delivery for delivery in module.deliveries if delivery.name.rpartition(".")[2] in names)
    if scalars:
        whole = replace(module, deliveries=scalars)
        yield replace(whole, weight=None, share=Share(begin=0, end=0, module=narrow(whole, 0, 0)))


def _without_tensors(module: ModulePlan) -> ModulePlan:
    """Return the plan of a module of which this rank reads and receives nothing."""
    return replace(module, views={}, ignored={}, deliveries=(), weight=None)


def _share(module: ModulePlan, begin: int, size: int, repeats: int, index: int) -> ModulePlan:
    """Return the module's plan with the share of one rank: the `size` rows from `begin` on.

    `index` is the number of the rank among those that divide the module. `repeats` ranks have the same rows.
    """
    rows, unit = weight_rows(module), row_unit(module)
    first, last = (
        (begin // unit * unit, min(-(-(begin + size) // unit) * unit, rows)) if can_narrow(module) else (0, rows)
    )
    part = module if (first, last) == (0, rows) else narrow(module, first, last)
    deliveries, places, views = [], {}, set()
    for delivery, narrowed in zip(module.deliveries, part.deliveries, strict=True):
        in_one = weight_rows_per_row(delivery.operation, module.weight)
        if repeats > 1 and _is_left_unrepeated(delivery, module):
            deliveries.append(_with_rows(delivery, rows * repeats // in_one))
            place = Place(first=(begin - first) // in_one, count=size // in_one, at=index * size // in_one)
            places[delivery.name] = place
            continue
        deliveries.append(delivery)
        if narrowed is delivery:
            continue
        if _is_view(delivery, module):
            views.add(delivery.name)
        else:
            places[delivery.name] = Place(first=0, count=narrowed.spec.shape[0], at=first // in_one)
    if not places and not views:
        return module
    share = Share(begin=first, end=last, module=part, places=places, views=frozenset(views))
    return replace(module, deliveries=tuple(deliveries), share=share)


def _is_view(delivery: Delivery, module: ModulePlan) -> bool:
    """Whether a delivered tensor is a view of one stored tensor in the file."""
    operation = delivery.operation
    return (
        type(operation) in _VIEWS and operation.source is not None and module.views[operation.source].offset is not None
    )


def _is_left_unrepeated(delivery: Delivery, module: ModulePlan) -> bool:
    """Whether a tensor of a K or V module has rows that engines don't repeat when there are more ranks than heads."""
    local = delivery.name.rpartition(".")[2]
    repeated = MODES_BY_ALGO[module.layer.quant_algo].repeated_with_kv_heads if module.layer else _PLAIN_REPEATED
    return bool(delivery.spec.shape) and local not in repeated


def _with_rows(delivery: Delivery, rows: int) -> Delivery:
    """Return the delivery with another number of rows."""
    spec = delivery.spec
    result = TensorSpec(spec.dtype, (rows, *spec.shape[1:]))
    return delivery._replace(operation=replace(delivery.operation, result=result))

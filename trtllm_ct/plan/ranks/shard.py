"""`plan_for_rank`: of a plan for all ranks, what one of them reads, converts and is handed.

Engines cut every Linear themselves and want tensors of full logical shape. So a rank is handed those, but only the rows
that it will take out of them are read and converted; the rest is memory that nobody touches.

| module                            | read and converted         | handed over                                  |
|-----------------------------------|----------------------------|----------------------------------------------|
| cut along N                       | the rank's rows            | full shape; a tensor that stays as it is, as |
| K and V with fewer heads than ranks | the rows of its head     | a view of the file                           |
| cut along K, or not cut           | all of it                  | all of it                                    |
| of other stages, other experts    | nothing                    | nothing, but see below                       |
| embedding, head                   | the rank's rows of a view  | all of it                                    |

Engines read some scalars of every expert, and fuse the last layer of a stage with the first norm of the next one.
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
from trtllm_ct.plan.ranks.narrow import can_narrow, narrow, row_unit, rows_in_one, weight_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.engine.parallel import Rank
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.plan import Delivery, Plan

__all__ = ["plan_for_rank"]

_PLAIN_REPEATED = frozenset({"weight", "bias"})
"""Tensors of plain modules that engines repeat when ranks outnumber K/V heads."""

_VIEWS = (Copy, Reinterpret)
"""Operations that hand on what is stored."""


def plan_for_rank(plan: Plan, model: Model, rank: Rank) -> Plan:
    """The plan of one rank: the modules that it uses, with what it reads of them and what it is handed.

    `plan` was made for the rank's parallel sizes. Delivered tensors keep their names, and their shapes but for K and V
    with fewer heads than ranks: scales that engines don't repeat have a head for each rank.
    """
    if plan.parallel != rank.parallel:
        raise AssertionError(f"the plan holds slices for {plan.parallel}, and not for {rank.parallel}")
    return replace(plan, modules=tuple(_Shard(plan, model, rank).modules()))


@dataclass(slots=True)
class _Shard:
    """What the modules of one rank's plan share."""

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
        if self.model.architecture.experts is not None:
            self._in_expert = re.compile(rf"{layer}{re.escape(self.model.architecture.experts.path)}\.(\d+)\.")

    def modules(self) -> Iterator[ModulePlan]:
        """The plans of the rank's modules, in the order of the whole."""
        for module in self.plan.modules:
            if not self._in_stage(module):
                continue
            site = self._sites.get(module.name)
            if not self._has_expert(module):
                yield from _scalars_of_expert(module)
            elif site is not None and cut_of(site, self.rank.parallel) is Cut.VOCABULARY:
                yield self._table(module)
            else:
                yield module if site is None else self._cut(module, site)

    def _in_stage(self, module: ModulePlan) -> bool:
        """Whether a module lies in the rank's pipeline stage; what is in no layer of the model is in every stage."""
        found = self._in_layer.match(module.name)
        layers = self.rank.layers
        if found is None or layers is None or int(found[1]) >= self.model.layers:
            return True
        # The norm at the entrance of the next stage is computed with the end of this one.
        return int(found[1]) in layers or (int(found[1]) - 1 in layers and module.name.endswith(".input_layernorm"))

    def _has_expert(self, module: ModulePlan) -> bool:
        """Whether a module is no routed expert, or one of the rank's."""
        found = self._in_expert.match(module.name) if self._in_expert else None
        if found is None or self.model.architecture.experts is None:
            return True
        each = self.model.sizes[self.model.architecture.experts.count] // self.rank.parallel.expert
        return int(found[2]) // each == self.rank.expert

    def _cut(self, module: ModulePlan, site: Site) -> ModulePlan:
        """The rank's rows of a module, or all of it where it is not cut along N."""
        cut = cut_of(site, self.rank.parallel)
        ranks = self.rank.parallel.expert_tensor if site.expert else self.rank.parallel.tensor
        own = self.rank.expert_tensor if site.expert else self.rank.tensor
        vary = site.ranks_vary or (self.rank.parallel.attention_dp and not site.expert)
        if ranks == 1 or cut not in {Cut.COLUMN, Cut.KV_HEADS} or site.parts or vary:
            return module
        rows = weight_rows(module)
        repeats = max(1, ranks // site.heads) if site.heads else 1
        size = rows * repeats // ranks
        return _share(module, own // repeats * size, size, repeats, own)

    def _table(self, module: ModulePlan) -> ModulePlan:
        """The embedding or the head: handed over whole, since engines of some releases don't cut it."""
        if not all(_is_view(delivery, module) for delivery in module.deliveries):
            return module if self._uses_table(module) else _left_to_others(module)
        rows = weight_rows(module)
        size = -(-rows // self.rank.parallel.tensor) if self._uses_table(module) else 0
        begin = min(self.rank.tensor * size, rows)
        end = min(begin + size, rows)
        views = frozenset(delivery.name for delivery in module.deliveries)
        return replace(module, share=Share(begin=begin, end=end, module=narrow(module, begin, end), views=views))

    def _uses_table(self, module: ModulePlan) -> bool:
        """Whether the stage computes with it: the first with the embedding, the last with the head or what it ties."""
        first, last = self.rank.pipeline == 0, self.rank.pipeline == self.rank.parallel.pipeline - 1
        if module.name == self._head:
            return last
        return first or (last and (self.model.tied or self.model.draft_layers > 0))


def _scalars_of_expert(module: ModulePlan) -> Iterator[ModulePlan]:
    """What engines read of an expert on another rank; its codes are not read."""
    names = MODES_BY_ALGO[module.layer.quant_algo].read_of_all_experts if module.layer else frozenset()
    kept = tuple(each for each in module.deliveries if each.name.rpartition(".")[2] in names)
    if kept:
        whole = replace(module, deliveries=kept)
        yield replace(whole, weight=None, share=Share(begin=0, end=0, module=narrow(whole, 0, 0)))


def _left_to_others(module: ModulePlan) -> ModulePlan:
    """A module of which this rank reads nothing and is handed nothing."""
    return replace(module, views={}, ignored={}, deliveries=(), weight=None)


def _share(module: ModulePlan, begin: int, size: int, repeats: int, own: int) -> ModulePlan:
    """The module with the share of rank `own`: `size` rows from `begin` on, which `repeats` ranks have in common."""
    rows, unit = weight_rows(module), row_unit(module)
    first, last = (
        (begin // unit * unit, min(-(-(begin + size) // unit) * unit, rows)) if can_narrow(module) else (0, rows)
    )
    part = module if (first, last) == (0, rows) else narrow(module, first, last)
    deliveries, places, views = [], {}, set()
    for delivery, narrowed in zip(module.deliveries, part.deliveries, strict=True):
        in_one = rows_in_one(delivery.operation, module.weight)
        if repeats > 1 and _is_left_unrepeated(delivery, module):
            deliveries.append(_with_rows(delivery, rows * repeats // in_one))
            taken = Place(first=(begin - first) // in_one, count=size // in_one, at=own * size // in_one)
            places[delivery.name] = taken
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
    """Whether a delivered tensor is a stored one as it lies in the file."""
    operation = delivery.operation
    return (
        type(operation) in _VIEWS and operation.source is not None and module.views[operation.source].offset is not None
    )


def _is_left_unrepeated(delivery: Delivery, module: ModulePlan) -> bool:
    """Whether a tensor has rows of K or V heads that engines don't repeat for ranks that outnumber the heads."""
    local = delivery.name.rpartition(".")[2]
    repeated = MODES_BY_ALGO[module.layer.quant_algo].repeated_with_kv_heads if module.layer else _PLAIN_REPEATED
    return bool(delivery.spec.shape) and local not in repeated


def _with_rows(delivery: Delivery, rows: int) -> Delivery:
    """The same delivery of another number of rows."""
    spec = delivery.spec
    result = TensorSpec(spec.dtype, (rows, *spec.shape[1:]))
    return delivery._replace(operation=replace(delivery.operation, result=result))

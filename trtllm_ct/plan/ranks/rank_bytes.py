"""`largest_rank_bytes`: the bytes of the weights that one rank of an engine holds, where ranks differ the largest.

Every delivered tensor is counted with the slice that the rank takes of it. What engines make of the weights after
loading, such as padded scales, is not counted, nor are the scalars of other ranks' experts.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import InitVar, dataclass, field, replace
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.engine.parallel import ONE_RANK, Cut
from trtllm_ct.plan.engine_files.layout import stages_of
from trtllm_ct.plan.ranks.cuts import cut_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.plan import Delivery, ModulePlan

__all__ = ["RankBytes", "bytes_of_rank_files", "largest_rank_bytes"]

_RANK = re.compile(r"rank(\d+)/")
_MATRIX = 2
_VARYING_BLOCK = 128
"""Linears of which ranks may take other slices are divided into whole blocks of FP8 scales, of so many rows."""

_ROWS = frozenset({"weight", "bias", "weight_scale", "weight_scale_inv", "weight_zero"})
"""Tensors with a row, or part of one, for each output of a Linear; scalars of these names have none."""

_COLUMNS = frozenset({"weight", "weight_scale", "weight_scale_inv", "weight_zero"})
"""Tensors with a column, or part of one, for each input of a Linear, if they are matrices of several columns."""

_INPUTS = frozenset({"pre_quant_scale"})
"""Tensors with an element for each input of a Linear."""


def largest_rank_bytes(modules: Sequence[ModulePlan], model: Model, place: tuple[str, str], parallel: Parallel) -> int:
    """Return the bytes of the delivered weights on the rank that has most of them.

    `modules` are the plans of all modules, and `place` is what `Model.place` returns. The sizes of `parallel` must
    divide the model evenly. Modules that are no Linears, embeddings or heads of the text model are on every rank, those
    of a layer on the ranks of its stage.
    """
    if parallel == ONE_RANK:
        return sum(module.delivered_bytes for module in modules)
    return RankBytes(modules, model, place, parallel).largest(parallel.tensor)


def bytes_of_rank_files(deliveries: Iterable[Delivery]) -> int:
    """Return the bytes of the largest file of a directory with a file for each rank, by the names of its tensors."""
    files: Counter[str] = Counter()
    for delivery in deliveries:
        rank = _RANK.match(delivery.name)
        files[rank[1] if rank else ""] += delivery.spec.nbytes
    return max(files.values(), default=0)


class _Kind(NamedTuple):
    """Modules of which every rank takes the same bytes: one of them, with its site, None if it has none.

    `stacked` marks those that hold all routed experts.
    """

    module: ModulePlan
    site: Site | None
    stacked: bool


@dataclass(slots=True)
class RankBytes:
    """The bytes of ranks for several tensor-parallel sizes; the other sizes are those of `parallel`.

    The 10^5 modules of a large model are looked at once: they are of few kinds, which are counted for each pipeline
    stage, and in it for each share of the routed experts.
    """

    modules: InitVar[Iterable[ModulePlan]]
    model: Model
    place: tuple[str, str]
    parallel: Parallel
    _sites: Mapping[str, Site] = field(init=False)
    _stage_of: Mapping[int, int] = field(init=False)
    _in_layer: re.Pattern[str] = field(init=False)
    _expert: re.Pattern[str] | None = field(init=False, default=None)
    _kinds: dict[tuple[object, ...], _Kind] = field(init=False, default_factory=dict)
    _counts: Counter[tuple[Sequence[int], int | None, tuple[object, ...]]] = field(init=False, default_factory=Counter)

    def __post_init__(self, modules: Iterable[ModulePlan]) -> None:
        self._sites = {site.module: site for site in self.model.sites(self.place)}
        stages = stages_of(self.model.layers, self.parallel.pipeline)
        self._stage_of = {layer: stage for stage, layers in enumerate(stages) for layer in layers}
        layer = re.escape(self.place[0]) + r"layers\.(\d+)\."
        self._in_layer = re.compile(layer)
        if self.model.experts:
            self._expert = re.compile(rf"{layer}{re.escape(self.model.experts)}(?:\.(\d+))?(?:\.|$)")
        for module in modules:
            self._count(module)

    def largest(self, tensor: int) -> int:
        """Return the bytes of the rank that has most of them at a tensor-parallel size."""
        parallel = replace(self.parallel, tensor=tensor)
        ranks: Counter[tuple[int, int]] = Counter()
        for (stages, share, key), count in self._counts.items():
            nbytes = count * _bytes(self._kinds[key], parallel)
            for stage in stages:
                for index in range(parallel.expert) if share is None else (share,):
                    ranks[stage, index] += nbytes
        return max(ranks.values(), default=0)

    def _count(self, module: ModulePlan) -> None:
        """Count a module among those of its kind, stage and share of the experts."""
        expert = self._expert.match(module.name) if self._expert else None
        stacked = expert is not None and expert[2] is None
        share = self._share(int(expert[2])) if expert is not None and expert[2] is not None else None
        site = self._sites.get(module.name)
        # The plans of modules that are alike share their operations.
        key: tuple[object, ...] = (
            stacked,
            *[(id(made), name.rpartition(".")[2]) for name, made, _ in module.deliveries],
        )
        if site is not None:
            key += (site.cut, site.heads, site.expert, site.attention, site.ranks_vary, site.shape)
        self._kinds.setdefault(key, _Kind(module, site, stacked))
        self._counts[self._stages(module.name), share, key] += 1

    def _share(self, expert: int) -> int:
        """Return the number of the ranks that have an expert, among those that divide the experts."""
        per_rank = max(1, self.model.sizes["experts"] // self.parallel.expert)
        return min(expert // per_rank, self.parallel.expert - 1)

    def _stages(self, module: str) -> Sequence[int]:
        """Return the pipeline stages that have a module: the first has the embedding, the last head and draft layers.

        A head that uses the embedding is in the last stage, so that has the embedding too.
        """
        last = self.parallel.pipeline - 1
        layer = self._in_layer.match(module)
        if layer is not None:
            return (self._stage_of.get(int(layer[1]), last),)
        site = self._sites.get(module)
        if site is None or site.cut is not Cut.VOCABULARY:
            return range(self.parallel.pipeline)
        if site.head:
            return (last,)
        return (0, last) if last and (self.model.tied or self.model.draft_layers) else (0,)


def _bytes(kind: _Kind, parallel: Parallel) -> int:
    """Return the bytes that a rank has of a module of this kind."""
    if kind.stacked:  # Experts are divided among ranks, and each of them is sliced for the others.
        return -(-kind.module.delivered_bytes // parallel.tensor)
    if kind.site is None:
        return kind.module.delivered_bytes
    return sum(_slice(delivery, kind.site, parallel) for delivery in kind.module.deliveries)


def _slice(delivery: Delivery, site: Site, parallel: Parallel) -> int:
    """Return the bytes of a rank's slice of a tensor; a part of a byte counts as one."""
    nbytes, local = delivery.spec.nbytes, delivery.name.rpartition(".")[2]
    cut = cut_of(site, parallel)
    if not _is_divided(local, delivery.spec, cut):
        return nbytes
    if cut is Cut.VOCABULARY:
        rows = delivery.spec.shape[0]
        return nbytes // max(1, rows) * -(-rows // parallel.tensor)
    return -(-nbytes // _divisor(site, cut, parallel))


def _divisor(site: Site, cut: Cut, parallel: Parallel) -> int:
    """Return the number of different slices of a module."""
    ranks = parallel.expert_tensor if site.expert else parallel.tensor
    if cut is Cut.KV_HEADS and site.heads:
        return min(ranks, site.heads)
    if site.ranks_vary and len(site.shape) == _MATRIX:
        return gcd(site.shape[cut is Cut.ROW] // _VARYING_BLOCK, ranks) or 1
    return ranks


def _is_divided(local: str, spec: TensorSpec, cut: Cut) -> bool:
    """Whether ranks divide a tensor of a module, given its local name."""
    if not spec.shape or spec.numel <= 1:
        return False
    if cut is Cut.ROW:
        return local in _INPUTS or (local in _COLUMNS and len(spec.shape) >= _MATRIX and spec.shape[-1] > 1)
    return cut is not Cut.NONE and local in _ROWS

"""`gpu_rows`: what one GPU needs for a checkpoint at tensor-parallel sizes 1, 2, 4 and 8, and what is left of it.

The bytes of the weights are those of `plan/ranks/rank_bytes.py`, for a plan that is made for the size: at some sizes
modes don't hold the slices, and modules are dequantized. Where all modes of the plan for one rank hold them, that plan
is the one for the size, too. The KV cache is that of `plan/ranks/cache_bytes.py`. Activations, workspaces and what the
GPU's driver takes are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_form import fields_form
from trtllm_ct.engine.parallel import ONE_RANK
from trtllm_ct.engine.target import ENGINE
from trtllm_ct.pipeline.trials import Change, trials
from trtllm_ct.plan.ranks.cache_bytes import cache_shape
from trtllm_ct.plan.ranks.held import uneven_faults, unheld_modules
from trtllm_ct.plan.ranks.planned_model import model_of_plan
from trtllm_ct.plan.ranks.rank_bytes import RankBytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.options import PlanOptions
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.plan.ranks.cache_bytes import CacheShape

__all__ = ["MEMORIES", "TENSOR_SIZES", "TOKENS", "GpuRow", "Room", "gpu_rows"]

TENSOR_SIZES = (1, 2, 4, 8)
MEMORIES = tuple(size * 10**9 for size in (24, 48, 80, 141, 192))
"""The bytes of common GPUs: consumer Ada, Ada and Ampere of data centers, H100, H200, B200."""
TOKENS = 1000
"""The number of tokens that the bytes of the KV cache are given for."""
_MODULES = 60_000
"""How many modules are planned again for all sizes together; sizes that need more are left unknown."""
_BYTES_OF_CACHE = {"FP8": 1, "INT8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is left of a GPU with `gpu` bytes beside the weights, negative if they don't fit, and the tokens in it.

    Both are None if they are not known.
    """

    gpu: int
    left: int | None
    tokens: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """What a rank needs at one tensor-parallel size.

    `weights` are the bytes of the rank that has most of them, and `kv_cache` those of `TOKENS` tokens; None if they are
    not known, `reason` says why then. `dequantized` is the number of modules that are dequantized at this size.
    """

    tensor: int
    weights: int | None
    kv_cache: int | None
    dequantized: int | None
    reason: str
    rooms: tuple[Room, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rooms", tuple(map(self._room, MEMORIES)))

    def _room(self, gpu: int) -> Room:
        left = None if self.weights is None else gpu - self.weights
        tokens = max(0, left) * TOKENS // self.kv_cache if left is not None and self.kv_cache else None
        return Room(gpu=gpu, left=left, tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)


def gpu_rows(checkpoint: Checkpoint, plan: Plan, options: PlanOptions) -> tuple[GpuRow, ...]:
    """Return a row for each size of `TENSOR_SIZES`, and for the one of the plan.

    `options` are those that the plan was made with; its other parallel sizes stay as they are. Empty for a class of
    which it is not known how an engine divides it.
    """
    model = model_of_plan(plan, checkpoint.model)
    if not model.has_row:
        return ()
    sizes = sorted({*TENSOR_SIZES, plan.parallel.tensor})
    rows = _Rows(checkpoint, plan, options, model, model.place(plan.by_name))
    return rows.of([size for size in sizes if size % plan.parallel.expert == 0])


@dataclass(slots=True)
class _Rows:
    """Makes the rows of one plan; `place` is what `Model.place` returns."""

    checkpoint: Checkpoint
    plan: Plan
    options: PlanOptions
    model: Model
    place: tuple[str, str]
    _cache: CacheShape = field(init=False)
    _kinds: Mapping[Site, LayerQuantConfig] = field(init=False)

    def __post_init__(self) -> None:
        self._cache = cache_shape(self.model, self.place)
        self._kinds = _kinds_of(self.plan, self.model.sites(self.place))

    def of(self, sizes: Iterable[int]) -> tuple[GpuRow, ...]:
        """Return the rows of these tensor-parallel sizes."""
        rows: dict[int, GpuRow] = {}
        others = []
        ranks: RankBytes | None = None
        for size in sizes:
            parallel = replace(self.plan.parallel, tensor=size)
            uneven = uneven_faults(self.model, parallel)
            if uneven:
                rows[size] = self._unknown(size, f"{uneven[0].where}: {uneven[0].found}, {uneven[0].expected}")
            elif parallel == self.plan.parallel:
                rows[size] = self._row(self.plan, parallel, self.plan.rank_bytes)
            elif self._holds(parallel):
                ranks = ranks or RankBytes(self.plan.modules, self.model, self.place, self.plan.parallel)
                rows[size] = self._row(self.plan, parallel, ranks.largest(size))
            else:
                others.append(Change(f"--tp {size}", {"parallel": parallel}))
        for change, other in trials(self.checkpoint, self.plan, self.options, others, _MODULES):
            parallel = change.arguments["parallel"]
            reason = f"no plan can be made for {change.text}"
            row = self._row(other, parallel, other.rank_bytes) if other else self._unknown(parallel.tensor, reason)
            rows[parallel.tensor] = row
        for change in others:
            size = change.arguments["parallel"].tensor
            reason = f"modes differ at this size, and the model is too large to plan it again; use {change.text}"
            rows.setdefault(size, self._unknown(size, reason))
        return tuple(rows[size] for size in sorted(rows))

    def _holds(self, parallel: Parallel) -> bool:
        """Whether the modes of the plan are those of other sizes: none was chosen for slices, and all hold these."""
        if self.plan.parallel != ONE_RANK or self.options.to == ENGINE.name:
            return False
        return not unheld_modules(self._kinds, {site.module: mode for site, mode in self._kinds.items()}.get, parallel)

    def _row(self, plan: Plan, parallel: Parallel, weights: int) -> GpuRow:
        itemsize = _BYTES_OF_CACHE.get(plan.quant_config.kv_cache_quant_algo or "", plan.dtype.itemsize)
        cache = self._cache.rank_bytes(itemsize, parallel)
        return GpuRow(
            tensor=parallel.tensor,
            weights=weights,
            kv_cache=None if cache is None else cache * TOKENS,
            dequantized=sum(module.dequantized for module in plan.modules),
            reason="; ".join(filter(None, (self._cache.unknown, *self._cache.notes))),
        )

    def _unknown(self, tensor: int, reason: str) -> GpuRow:
        return GpuRow(tensor=tensor, weights=None, kv_cache=None, dequantized=None, reason=reason)


def _kinds_of(plan: Plan, sites: Iterable[Site]) -> dict[Site, LayerQuantConfig]:
    """Return one quantized module of each kind whose slices and mode are alike, with its mode."""
    modes = {module.name: module.layer for module in plan.modules if module.layer is not None}
    kinds: dict[tuple[object, ...], tuple[Site, LayerQuantConfig]] = {}
    for site in sites:
        mode = modes.get(site.module)
        if mode is not None:
            key = (id(mode), site.shape, site.cut, site.heads, site.parts, site.expert, site.fused, site.attention)
            kinds.setdefault(key, (site, mode))
    return dict(kinds.values())

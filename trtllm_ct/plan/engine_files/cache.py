"""The scale of the KV cache of each layer: the largest of those of keys and values, on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.engine.build_mode import BuildTensor, Content, Extent
from trtllm_ct.plan.engine_files.tensors import Item
from trtllm_ct.plan.rank_ops import LargestOf
from trtllm_ct.plan.stored import Shared

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.plan.plan import Delivery, ModulePlan

__all__ = ["CACHE_SCALE", "cache_scales", "without_cache"]

CACHE_SCALE = "kv_cache_scaling_factor"
_SUFFIXES = (".k_proj.k_scale", ".v_proj.v_scale")


class _Source(NamedTuple):
    """A stored scale: the module that holds it, and its delivery."""

    module: ModulePlan
    delivery: Delivery


def without_cache(module: ModulePlan) -> ModulePlan:
    """Return the plan of a module without the scales of the KV cache, which are delivered with their layer."""
    kept = tuple(delivery for delivery in module.deliveries if not delivery.name.endswith(_SUFFIXES))
    return module if kept == module.deliveries else replace(module, deliveries=kept)


def cache_scales(modules: Iterable[ModulePlan]) -> dict[str, tuple[str, ModulePlan, Item]]:
    """Return the scale of each layer's KV cache, by the module that delivers it: that of the keys' scale.

    A value is the name of the attention module, the plan that reads the stored scales, and the item made from them.
    """
    found: dict[str, list[_Source]] = {}
    for module in modules:
        for delivery in module.deliveries:
            if delivery.name.endswith(_SUFFIXES):
                attention = delivery.name.rpartition(".")[0].rpartition(".")[0]
                found.setdefault(attention, []).append(_Source(module, delivery))
    return {sources[0].module.name: (attention, *_joined(sources)) for attention, sources in found.items()}


def _joined(sources: list[_Source]) -> tuple[ModulePlan, Item]:
    """Return the plan that reads the scales of one layer, and the item that is made from them."""
    views = {
        f"{letter}_scale": Shared.of_view(source.module.views[source.delivery.operation.source or ""])
        for letter, source in zip("kv", sources, strict=False)
    }
    operation = LargestOf(result=TensorSpec(DType.F32, ()), scales=tuple(views))
    tensor = BuildTensor(name=CACHE_SCALE, content=Content.SCALE, extent=Extent.SCALAR, dtype=DType.F32)
    names = tuple(dict.fromkeys(name for source in sources for name in source.delivery.sources))
    plan = replace(
        sources[0].module, views=views, ignored={}, weight=None, scheme=None, transforms=(), fused_linear=None
    )
    return plan, Item(tensor=tensor, operation=operation, sources=names)

"""Plan the stored modules that are no site of the model.

They are attention modules with KV-cache scales, modules outside of the text model, and modules that are left out for a
known reason. Any other module is a fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.engine.holdings import deviation_of
from trtllm_ct.plan import deliver
from trtllm_ct.plan.leftovers import refuse_leftovers
from trtllm_ct.plan.models.discovery import is_draft
from trtllm_ct.plan.models.fused_experts import NOT_PER_EXPERT
from trtllm_ct.plan.models.sites import Site
from trtllm_ct.plan.plan import OTHER, Delivery, ModulePlan
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS, StoredModule

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.kv_cache import KvCache
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.online_transforms import OnlineTransforms
    from trtllm_ct.plan.row_order import QueryKeyRows
    from trtllm_ct.plan.weights import WeightReader

__all__ = ["OtherModules"]

_RECOMPUTED = re.compile(r"(?:\w+_)?inv_freq|(?:cos|sin)_cached")
"""Tensors of rotary embeddings that config.json gives; any other one is learned (`alpha` of Mistral Large 4)."""


@dataclass(frozen=True, slots=True)
class OtherModules:
    """Plans the stored modules that `Model.sites` does not name.

    `place` is the prefix of the text model's body and the name of its head, see `Model.place`.
    """

    model: Model
    place: tuple[str, str]
    kv_cache: KvCache
    reader: WeightReader
    rows: QueryKeyRows
    transforms: OnlineTransforms
    dtypes: deliver.Dtypes
    faults: FaultCollector

    def plan(self, module: StoredModule) -> ModulePlan:
        """Return the plan of one module; adds a fault for each of its tensors that the plan has no use for."""
        attention = self.kv_cache.holds(module)
        if attention and attention == module.specs.keys():
            deliveries, ignored = self.kv_cache.deliver(module, self.faults)
            return _module_plan(module, "Attention", deliveries, ignored)
        reason = self._left_out(module)
        if reason is not None:
            return _module_plan(module, OTHER, (), dict.fromkeys(module.specs, reason))
        recomputed = _recomputed(module)
        if recomputed:
            learned = {local: view for local, view in module.views.items() if local not in recomputed}
            plan = self.plan(replace(module, views=learned)) if learned else _module_plan(module, OTHER, (), {})
            return replace(plan, views=module.views, ignored={**plan.ignored, **recomputed})
        if self._is_outside_text_model(module.name):
            return self._with_cache(module, self._outside_text_model(module, attention))
        refuse_leftovers(module, (), self.model.name, self.faults)
        return _module_plan(module, OTHER, (), {})

    def _left_out(self, module: StoredModule) -> str | None:
        """Return why a module is left out entirely; None if it is not."""
        name = module.name
        if name == self.place[1] and self.model.tied and module.has_weight:
            return "it equals the embeddings, to which config.json ties it"
        if self.kv_cache.is_dropped(module):
            return f"target {self.kv_cache.target.name} leaves the KV cache alone"
        experts = self.model.experts
        of_all_experts = bool(experts) and name.rpartition(".")[0].endswith(f".{experts}")
        if of_all_experts and module.specs.keys() <= NOT_PER_EXPERT:
            return "the shape of all experts together; the codes tell that of each"
        return None

    def _is_outside_text_model(self, name: str) -> bool:
        """Whether a module belongs to a vision tower, a projector or draft layers.

        Of a model whose row lists no modules, it is any module without a matrix, and draft layers.
        """
        if self.model.stated is None:
            return True
        body, head = self.place
        return self._drafts(name) or (self.model.multimodal and not name.startswith(body) and name != head)

    def _drafts(self, name: str) -> bool:
        """Whether a module belongs to draft layers, by its prefix or by a layer number after the model's last layer."""
        if is_draft(name):
            return True
        layer = re.match(rf"{re.escape(self.place[0])}layers\.(\d+)\.", f"{name}.")
        return layer is not None and 0 <= int(layer[1]) - self.model.layers < self.model.draft_layers

    def _with_cache(self, module: StoredModule, plan: ModulePlan) -> ModulePlan:
        """Return the plan of a module with its scales of the KV cache; draft layers have a cache too."""
        deliveries, ignored = self.kv_cache.deliver(module, self.faults)
        return replace(plan, deliveries=deliveries + plan.deliveries, ignored={**plan.ignored, **ignored})

    def _outside_text_model(self, module: StoredModule, cache: frozenset[str]) -> ModulePlan:
        """Return the plan of a module outside of the text model, without its tensors of the KV cache, `cache`.

        It is delivered under its stored names, and a quantized weight is dequantized.
        """
        self.transforms.refuse_on(module, by_class=not self._drafts(module.name))
        if not module.is_quantized:
            module = self.rows.ordered(module, None)
            plain = {local for local in module.specs if local not in QUANTIZATION_TENSORS | cache}
            ignored = dict.fromkeys(module.specs.keys() - plain - cache, "the weight beside it is plain")
            if "weight" not in plain:
                refuse_leftovers(module, plain | cache, self.model.name, self.faults)
            return _module_plan(module, OTHER, deliver.plain(module, sorted(plain), self.dtypes), ignored)
        site = Site(module=module.name, class_name="Linear", shape=())
        weight = self.reader.read(module, site)
        if weight is None:
            return _module_plan(module, "Linear", (), {})
        module = self.rows.ordered(module, weight.stored)
        consumed = set(weight.stored.consumed)
        ignored = dict.fromkeys(
            (module.specs.keys() & QUANTIZATION_TENSORS) - consumed - cache, "the module is delivered plain"
        )
        ignored |= weight.idle
        rest = sorted(module.specs.keys() - consumed - ignored.keys() - cache)
        deliveries = deliver.dequantized(module, weight, self.dtypes) + deliver.plain(module, rest, self.dtypes)
        return ModulePlan(
            name=module.name,
            class_name="Linear",
            views=module.views,
            deliveries=deliveries,
            ignored=ignored,
            weight=weight.stored,
            scheme=weight.scheme,
            reason="not a part of the text model's layers",
            note=deviation_of(weight.scheme),
        )


def _recomputed(module: StoredModule) -> dict[str, str]:
    """Return the tensors of a rotary embedding that no engine reads, with the reason."""
    if module.name.rpartition(".")[2] != "rotary_emb":
        return {}
    names = (local for local in module.specs if _RECOMPUTED.fullmatch(local))
    return dict.fromkeys(names, "recomputed from config.json by every engine")


def _module_plan(
    module: StoredModule, class_name: str, deliveries: tuple[Delivery, ...], ignored: dict[str, str]
) -> ModulePlan:
    """Return the plan of a module without a quantized weight."""
    return ModulePlan(
        name=module.name, class_name=class_name, views=module.views, deliveries=deliveries, ignored=ignored
    )

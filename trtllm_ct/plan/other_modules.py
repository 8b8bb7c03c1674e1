"""Stored modules that the text model's tables don't name.

They are attention with its KV scales, other parts of a larger model, and what is left out for a reason.
Anything else has no owner and is a fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.plan import deliver
from trtllm_ct.plan.leftovers import refuse_leftovers
from trtllm_ct.plan.models.fused_experts import NOT_PER_EXPERT
from trtllm_ct.plan.models.sites import Site
from trtllm_ct.plan.plan import Delivery, ModulePlan
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS, StoredModule

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.kv_cache import KvCache
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.online_transforms import OnlineTransforms
    from trtllm_ct.plan.row_order import QueryKeyRows
    from trtllm_ct.plan.weights import WeightReader

__all__ = ["OtherModules"]

_RECOMPUTED = "rotary_emb"
# Multi-token prediction: layers that draft the next tokens, beside the model or behind its last layer.
_DRAFT = re.compile(r"(model\.)?mtp(_|\.)")


@dataclass(frozen=True, slots=True)
class OtherModules:
    """Plans what `Model.sites` does not name."""

    model: Model
    place: tuple[str, str]
    kv_cache: KvCache
    reader: WeightReader
    rows: QueryKeyRows
    transforms: OnlineTransforms
    dtypes: deliver.Dtypes
    faults: FaultCollector

    def plan(self, module: StoredModule) -> ModulePlan:
        """The plan of one module; a fault for each of its tensors that nothing takes."""
        attention = self.kv_cache.holds(module)
        if attention and attention == module.specs.keys():
            deliveries, ignored = self.kv_cache.deliver(module, self.faults)
            return _module_plan(module, "Attention", deliveries, ignored)
        reason = self._left_out(module)
        if reason is not None:
            return _module_plan(module, "other", (), dict.fromkeys(module.specs, reason))
        if self._is_another_part(module.name):
            return self._another_part(module)
        refuse_leftovers(module, (), self.model.name, self.faults)
        return _module_plan(module, "other", (), {})

    def _left_out(self, module: StoredModule) -> str | None:
        """Why a module is not delivered at all."""
        name = module.name
        if name.rpartition(".")[2] == _RECOMPUTED:
            return "recomputed from config.json by every engine"
        if name == self.place[1] and self.model.tied:
            return "config.json ties it to the embeddings"
        experts = self.model.architecture.experts
        of_all_experts = experts is not None and name.rpartition(".")[0].endswith(f".{experts.path}")
        if of_all_experts and module.specs.keys() <= NOT_PER_EXPERT:
            return "the shape of all experts together; the codes tell that of each"
        return None

    def _is_another_part(self, name: str) -> bool:
        """Whether a module belongs to a vision tower, a projector or draft layers."""
        body, head = self.place
        return self._drafts(name) or (self.model.multimodal and not name.startswith(body) and name != head)

    def _drafts(self, name: str) -> bool:
        """Whether a module belongs to draft layers, beside the model or behind its last layer."""
        if _DRAFT.match(name):
            return True
        layer = re.match(rf"{re.escape(self.place[0])}layers\.(\d+)\.", f"{name}.")
        return layer is not None and 0 <= int(layer[1]) - self.model.layers < self.model.draft_layers

    def _another_part(self, module: StoredModule) -> ModulePlan:
        """Carried along under its own names; a quantized weight of unknown place is dequantized."""
        self.transforms.refuse_on(module, by_class=not self._drafts(module.name))
        if not module.is_quantized:
            module = self.rows.ordered(module, None)
            known = {local for local in module.specs if local not in QUANTIZATION_TENSORS}
            ignored = dict.fromkeys(module.specs.keys() - known, "the weight beside it is plain")
            if "weight" not in known:
                refuse_leftovers(module, known, self.model.name, self.faults)
            return _module_plan(module, "other", deliver.plain(module, sorted(known), self.dtypes), ignored)
        site = Site(module=module.name, class_name="Linear", shape=())
        weight = self.reader.read(module, site)
        if weight is None:
            return _module_plan(module, "Linear", (), {})
        module = self.rows.ordered(module, weight.stored)
        consumed = set(weight.stored.consumed)
        ignored = dict.fromkeys(
            (module.specs.keys() & QUANTIZATION_TENSORS) - consumed, "the module is delivered plain"
        )
        ignored |= weight.idle
        others = sorted(module.specs.keys() - consumed - ignored.keys())
        deliveries = deliver.dequantized(module, weight, self.dtypes) + deliver.plain(module, others, self.dtypes)
        return ModulePlan(
            name=module.name,
            class_name="Linear",
            views=module.views,
            deliveries=deliveries,
            ignored=ignored,
            weight=weight.stored,
            scheme=weight.scheme,
            reason="not a part of the text model's layers",
        )


def _module_plan(
    module: StoredModule, class_name: str, deliveries: tuple[Delivery, ...], ignored: dict[str, str]
) -> ModulePlan:
    return ModulePlan(
        name=module.name, class_name=class_name, views=module.views, deliveries=deliveries, ignored=ignored
    )

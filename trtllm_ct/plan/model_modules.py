"""Stored modules that the text model's tables name: how each of them is delivered.

A large model has 10^5 of them and few kinds. What becomes of a module's tensors does not depend on what it is called,
so it is decided once for each kind, by local names, and every module of the kind gets it under its own names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.engine.holdings import native_mode
from trtllm_ct.plan import deliver
from trtllm_ct.plan.assign import Assignment, fold_reason
from trtllm_ct.plan.engine_config import layer_config
from trtllm_ct.plan.equalize import OWN, Equalized
from trtllm_ct.plan.leftovers import refuse_leftovers
from trtllm_ct.plan.online_transforms import folds_of
from trtllm_ct.plan.plan import Delivery, ModulePlan
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS, StoredModule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.plan.kv_cache import KvCache
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.weights import QuantizedWeight

__all__ = ["ModelModules"]

_STATIC_INPUT_TENSORS = ("input_scale", "input_global_scale")
_ACTIVATION_TENSORS = frozenset(
    {"input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """What becomes of the tensors of all modules of one kind, under local names; those of the KV cache are left out.

    `owned` are the tensors that have an owner, the KV cache included; any other is a fault. `of` are the objects whose
    identity tells the kind, which therefore must not die before it.
    """

    deliveries: tuple[Delivery, ...]
    ignored: Mapping[str, str]
    owned: frozenset[str | None]
    of: tuple[object, ...]
    native_mode: QuantAlgo | None
    layer: LayerQuantConfig | None
    reason: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelModules:
    """Plans what `Model.sites` names."""

    config: QuantizationConfig
    model: Model
    kv_cache: KvCache
    dtypes: deliver.Dtypes
    faults: FaultCollector
    _decided: dict[tuple[object, ...], _Decision] = field(init=False, default_factory=dict)

    def plan(
        self,
        stored: StoredModule,
        site: Site,
        weight: QuantizedWeight | None,
        assignment: Assignment | None,
        equalized: Equalized,
    ) -> ModulePlan:
        """The plan of one module; a fault for each of its tensors that nothing takes, or that it needs and has not."""
        of_cache = self.kv_cache.holds(stored)
        cached = self.kv_cache.deliver(stored, self.faults) if of_cache else None
        if weight is not None:
            self._require_static_scale(stored, weight)
        decision = self._decision(stored, site, weight, assignment, equalized, of_cache)
        if not stored.specs.keys() <= decision.owned:
            refuse_leftovers(stored, decision.owned, self.model.name, self.faults)
        deliveries, ignored = _named(decision.deliveries, stored), decision.ignored
        if cached is not None:
            deliveries, ignored = cached[0] + deliveries, {**cached[1], **ignored}
        return ModulePlan(
            name=site.module,
            class_name=site.class_name,
            views=stored.views,
            deliveries=deliveries,
            ignored=ignored,
            weight=weight.stored if weight else None,
            scheme=weight.scheme if weight else None,
            native_mode=decision.native_mode,
            layer=decision.layer,
            reason=decision.reason,
            note=decision.note,
            fused_linear=site.shares,
            experts=site.mode_group if site.expert else None,
            transforms=stored.transforms,
        )

    def _decision(
        self,
        stored: StoredModule,
        site: Site,
        weight: QuantizedWeight | None,
        assignment: Assignment | None,
        equalized: Equalized,
        of_cache: frozenset[str],
    ) -> _Decision:
        """That of the module's kind, made with the first module of it.

        Weights are compared by identity, which stands for all specs of a module (see `WeightReader.read`), and so is
        what was assigned to them: hashing such objects takes longer than deciding anew.
        """
        kind = (
            tuple(stored.specs.items()) if weight is None else id(weight),
            id(assignment),
            id(equalized),
            of_cache,
            (site.class_name, site.locals, site.fused, site.expert),
            stored.transforms,
        )
        decision = self._decided.get(kind)
        if decision is None:
            decision = self._decide(stored.unnamed, site, weight, assignment, equalized, of_cache)
            self._decided[kind] = decision
        return decision

    def _decide(
        self,
        module: StoredModule,
        site: Site,
        weight: QuantizedWeight | None,
        assignment: Assignment | None,
        equalized: Equalized,
        of_cache: frozenset[str],
    ) -> _Decision:
        """What becomes of a module's tensors, apart from those that belong to the KV cache."""
        holding = assignment.holding if assignment else None
        shared = equalized if holding else OWN
        plain = set(site.locals)
        folds = folds_of(module.transforms, site.class_name)
        deliveries: tuple[Delivery, ...] = ()
        if weight is None:
            plain.add("weight")
            ignored = _leftover_scales(module, of_cache)
        else:
            unread = _activation_tensors(module, of_cache, deliver.input_scale_reason(holding))
            ignored = {**weight.idle, **unread}
            if holding is None:
                deliveries = deliver.dequantized(module, weight, self.dtypes, folds)
            else:
                deliveries = deliver.native(module, weight, holding, self.dtypes, site, shared)
        deliveries += deliver.plain(module, [local for local in module.specs if local in plain], self.dtypes, folds)
        owned: set[str | None] = {*plain, *ignored, *of_cache, *(weight.stored.consumed if weight else ())}
        # Matrices of transforms, each of which was claimed or refused before.
        owned |= {local for local in module.specs if "." in local}
        owned |= {delivery.operation.source for delivery in deliveries}
        return _Decision(
            deliveries=deliveries,
            ignored=ignored,
            owned=frozenset(owned),
            of=(weight, assignment, equalized),
            native_mode=native_mode(weight.stored.args, self.config.modifiers) if weight else None,
            layer=layer_config(holding) if holding else None,
            reason=(assignment.reason or shared.reason) if assignment else fold_reason(module.transforms),
            note=(holding.note or shared.note) if holding else "",
        )

    def _require_static_scale(self, module: StoredModule, weight: QuantizedWeight) -> None:
        """A scheme with a stored activation scale must have it: engines would compute with an uninitialised one."""
        inputs = weight.scheme.input_activations
        if inputs is None:
            return
        two_level = weight.stored.divisor is not None
        local = "input_global_scale" if two_level else "input_scale"
        spec = module.specs.get(local)
        if (inputs.dynamic is False or two_level) and (spec is None or spec.numel != 1):
            self.faults.add(
                where=f"{module.stored_name}.{local}",
                expected="one element: the static scale of the module's input",
                found=str(spec) if spec else "no such tensor",
                remedy="Download the checkpoint again, or quantize again with dynamic activations.",
            )


def _named(deliveries: Iterable[Delivery], module: StoredModule) -> tuple[Delivery, ...]:
    """What was decided under local names, with the names of a module."""
    return tuple(
        [Delivery(module.delivered_name(name), operation, module.sources(own)) for name, operation, own in deliveries]
    )


def _leftover_scales(module: StoredModule, of_cache: frozenset[str]) -> dict[str, str]:
    """Scales beside a plain float weight: leftovers of a fake-quantized save, which must never be applied."""
    if "weight" not in module.specs:
        return {}
    left = (QUANTIZATION_TENSORS & module.specs.keys()) - of_cache
    return dict.fromkeys(left, "the weight beside it is plain; applying the scale would corrupt it")


def _activation_tensors(module: StoredModule, of_cache: frozenset[str], reason: str) -> dict[str, str]:
    """Activation parameters of a quantized module that its mode does not take, for `reason` or one of their own."""
    ignored = {}
    for local in (_ACTIVATION_TENSORS & module.specs.keys()) - of_cache:
        if local.startswith("output"):
            ignored[local] = "engines leave outputs unquantized"
        elif reason:
            ignored[local] = reason
        elif local not in _STATIC_INPUT_TENSORS:
            ignored[local] = "the mode has symmetric activations"
    return ignored

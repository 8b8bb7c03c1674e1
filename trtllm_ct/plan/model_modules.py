"""Plan the stored modules that the text model's tables name: decide how each of them is delivered.

A large model has 10^5 such modules, but few of them differ in more than their names. So the decision is made once for
all modules that are alike, with local tensor names, and is then written down with the names of each module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.base.lost_remedies import lost_or_damaged
from trtllm_ct.engine.holdings import deviation_of, native_mode
from trtllm_ct.engine.target import UNREAD_BY_DENSE
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
    from trtllm_ct.engine.holdings import Holding
    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.plan.kv_cache import KvCache
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.weights import QuantizedWeight

__all__ = ["ModelModules"]

_GIVEN_SCALE = "the scale of the input is that of the calibration"
_STATIC_INPUT_TENSORS = ("input_scale", "input_global_scale")
_ACTIVATION_TENSORS = frozenset(
    {"input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """What happens to the tensors of all modules that are alike, under local names and without the KV cache's tensors.

    `owned` are the local names of all tensors that are delivered, ignored or read, those of the KV cache included; any
    other tensor is a fault. `of` keeps the objects alive whose `id` is a part of the key under which the decision is
    remembered.
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
    """Plans the stored modules that `Model.sites` names."""

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
        input_scale: float | None = None,
    ) -> ModulePlan:
        """Return the plan of one module; `input_scale` is the static scale of its input if it was given.

        Adds a fault for each tensor that the plan has no use for, and for a static activation scale that is missing.
        """
        cache_tensors = self.kv_cache.holds(stored)
        cache_plan = self.kv_cache.deliver(stored, self.faults) if cache_tensors else None
        if weight is not None and assignment is not None and assignment.holding is not None and not assignment.form:
            self._require_static_scale(stored, weight, assignment.holding)
        decision = self._decision(stored, site, weight, assignment, equalized, cache_tensors)
        if not stored.specs.keys() <= decision.owned:
            refuse_leftovers(stored, decision.owned, self.model.name, self.faults)
        deliveries, ignored = _named(decision.deliveries, stored), decision.ignored
        if input_scale is not None:
            deliveries += (deliver.given_input_scale(stored, input_scale),)
        if cache_plan is not None:
            deliveries, ignored = cache_plan[0] + deliveries, {**cache_plan[1], **ignored}
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
            form=assignment.form if assignment else None,
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
        cache_tensors: frozenset[str],
    ) -> _Decision:
        """Return the decision for this module and all that are alike; it is made for the first of them.

        Weights, assignments and equalized scalars are compared by identity: hashing them takes longer than deciding
        again. Modules with the same weight object have the same tensor specs (see `WeightReader.read`).
        """
        key = (
            tuple(stored.specs.items()) if weight is None else id(weight),
            id(assignment),
            id(equalized),
            cache_tensors,
            (site.class_name, site.locals, site.fused, site.expert, site.class_joins),
            stored.transforms,
        )
        decision = self._decided.get(key)
        if decision is None:
            decision = self._decide(stored.unnamed, site, weight, assignment, equalized, cache_tensors)
            self._decided[key] = decision
        return decision

    def _decide(
        self,
        module: StoredModule,
        site: Site,
        weight: QuantizedWeight | None,
        assignment: Assignment | None,
        equalized: Equalized,
        cache_tensors: frozenset[str],
    ) -> _Decision:
        """Decide how a module's tensors are delivered, except those of the KV cache."""
        holding = assignment.holding if assignment else None
        shared = equalized if holding else OWN
        plain = set(site.locals)
        folds = folds_of(module.transforms, site.class_name)
        deliveries: tuple[Delivery, ...] = ()
        if weight is None:
            plain.add("weight")
            ignored = _leftover_scales(module, cache_tensors)
        else:
            form = assignment.form if assignment else None
            given = form is not None and form.input_divisor is not None
            reason = _GIVEN_SCALE if given else deliver.input_scale_reason(holding)
            unread = _unread_activation_tensors(module, cache_tensors, reason)
            ignored = {**weight.idle, **unread}
            if assignment is None or holding is None:
                deliveries = deliver.dequantized(module, weight, self.dtypes, folds)
            elif form is not None and form.keeps_codes:
                deliveries = deliver.kept(module, weight, holding, self.dtypes, site)
            elif form is not None:
                deliveries = deliver.requantized(module, weight, holding, form, site)
            else:
                deliveries = deliver.native(module, weight, holding, self.dtypes, site, shared)
        deliveries += deliver.plain(module, [local for local in module.specs if local in plain], self.dtypes, folds)
        owned: set[str | None] = {*plain, *ignored, *cache_tensors, *(weight.stored.consumed if weight else ())}
        # Local names with a dot are matrices of transforms; `OnlineTransforms` has claimed or refused each of them.
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
            note=_note(weight, holding, shared),
        )

    def _require_static_scale(self, module: StoredModule, weight: QuantizedWeight, holding: Holding) -> None:
        """Add a fault if the static activation scale that the scheme asks for is missing or has more than one element.

        Engines would compute with an uninitialised scale. A mode that reads none needs none.
        """
        inputs = weight.scheme.input_activations
        if inputs is None or holding.mode.input_scale is None:
            return
        two_level = weight.stored.divisor is not None
        local = "input_global_scale" if two_level else "input_scale"
        spec = module.specs.get(local)
        if (inputs.dynamic is False or two_level) and (spec is None or spec.numel != 1):
            self.faults.add(
                where=f"{module.stored_name}.{local}",
                expected="one element: the static scale of the module's input",
                found=str(spec) if spec else "no such tensor",
                remedy=f"{lost_or_damaged(spec)}; or quantize again with dynamic activations, {UNREAD_BY_DENSE}",
            )


def _note(weight: QuantizedWeight | None, holding: Holding | None, shared: Equalized) -> str:
    """Return where the engine computes differently from the scheme of a module; empty if it doesn't."""
    if holding is not None:
        return holding.note or shared.note
    return deviation_of(weight.scheme) if weight else ""


def _named(deliveries: Iterable[Delivery], module: StoredModule) -> tuple[Delivery, ...]:
    """Return deliveries with local names as deliveries with the full names of a module."""
    prefix = module.delivered_name("")
    return tuple(
        [Delivery(prefix + local, operation, module.sources(sources)) for local, operation, sources in deliveries]
    )


def _leftover_scales(module: StoredModule, cache_tensors: frozenset[str]) -> dict[str, str]:
    """Return the quantization tensors beside a plain float weight, with the reason why they are ignored.

    They are left over from a fake-quantized save and must never be applied.
    """
    if "weight" not in module.specs:
        return {}
    leftovers = (QUANTIZATION_TENSORS & module.specs.keys()) - cache_tensors
    return dict.fromkeys(leftovers, "the weight beside it is plain; applying the scale would corrupt it")


def _unread_activation_tensors(module: StoredModule, cache_tensors: frozenset[str], reason: str) -> dict[str, str]:
    """Return the activation parameters of a quantized module that its mode does not read, with the reason for each.

    `reason` is why the mode reads no input scale; empty if it reads one.
    """
    ignored = {}
    for local in (_ACTIVATION_TENSORS & module.specs.keys()) - cache_tensors:
        if local.startswith("output"):
            ignored[local] = "engines leave outputs unquantized"
        elif reason:
            ignored[local] = reason
        elif local not in _STATIC_INPUT_TENSORS:
            ignored[local] = "the mode has symmetric activations"
    return ignored

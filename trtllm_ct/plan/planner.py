"""`make_plan`: configuration, headers, model and target in; every decision out.

Pure: nothing is read here, and all faults of a checkpoint are raised together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.dtypes import DType
from trtllm_ct.errors import FaultCollector, PlanError
from trtllm_ct.modes import native_mode
from trtllm_ct.plan import deliver, kv_cache
from trtllm_ct.plan.architectures import LM_HEAD, Model, Site
from trtllm_ct.plan.assign import Assignment, assign_modes
from trtllm_ct.plan.engine_config import engine_config, layer_config
from trtllm_ct.plan.model import Delivery, Fate, ModulePlan, Plan, StoredFate
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS, StoredModule, stored_modules
from trtllm_ct.plan.weights import QuantizedWeight, WeightReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.config.model import QuantizationConfig
    from trtllm_ct.plan.target import Target
    from trtllm_ct.schemes import QuantAlgo

__all__ = ["make_plan"]

_RECOMPUTED = frozenset({"rotary_emb"})
_ACTIVATION_TENSORS = frozenset({"input_scale", "input_zero_point"})


def make_plan(
    config: QuantizationConfig,
    catalog: Catalog,
    model: Model,
    target: Target,
    *,
    dtype: DType | None = None,
    strict: bool = False,
) -> Plan:
    """Decide what becomes of every stored tensor and where every delivered tensor comes from.

    `dtype` is that of dequantized modules, the model's when None; with float16 plain tensors are cast as well.
    `strict` makes it a fault when a module must be dequantized because the target has no mode for it.
    Raises `PlanError` with all faults: tensors missing, surplus or of a wrong shape, schemes without a way to the
    target.
    """
    faults = FaultCollector()
    planner = _Planner(
        config=config,
        model=model,
        target=target,
        dtypes=_dtypes(model, target, dtype),
        faults=faults,
        reader=WeightReader(config, faults),
    )
    plan = planner.plan(catalog)
    if strict and target.algos:
        _refuse_dequantized(plan, faults)
    faults.raise_if_any(PlanError)
    return plan


@dataclass(slots=True, kw_only=True)
class _Planner:
    """What the steps of one planning share."""

    config: QuantizationConfig
    model: Model
    target: Target
    dtypes: deliver.Dtypes
    faults: FaultCollector
    reader: WeightReader

    def plan(self, catalog: Catalog) -> Plan:
        """Gather, read, assign, deliver."""
        self._refuse_unsupported_config()
        stored = stored_modules(catalog)
        sites = list(self.model.sites())
        weights = self._read_weights(stored, sites)
        assignments = assign_modes(weights, sites, self.target)
        # After faults the plan is of no use; the rest is planned for the faults that it still finds.
        modules = [
            self._module(stored[site.module], site, weights.get(site.module), assignments.get(site.module))
            for site in sites
            if site.module in weights or (site.module in stored and not stored[site.module].is_quantized)
        ]
        modules += self._other_modules(stored, {site.module for site in sites})
        self.faults.raise_if_any(PlanError)
        has_kv_scales = any(module.class_name == "Attention" and module.deliveries for module in modules)
        return Plan(
            target=self.target.name,
            architecture=self.model.name,
            dtype=self.dtypes.model,
            dense_dtype=self.dtypes.dequantized,
            modules=tuple(modules),
            quant_config=engine_config(modules, kv_cache_quant_algo="FP8" if has_kv_scales else None),
            warnings=self.config.warnings + catalog.warnings + self.reader.warnings,
        )

    def _refuse_unsupported_config(self) -> None:
        """Parts of a configuration that change the weights' meaning and that no later step understands."""
        if self.config.sparsity is not None:
            self.faults.add(
                where=f"{self.config.origin}.sparsity_config",
                expected="no sparsity",
                found=f"format {self.config.sparsity.format}",
                remedy="Decompress it with compressed-tensors 0.14 or earlier, which still reads this format.",
            )
        if self.config.expert_sparsity is not None:
            self.faults.add(
                where=f"{self.config.origin}.moe_sparsity_config",
                expected="all experts in every layer",
                found=f"experts pruned by {self.config.expert_sparsity.method}",
                remedy="Checkpoints with pruned experts are not supported; use the unpruned one.",
            )
        online = [item for item in self.config.transforms if item.location not in {"weight_input", "weight_output"}]
        for transform in online:
            self.faults.add(
                where=f"{self.config.origin}.transform_config.{transform.name}",
                expected="transforms that are folded into the weights (weight_input, weight_output)",
                found=f"a {transform.type} transform applied at run time ({transform.location})",
                remedy="Without the rotation the model is wrong; quantize again with offline transforms only.",
            )
        kv_cache.refuse_unsupported(self.config, self.target, self.faults)

    def _read_weights(self, stored: dict[str, StoredModule], sites: Iterable[Site]) -> dict[str, QuantizedWeight]:
        """The quantized weights of the model by module; faults for modules that are missing or have another shape."""
        weights = {}
        for site in sites:
            module = stored.get(site.module)
            if module is None or not module.specs.keys() & {"weight", "weight_packed", "compressed"}:
                self._missing(site.module, "weight")
            elif module.is_quantized:
                weight = self.reader.read(module, site)
                if weight is not None:
                    weights[site.module] = weight
            elif module.specs["weight"].shape != site.shape:
                self.faults.add(
                    where=f"{site.module}.weight",
                    expected=f"shape {list(site.shape)} by the sizes in config.json",
                    found=str(module.specs["weight"]),
                    remedy="config.json and the weights belong to different models.",
                )
            if module is not None and site.bias and "bias" not in module.specs:
                self._missing(site.module, "bias")
        return weights

    def _missing(self, module: str, local: str) -> None:
        self.faults.add(
            where=f"{module}.{local}",
            expected=f"a tensor that {self.model.name} needs",
            found="no such tensor in any shard",
            remedy="Download the checkpoint again; a shard or its entry in the index is lost.",
        )

    def _module(
        self, stored: StoredModule, site: Site, weight: QuantizedWeight | None, assignment: Assignment | None
    ) -> ModulePlan:
        """The plan of one module that the architecture knows."""
        holding = assignment.holding if assignment else None
        deliveries: tuple[Delivery, ...] = ()
        owned = {"bias"} if site.bias else set()
        ignored: dict[str, str] = {}
        if weight is None:
            owned.add("weight")
            ignored = self._leftover_scales(stored)
        else:
            ignored = self._activation_tensors(stored, weight, deliver.input_scale_reason(holding))
            if holding is None:
                deliveries = deliver.dequantized(stored, weight, self.dtypes)
            else:
                deliveries = deliver.native(stored, weight, holding, self.dtypes, fused=site.fused is not None)
        deliveries += deliver.plain(stored, tuple(local for local in stored.specs if local in owned), self.dtypes)
        return ModulePlan(
            name=site.module,
            class_name=site.class_name,
            deliveries=deliveries,
            fates=self._fates(stored, deliveries, ignored),
            weight=weight.stored if weight else None,
            scheme=weight.scheme if weight else None,
            native_mode=_native_mode(weight, self.config),
            layer=layer_config(holding) if holding else None,
            reason=assignment.reason if assignment else "",
        )

    def _other_modules(self, stored: dict[str, StoredModule], known: set[str]) -> list[ModulePlan]:
        """Modules without weights of their own: attention with its KV scales, and what is ignored for a reason."""
        plans = []
        for name, module in stored.items():
            if name in known:
                continue
            deliveries: tuple[Delivery, ...] = ()
            ignored: dict[str, str] = {}
            class_name = "other"
            if kv_cache.is_attention(module):
                class_name = "Attention"
                deliveries, ignored = kv_cache.deliveries(module, self.config, self.target, self.faults)
            elif name.rpartition(".")[2] in _RECOMPUTED:
                ignored = dict.fromkeys(module.specs, "recomputed from config.json by every engine")
            elif name == LM_HEAD and self.model.tied:
                ignored = dict.fromkeys(module.specs, "config.json ties it to model.embed_tokens")
            fates = self._fates(module, deliveries, ignored)
            plans.append(ModulePlan(name=name, class_name=class_name, deliveries=deliveries, fates=fates))
        if self.config.kv_cache_scheme is not None and self.target.kv_cache_algos:
            kv_cache.check_complete(plans, self.model.layers, self.faults)
        return plans

    def _leftover_scales(self, module: StoredModule) -> dict[str, str]:
        """Scales beside a plain float weight: leftovers of a fake-quantized save, which must never be applied."""
        if "weight" not in module.specs:
            return {}
        left = QUANTIZATION_TENSORS & module.specs.keys()
        return dict.fromkeys(left, "the weight beside it is plain; applying the scale would corrupt it")

    def _activation_tensors(self, module: StoredModule, weight: QuantizedWeight, reason: str) -> dict[str, str]:
        """Activation scales of a quantized module: required when static, and ignored where the mode takes none."""
        inputs = weight.scheme.input_activations
        static = inputs is not None and inputs.dynamic is False
        spec = module.specs.get("input_scale")
        if static and (spec is None or spec.numel != 1):
            self.faults.add(
                where=module.full_name("input_scale"),
                expected="one element: the static scale of the module's input",
                found=str(spec) if spec else "no such tensor",
                remedy="Download the checkpoint again, or quantize again with dynamic activations.",
            )
        if not reason:
            return {}
        return dict.fromkeys(_ACTIVATION_TENSORS & module.specs.keys(), reason)

    def _fates(
        self, module: StoredModule, deliveries: Iterable[Delivery], ignored: dict[str, str]
    ) -> tuple[StoredFate, ...]:
        """What becomes of each tensor of a module; one that nobody takes or ignores is a fault."""
        taken: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            for source in delivery.sources:
                taken.setdefault(source, []).append(delivery)
        fates = []
        for local, spec in module.specs.items():
            name = module.full_name(local)
            if name in taken:
                by = tuple(delivery.name for delivery in taken[name])
                copied = by == (name,) and taken[name][0].operation.label == "copy"
                fates.append(StoredFate(name=name, spec=spec, fate=Fate.COPIED if copied else Fate.CONSUMED, by=by))
            elif local in ignored:
                fates.append(StoredFate(name=name, spec=spec, fate=Fate.IGNORED, reason=ignored[local]))
            else:
                self._leftover(module, local)
        return tuple(fates)

    def _leftover(self, module: StoredModule, local: str) -> None:
        quantization = local in QUANTIZATION_TENSORS
        self.faults.add(
            where=module.full_name(local),
            expected="a module that this tensor belongs to" if quantization else f"only tensors of {self.model.name}",
            found=f"{module.specs[local]} without an owner",
            remedy=(
                "A quantization tensor without its weight means that a tensor was lost or renamed."
                if quantization
                else "Nothing would read it; remove it, or check the architecture in config.json."
            ),
        )


def _native_mode(weight: QuantizedWeight | None, config: QuantizationConfig) -> QuantAlgo | None:
    return native_mode(weight.stored.args, config.modifiers) if weight else None


def _dtypes(model: Model, target: Target, dtype: DType | None) -> deliver.Dtypes:
    """float16 kernels need float16 throughout, a dense model is of the dtype asked for, else the model's stays."""
    wanted = dtype or model.dtype
    cast_plain = wanted is DType.F16
    whole_model = cast_plain or not target.algos
    return deliver.Dtypes(model=wanted if whole_model else model.dtype, dequantized=wanted, cast_plain=cast_plain)


def _refuse_dequantized(plan: Plan, faults: FaultCollector) -> None:
    for module in plan.modules:
        if module.dequantized:
            faults.add(
                where=module.name,
                expected=f"a native mode at target {plan.target} (--strict)",
                found=f"{module.stored_scheme}: {module.reason}",
                remedy="Convert without --strict to have it dequantized, or quantize it with a scheme that fits.",
            )

"""`make_plan`: configuration, headers, model and target in; every decision out.

Pure: nothing is read here, and all faults of a checkpoint are raised together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PlanError
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.plan import deliver
from trtllm_ct.plan.assign import DENSE_OUTPUT, assign_modes, candidates_of, dense_outputs
from trtllm_ct.plan.engine_config import engine_config
from trtllm_ct.plan.equalize import OWN, Part, equalize
from trtllm_ct.plan.gathering import gather_modules
from trtllm_ct.plan.kv_cache import KvCache
from trtllm_ct.plan.model_modules import ModelModules
from trtllm_ct.plan.online_transforms import OnlineTransforms
from trtllm_ct.plan.other_modules import OtherModules
from trtllm_ct.plan.plan import ModulePlan, Plan
from trtllm_ct.plan.probe import NO_PROBE, Probe
from trtllm_ct.plan.producers import header_warnings
from trtllm_ct.plan.ranks.cuts import refuse_uneven, with_slices
from trtllm_ct.plan.row_order import QueryKeyRows
from trtllm_ct.plan.unsupported import refuse_unsupported
from trtllm_ct.plan.weights import QuantizedWeight, WeightReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["make_plan"]


def make_plan(
    config: QuantizationConfig,
    catalog: Catalog,
    model: Model,
    target: Target,
    *,
    dtype: DType | None = None,
    strict: bool = False,
    parallel: Parallel = ONE_RANK,
    dense_o_proj: bool = False,
    probe: Probe = NO_PROBE,
) -> Plan:
    """Decide what becomes of every stored tensor and where every delivered tensor comes from.

    `dtype` is that of dequantized modules, the model's when None; with float16 plain tensors are cast as well.
    `strict` makes it a fault when a module must be dequantized because the target has no mode for it; what
    `dense_o_proj` asks for is none.
    `parallel` are the sizes that the engine will run with: a mode must hold every rank's slice. `dense_o_proj`
    dequantizes the output projection of attention where its mode would quantize attention's output at a fixed scale.
    `probe` are the few values that decide; without it, the plan takes what holds for all values.
    Raises `PlanError` with all faults: tensors missing, surplus or of a wrong shape, schemes without a way to the
    target.
    """
    faults = FaultCollector()
    planner = _Planner(
        config=config,
        model=model,
        target=target,
        dtypes=_dtypes(model, target, dtype),
        parallel=parallel,
        dense_o_proj=dense_o_proj,
        probe=probe,
        faults=faults,
        reader=WeightReader(config, faults, multimodal=model.multimodal, probe=probe),
        rows=QueryKeyRows.of_model(config, model),
        kv_cache=KvCache(config, target, model.kv_heads),
        transforms=OnlineTransforms(config, model, faults),
    )
    with collector_paused():
        plan = planner.plan(catalog)
    if strict and target.holds_codes:
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
    parallel: Parallel
    dense_o_proj: bool
    probe: Probe
    faults: FaultCollector
    reader: WeightReader
    rows: QueryKeyRows
    kv_cache: KvCache
    transforms: OnlineTransforms

    def plan(self, catalog: Catalog) -> Plan:
        """Gather, read, assign, deliver."""
        refuse_unsupported(self.config, self.model, self.faults)
        refuse_uneven(self.model, self.parallel, self.faults)
        stored = self.transforms.attach(gather_modules(catalog, self.model, self.faults, self.probe.shapes))
        self.kv_cache = self.kv_cache.among(stored.values())
        place = self.model.place(stored)
        sites = list(self.model.sites(place))
        self.transforms.check_targets(stored, head=place[1])
        own = {site.module: self._find(stored, site) for site in sites}
        weights = self._read_weights(own, sites)
        own = {name: module and self._ordered(module, weights.get(name)) for name, module in own.items()}
        # After faults the plan is of no use; the rest is planned for the faults that it still finds.
        modules = self._modules(own, sites, weights)
        taken = {module.stored_name for module in own.values() if module is not None}
        others = OtherModules(
            self.model, place, self.kv_cache, self.reader, self.rows, self.transforms, self.dtypes, self.faults
        )
        modules += [others.plan(module) for module in stored.values() if module.stored_name not in taken]
        self.rows.report(self.faults)
        self.kv_cache.check_complete(modules, self.model.attentions(place), self.faults)
        self.faults.raise_if_any(PlanError)
        return Plan(
            target=self.target.name,
            architecture=self.model.name,
            dtype=self.dtypes.model,
            dense_dtype=self.dtypes.dequantized,
            stored={name: tensor.spec for name, tensor in catalog.tensors.items()},
            modules=tuple(modules),
            quant_config=engine_config(modules, kv_cache_quant_algo=self.kv_cache.algo),
            parallel=self.parallel,
            warnings=(
                *self.config.warnings,
                *catalog.warnings,
                *self.reader.warnings,
                *self.kv_cache.warnings,
                *header_warnings(self.config, self.model.name, modules),
            ),
        )

    def _find(self, stored: Mapping[str, StoredModule], site: Site) -> StoredModule | None:
        """The stored module of a site, under any of the names that it may have."""
        for name in site.stored_names:
            if name in stored:
                return self.transforms.claim(stored[name].delivered_as(site.module), site)
        return None

    def _read_weights(
        self, own: Mapping[str, StoredModule | None], sites: Iterable[Site]
    ) -> dict[str, QuantizedWeight]:
        """The quantized weights of the model by module; faults for modules that are missing or have another shape."""
        weights = {}
        for site in sites:
            module = own[site.module]
            if module is None or module.specs.keys().isdisjoint(("weight", "weight_packed")):
                self._missing(site.module, "weight")
            elif module.is_quantized:
                weight = self.reader.read(module, site)
                if weight is not None:
                    weights[site.module] = weight
            elif module.specs["weight"].shape != site.shape:
                self.faults.add(
                    where=f"{module.stored_name}.weight",
                    expected=f"shape {list(site.shape)} by the sizes in config.json",
                    found=str(module.specs["weight"]),
                    remedy="config.json and the weights belong to different models.",
                )
            for local in site.locals:
                if module is not None and local not in module.specs:
                    self._missing(site.module, local)
        return weights

    def _ordered(self, module: StoredModule, weight: QuantizedWeight | None) -> StoredModule:
        """The module with its rows in the order that engines expect; one that could not be read stays as it is."""
        if weight is None and module.is_quantized:
            return module
        return self.rows.ordered(module, weight.stored if weight else None)

    def _missing(self, module: str, local: str) -> None:
        self.faults.add(
            where=f"{module}.{local}",
            expected=f"a tensor that {self.model.name} needs",
            found="no such tensor in any shard",
            remedy="Download the checkpoint again; a shard or its entry in the index is lost.",
        )

    def _modules(
        self,
        own: Mapping[str, StoredModule | None],
        sites: Iterable[Site],
        weights: Mapping[str, QuantizedWeight],
    ) -> list[ModulePlan]:
        """The plans of the modules that the architecture knows, in the model's order."""
        present = [
            (site, module)
            for site in sites
            if (module := own[site.module]) is not None and (site.module in weights or not module.is_quantized)
        ]
        parts = [Part(site, module, weights[site.module]) for site, module in present if site.module in weights]
        equalized = equalize(parts, self.probe)
        candidates = with_slices(candidates_of(parts, equalized), self.model, self.parallel, self.target)
        assignments = assign_modes(candidates, [site for site, _ in present], self.target)
        if self.dense_o_proj:
            assignments = dense_outputs(assignments)
        if not any(assignment.holding for assignment in assignments.values()):
            self.kv_cache = replace(self.kv_cache, alone=True)
        model_modules = ModelModules(
            config=self.config, model=self.model, kv_cache=self.kv_cache, dtypes=self.dtypes, faults=self.faults
        )
        return [
            model_modules.plan(
                module,
                site,
                weights.get(site.module),
                assignments.get(site.module),
                equalized.get(site.module, OWN),
            )
            for site, module in present
        ]


def _dtypes(model: Model, target: Target, dtype: DType | None) -> deliver.Dtypes:
    """float16 kernels need float16 throughout, a dense model is of the dtype asked for, else the model's stays."""
    wanted = dtype or model.dtype
    cast_plain = wanted is DType.F16
    whole_model = cast_plain or not target.holds_codes
    return deliver.Dtypes(model=wanted if whole_model else model.dtype, dequantized=wanted, cast_plain=cast_plain)


def _refuse_dequantized(plan: Plan, faults: FaultCollector) -> None:
    for module in plan.modules:
        if module.dequantized and module.reason != DENSE_OUTPUT:
            faults.add(
                where=module.name,
                expected=f"a native mode at target {plan.target} (--strict)",
                found=f"{module.stored_scheme}: {module.reason}",
                remedy="Convert without --strict to have it dequantized, or quantize it with a scheme that fits.",
            )

"""`make_plan`: makes every decision about a checkpoint, given its configuration, headers and model, and a target.

Nothing is read here: the same values always give the same plan. All faults of a checkpoint are raised together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.arguments import check_arguments, instance_of
from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import FaultCollector, PlanError, keeping_warnings
from trtllm_ct.base.lost_remedies import say_nothing_is_missing
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.config.not_finite import not_finite_warnings
from trtllm_ct.plan.assign import DENSE_OUTPUT, assign_modes, candidates_of, dense_outputs
from trtllm_ct.plan.attention_output import warnings_of_directory
from trtllm_ct.plan.checks import checks_of
from trtllm_ct.plan.class_reads import read_problems, unread_warnings
from trtllm_ct.plan.engine_class import class_problems, refuse_unread, refuse_unread_names
from trtllm_ct.plan.engine_config import engine_config
from trtllm_ct.plan.engine_names import EngineNames
from trtllm_ct.plan.equalize import OWN, Part, equalize
from trtllm_ct.plan.expert_names import spelled, spelling_warnings
from trtllm_ct.plan.gathering import gather_modules
from trtllm_ct.plan.gpu_warnings import bias_warnings, requantization_warnings
from trtllm_ct.plan.input_scales import input_scales
from trtllm_ct.plan.kv_cache import KvCache, attentions, heads_of_attentions
from trtllm_ct.plan.lost_tensors import NOT_ASKED, class_warnings, refuse_lost_tensors
from trtllm_ct.plan.model_dtype import dtype_warnings, dtypes_of
from trtllm_ct.plan.model_modules import ModelModules
from trtllm_ct.plan.models.expert_spellings import engine_reads_stacks
from trtllm_ct.plan.models.fused_experts import stack_parts, stack_warnings
from trtllm_ct.plan.models.places import known_prefixes
from trtllm_ct.plan.models.plain_tensors import plain_tensors
from trtllm_ct.plan.models.wrapper_names import modules_as_read
from trtllm_ct.plan.online_transforms import OnlineTransforms
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.other_modules import OtherModules
from trtllm_ct.plan.plan import ModulePlan, Plan
from trtllm_ct.plan.probe import NO_PROBE, Probe
from trtllm_ct.plan.producers import header_warnings
from trtllm_ct.plan.ranks.cuts import refuse_uneven, with_slices
from trtllm_ct.plan.ranks.rank_bytes import bytes_of_rank_files, largest_rank_bytes
from trtllm_ct.plan.requantize import refuse_requantization, requantized, unused_requests
from trtllm_ct.plan.requantize_choices import choices
from trtllm_ct.plan.row_order import QueryKeyRows
from trtllm_ct.plan.served_gpus import no_gpu_problems, served_gpus, sms_of_modes
from trtllm_ct.plan.stated_check import refuse_unlike_config
from trtllm_ct.plan.tied_head import UNTIED, tied_pair
from trtllm_ct.plan.unlisted import unlisted_warnings, unread_tensors
from trtllm_ct.plan.unsupported import refuse_unsupported
from trtllm_ct.plan.weights import QuantizedWeight, WeightReader
from trtllm_ct.plan.whole_model import as_class_accepts, fusion_warnings, needs_entries

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.engine.quant_config import QuantConfig
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.assign import Assignment, Candidate
    from trtllm_ct.plan.deliver import Dtypes
    from trtllm_ct.plan.engine_files.directory import BuiltModules, EngineDirectory
    from trtllm_ct.plan.models.model_class import Comparison, ModelClass
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.requantize_choice import Choice
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["make_plan"]

_NOTHING_QUANTIZED = "nothing is quantized in these files, although the configuration has groups of quantized modules"
_NO_BLOCK = (
    "nothing is quantized in these files, and config.json has no quantization block: tensors are delivered unchanged"
)

_OPTIONS = instance_of("PlanOptions", PlanOptions, remedy="Give PlanOptions(), or PlanOptions.of with a target's name.")


def make_plan(
    config: QuantizationConfig,
    catalog: Catalog,
    model: Model,
    options: PlanOptions,
    *,
    probe: Probe = NO_PROBE,
    model_class: ModelClass | None = None,
) -> Plan:
    """Decide what happens to every stored tensor, and where every delivered tensor comes from.

    `probe` has the few stored values that decide; without it the plan makes only decisions that hold for all values.
    `model_class` is the class that config.json names, with which a model whose row lists no modules is compared; None
    compares it with none.
    Raises `UsageError` for options that don't exist or don't fit together, and `PlanError` with all faults: tensors
    that are missing, surplus or of a wrong shape, and schemes that can't be delivered to the target. It has the
    warnings that the plan would have.
    """
    check_arguments({"options": _OPTIONS}, {"options": options})
    target = options.target()
    refuse_requantization(options.requantize, target)
    faults = FaultCollector()
    planner = _Planner(
        config=config,
        model=model,
        options=options,
        target=target,
        dtypes=dtypes_of(model, target, options.dtype),
        dtype_warnings=dtype_warnings(model, target, options.dtype),
        probe=probe,
        model_class=model_class,
        faults=faults,
        reader=WeightReader(config, faults, multimodal=model.multimodal, probe=probe),
        rows=QueryKeyRows.of_model(config, model),
        kv_cache=KvCache(config, target, model.kv_heads),
        transforms=OnlineTransforms(config, model, faults),
    )
    with collector_paused(), keeping_warnings((*config.warnings, *catalog.warnings)):
        plan = planner.plan(catalog)
    if options.strict and target.holds_codes:
        _refuse_dequantized(plan, faults)
        faults.faults += plan.problems
    faults.raise_if_any(PlanError, plan.warnings)
    return plan


@dataclass(slots=True, kw_only=True)
class _Planner:
    """The values that the steps of planning one checkpoint share."""

    config: QuantizationConfig
    model: Model
    options: PlanOptions
    target: Target
    dtypes: Dtypes
    dtype_warnings: tuple[str, ...]
    probe: Probe
    model_class: ModelClass | None
    faults: FaultCollector
    reader: WeightReader
    rows: QueryKeyRows
    kv_cache: KvCache
    transforms: OnlineTransforms
    tie_warnings: tuple[str, ...] = ()
    directory: EngineDirectory | None = None
    comparison: Comparison = NOT_ASKED
    choices: tuple[Choice, ...] = ()

    def plan(self, catalog: Catalog) -> Plan:
        """Gather the stored modules, read their weights, assign modes, and plan the deliveries."""
        refuse_unread(self.model, self.target)
        refuse_unsupported(self.config, self.model, self.faults)
        stored, unread = self._gather(catalog)
        place = self.model.place(stored)
        self.kv_cache = self.kv_cache.among(stored.values(), place[0])
        self._untie(stored, place)
        sites = list(self.model.sites(place))
        caching = attentions(sites, place[0])
        self.kv_cache = replace(self.kv_cache, has_projections=bool(caching))
        site_modules = self._site_modules(catalog, stored, sites, place)
        weights = self._read_weights(site_modules, sites)
        if self.model.stated is None:
            sites = self._set_shapes(sites, stored, weights)
        self.kv_cache = replace(self.kv_cache, heads=heads_of_attentions(sites))
        refuse_uneven(self.model, self.options.parallel, self.faults, repeats_biases=self.target.ranks)
        if self.target.ranks:
            self._plan_directory(place)
        # Only Mistral's own form, whose names are others, has rows in another order.
        site_modules |= {
            name: self._ordered(module, weights.get(name))
            for name, module in site_modules.items()
            if module is not None and module.alias is not None
        }
        # Planning goes on after a fault, to find the others: the plan itself is then of no use.
        modules = self._model_modules(site_modules, sites, weights)
        planned = {module.stored_name for module in site_modules.values() if module is not None}
        others = self._other_modules(stored, planned, place)
        modules += others.values()
        self._check_complete(stored, site_modules, weights, others, place[0])
        self.rows.report(self.faults)
        self.kv_cache.check_complete(modules, caching, self.faults)
        return self._as_plan(catalog, unread, modules, sites, place)

    def _site_modules(
        self, catalog: Catalog, stored: Mapping[str, StoredModule], sites: Sequence[Site], place: tuple[str, str]
    ) -> dict[str, StoredModule | None]:
        """Return the stored module of each site; adds faults for names and sizes that are not those of the model."""
        self.transforms.check_targets(stored, head=place[1])
        site_modules = {site.module: self._find(stored, site) for site in sites}
        if self.model.stated is not None and not any(site_modules.values()):
            self._refuse_unknown_names(catalog)
        refuse_unlike_config(self.model, site_modules, place, self.faults)
        return site_modules

    def _as_plan(
        self,
        catalog: Catalog,
        unread: frozenset[str],
        modules: list[ModulePlan],
        sites: Sequence[Site],
        place: tuple[str, str],
    ) -> Plan:
        """Return the plan of these modules, with its warnings and problems. Raises `PlanError` with all faults."""
        capabilities = self.target.capabilities
        engine = capabilities.release is not None
        stacks = stack_parts(modules, self.model, engine=engine) if self.target.as_classes_read else {}
        warnings = (
            *self._warnings(catalog, modules, unread, stacked=bool(stacks)),
            *unread_warnings(modules, self.model, place, capabilities.release),
        )
        built = self._build(modules)
        if built is not None:
            modules, warnings = list(built.modules), (*warnings, *built.warnings)
        if catalog.complete:
            say_nothing_is_missing(self.faults)
        self.faults.raise_if_any(PlanError, warnings)
        modes = {(module.layer.quant_algo, module.experts is not None) for module in modules if module.layer}
        gpus = served_gpus(modes, capabilities.release)
        plan = Plan(
            target=self.target.name,
            architecture=self.model.name,
            dtype=self.dtypes.model,
            dense_dtype=self.dtypes.dequantized,
            # Without a copy where all of them are read: a large model has 10^5 of them.
            stored={name: spec for name, spec in catalog.specs.items() if name not in unread}
            if unread
            else catalog.specs,
            modules=tuple(modules),
            quant_config=built.quant_config if built else self._engine_config(modules, sites, place),
            parallel=self.options.parallel,
            rank_bytes=self._rank_bytes(modules, place),
            problems=(
                *class_problems(self.model, capabilities.release),
                *read_problems(modules, self.model, place, capabilities.release),
                *no_gpu_problems(gpus),
            ),
            engine=capabilities.name,
            sm=capabilities.sm,
            gpus=gpus,
            stacks=stacks,
            tied=self.model.tied,
            checks=checks_of(self.model, self.comparison),
            choices=self.choices,
            warnings=(*self.config.warnings, *catalog.warnings, *warnings),
        )
        return plan if built is None else built.described(plan)

    def _rank_bytes(self, modules: Sequence[ModulePlan], place: tuple[str, str]) -> int:
        """Return the bytes of the rank that holds most; those of files that have a part for each rank are in them."""
        if self.target.ranks:
            return bytes_of_rank_files(delivery for module in modules for delivery in module.deliveries)
        return largest_rank_bytes(modules, self.model, place, self.options.parallel)

    def _engine_config(
        self, modules: Sequence[ModulePlan], sites: Sequence[Site], place: tuple[str, str]
    ) -> QuantConfig:
        """Return the configuration under which an engine reads the modules."""
        return engine_config(
            modules,
            EngineNames.of(self.model, place, self.target),
            kv_cache_quant_algo=self._engine_kv_cache,
            entries=needs_entries({module.name: module.layer for module in modules}, sites, self.model),
        )

    def _gather(self, catalog: Catalog) -> tuple[dict[str, StoredModule], frozenset[str]]:
        """Return the stored modules as the model's class reads them, and the unlisted tensors that nothing reads.

        The model gets the modules of the files.
        """
        self.model = spelled(self.model, catalog.tensors, self.model_class, self.target)
        # A class with a row reads experts one by one, or its stacks are known; without a row it may read stacks only.
        one_by_one = self.model.has_row and not engine_reads_stacks(self.model.text_type)
        one_by_one = one_by_one and self.target.capabilities.release is not None
        gathered = gather_modules(catalog, self.model, self.faults, self.probe.shapes, split_stacks=one_by_one)
        self.model = self.model.in_checkpoint(gathered)
        refuse_unread(self.model, self.target)
        refuse_unread_names(self.model, self.target)
        stored = self.transforms.attach(modules_as_read(gathered, self.model, self.target))
        if stored.keys() != gathered.keys():
            self.model = self.model.in_checkpoint(stored)
        self._set_model(self.model)
        return stored, unread_tensors(catalog, gathered.values())

    def _other_modules(
        self, stored: Mapping[str, StoredModule], planned: Collection[str], place: tuple[str, str]
    ) -> dict[str, ModulePlan]:
        """Return the plans of all stored modules that are no site of the model, by stored name."""
        others = OtherModules(
            self.model, place, self.kv_cache, self.reader, self.rows, self.transforms, self.dtypes, self.faults
        )
        return {
            module.stored_name: others.plan(module) for module in stored.values() if module.stored_name not in planned
        }

    def _check_complete(
        self,
        stored: Mapping[str, StoredModule],
        site_modules: Mapping[str, StoredModule | None],
        weights: Mapping[str, QuantizedWeight],
        others: Mapping[str, ModulePlan],
        body: str,
    ) -> None:
        """Add a fault for each tensor that is lost or has another size, if config.json states no modules."""
        if self.model.stated is not None:
            return
        shapes = {
            module.stored_name: weights[name].stored.shape
            for name, module in site_modules.items()
            if module is not None and name in weights
        }
        shapes |= {name: other.weight.shape for name, other in others.items() if other.weight is not None}
        tensors = plain_tensors(stored.values(), shapes)
        self.comparison = refuse_lost_tensors(tensors, self.model, body, self.model_class, self.faults)

    def _plan_directory(self, place: tuple[str, str]) -> None:
        """Prepare the plan of a directory with a file for each rank; adds faults for models that it can't hold."""
        from trtllm_ct.plan.engine_files.directory import EngineDirectory, refuse_unbuilt  # for this target only

        cache, options = self.kv_cache.args, self.options
        if refuse_unbuilt(self.model, options.parallel, cache, self.faults, dense_o_proj=options.dense_o_proj):
            self.directory = EngineDirectory.of(
                self.model, self.options.parallel, self.dtypes.model, place, self.target.build_modes
            )

    def _build(self, modules: Iterable[ModulePlan]) -> BuiltModules | None:
        """Return the modules with the pieces of all ranks; None for any other target."""
        if self.directory is None:
            return None
        return self.directory.build(modules, kv_cache=self.kv_cache.algo, faults=self.faults)

    def _warnings(
        self, catalog: Catalog, modules: list[ModulePlan], unread: frozenset[str], *, stacked: bool
    ) -> tuple[str, ...]:
        """Return the warnings about the modules, and those that were collected while they were planned.

        `unread` are the unlisted tensors that no module is made from; `stacked` says whether experts are stacked.
        """
        platform = self.target.capabilities.platform
        return (
            *(stack_warnings(self.model) if stacked and self.target.directory else ()),
            *unlisted_warnings(catalog, unread),
            *class_warnings(self.comparison),
            *spelling_warnings(self.model, self.comparison),
            *not_finite_warnings(self.model.not_finite),
            *self._unquantized(modules),
            *self.dtype_warnings,
            *self.tie_warnings,
            *self.reader.warnings,
            *self.kv_cache.warnings,
            *warnings_of_directory(modules, self.target, self.kv_cache.algo, self.model.name),
            *header_warnings(self.config, self.model.name, modules),
            *(fusion_warnings(modules, self.model) if self.target.capabilities.release is not None else ()),
            *bias_warnings(modules, platform),
            *requantization_warnings(modules, platform),
            *unused_requests(modules, self.options.requantize),
        )

    def _unquantized(self, modules: Iterable[ModulePlan]) -> tuple[str, ...]:
        """Return a warning if nothing is quantized, unless the configuration is for something else than weights."""
        if self.faults.faults or any(module.weight is not None for module in modules):
            return ()
        return (_NOTHING_QUANTIZED,) if self.config.groups else () if self.config.origin else (_NO_BLOCK,)

    def _untie(self, stored: Mapping[str, StoredModule], place: tuple[str, str]) -> None:
        """Let the model have a head of its own if one is stored that is not known to equal the embeddings."""
        pair = tied_pair(self.model, stored, place)
        if pair is None or self.probe.head_is_table:
            return
        stated_tie = self.model.tied is not None
        self._set_model(replace(self.model, tied=False).in_checkpoint(stored))
        if not stated_tie:
            return
        table, head = pair
        differs = "may differ" if self.probe is NO_PROBE else "differs"
        self.tie_warnings = (UNTIED.format(head=head.name, table=table.name, differs=differs),)

    def _set_model(self, model: Model) -> None:
        """Go on with another description of the model."""
        self.model = self.transforms.model = model

    @property
    def _engine_kv_cache(self) -> str | None:
        """The mode of the KV cache in the engine's configuration.

        It is the one that the engine will be told, if it is. Releases before 1.3 tell it to their global configuration
        only, and layers of a mixed model would keep another one (`_torch/pyexecutor/model_loader.py:
        validate_and_set_kv_cache_quant`).
        """
        asked = None if self.kv_cache.alone else self.options.kv_cache
        return asked or self.kv_cache.algo

    def _find(self, stored: Mapping[str, StoredModule], site: Site) -> StoredModule | None:
        """Return the stored module of a site, under any of the site's stored names; None if it is not stored."""
        module = stored.get(site.module)
        if module is None:
            module = next((stored[name] for name in site.stored_names if name in stored), None)
        return None if module is None else self.transforms.claim(module.delivered_as(site.module), site)

    def _read_weights(
        self, site_modules: Mapping[str, StoredModule | None], sites: Iterable[Site]
    ) -> dict[str, QuantizedWeight]:
        """Return the quantized weights of the model by module."""
        weights = {}
        for site in sites:
            module = site_modules[site.module]
            if module is not None and module.is_quantized:
                weight = self.reader.read(module, site)
                if weight is not None:
                    weights[site.module] = weight
        return weights

    def _set_shapes(
        self, sites: Sequence[Site], stored: Mapping[str, StoredModule], weights: Mapping[str, QuantizedWeight]
    ) -> list[Site]:
        """Give the model sites with the shapes that were found when codes were read, and return these sites."""
        sites = [_with_shape(site, weights.get(site.module)) for site in self._recounted(sites, stored, weights)]
        if self.model.discovery is not None:
            self._set_model(replace(self.model, discovery=replace(self.model.discovery, sites=tuple(sites))))
        return sites

    def _recounted(
        self, sites: Sequence[Site], stored: Mapping[str, StoredModule], weights: Mapping[str, QuantizedWeight]
    ) -> Iterable[Site]:
        """Return the sites with heads counted by the rows of weights, where codes in tiles don't show these rows."""
        tiled = {}
        for site in sites:
            weight = None if site.heads is None else weights.get(site.module)
            name = next((name for name in site.stored_names if name in stored), None)
            if weight is not None and name is not None:
                shape = weight.stored.shape
                if stored[name].specs[weight.stored.codes].shape[:1] != shape[:1]:
                    tiled[name] = shape
        return self.model.in_checkpoint(stored, tiled).sites(self.model.place(stored)) if tiled else sites

    def _ordered(self, module: StoredModule, weight: QuantizedWeight | None) -> StoredModule:
        """Return the module with its rows in the order that engines expect.

        A quantized module whose weight could not be read is returned unchanged.
        """
        if weight is None and module.is_quantized:
            return module
        return self.rows.ordered(module, weight.stored if weight else None)

    def _refuse_unknown_names(self, catalog: Catalog) -> None:
        """Raise `PlanError` with one fault, instead of one for each module, if no module has a name of the model."""
        prefixes = sorted(
            {name.partition(".layers.")[0] + ".layers." for name in catalog.tensors if ".layers." in name}
        )
        self.faults.add(
            where="names of the tensors",
            expected=f"those of {self.model.name} behind one of the prefixes {', '.join(known_prefixes())}",
            found=f"none of them, but {format_names(prefixes or catalog.tensors)}",
            remedy="Give the tensors one of these prefixes, in the files and in the index; or correct architectures in "
            "config.json if the weights are another model's.",
        )
        self.faults.raise_if_any(PlanError)

    def _model_modules(
        self,
        site_modules: Mapping[str, StoredModule | None],
        sites: Sequence[Site],
        weights: Mapping[str, QuantizedWeight],
    ) -> list[ModulePlan]:
        """Return the plans of the stored modules that the architecture names, in the model's order."""
        present = [
            (site, module)
            for site in sites
            if (module := site_modules[site.module]) is not None and (site.module in weights or not module.is_quantized)
        ]
        parts = [Part(site, module, weights[site.module]) for site, module in present if site.module in weights]
        equalized = equalize(parts, self.probe)
        if self.directory is not None:
            assignments = self.directory.assign(parts, [site for site, _ in present], self.probe, self.faults)
        else:
            whole = candidates_of(parts, equalized, self.dtypes.model)
            candidates = with_slices(whole, self.model, self.options.parallel, self.target)
            assignments = assign_modes(candidates, [site for site, _ in present], self.target)
            present_sites = [site for site, _ in present]
            assignments = requantized(assignments, candidates, present_sites, self.target, self.options.requantize)
            self.choices = self._choices(assignments, candidates, present_sites)
        if self.options.dense_o_proj:
            cache = self.options.kv_cache or self.kv_cache.algo
            release = self.target.capabilities.release
            assignments = dense_outputs(assignments, sites, cache, architecture=self.model.name, release=release)
        if self.target.capabilities.release is not None:
            assignments = as_class_accepts(assignments, candidates, sites, self.model)
        given = input_scales(assignments, parts, self.options.requantize.calibration, self.faults)
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
                given.get(site.module),
            )
            for site, module in present
        ]

    def _choices(
        self, assignments: Mapping[str, Assignment], candidates: Mapping[str, Candidate], sites: Sequence[Site]
    ) -> tuple[Choice, ...]:
        """Return what could be requantized for a release of the engine."""
        release = self.target.capabilities.release
        if release is None:
            return ()
        found = choices(assignments, candidates, sites, self.target, self.dtypes.dequantized.itemsize)
        kept = {
            (made.holding.mode.algo, candidates[name].site.expert) for name, made in assignments.items() if made.holding
        }
        if self.model.row.one_mode:
            # Another mode would have the kept modules dequantized, see `as_class_accepts`.
            return tuple(choice for choice in found if {algo for algo, _ in kept} <= {choice.mode})
        return tuple(choice for choice in found if sms_of_modes({*kept, (choice.mode, choice.for_experts)}, release))


def _with_shape(site: Site, weight: QuantizedWeight | None) -> Site:
    """Return the site with the shape of its weight; that of codes may be known only after they were read."""
    return site if site.shape or weight is None else site._replace(shape=weight.stored.shape)


def _refuse_dequantized(plan: Plan, faults: FaultCollector) -> None:
    """Add a fault for each dequantized module, except those that were dequantized on request."""
    for module in plan.modules:
        if module.dequantized and module.reason != DENSE_OUTPUT:
            faults.add(
                where=module.name,
                expected=f"a native mode at target {plan.target} (--strict)",
                found=f"{module.stored_scheme}: {module.reason}",
                remedy="Convert without --strict to have it dequantized, or quantize it with a scheme that fits.",
            )

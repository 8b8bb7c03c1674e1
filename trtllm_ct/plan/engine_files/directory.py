"""`EngineDirectory`: plans an engine-build checkpoint from the modules of a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.build_mode import RowBias
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.engine.target import UNREAD_BY_DENSE
from trtllm_ct.plan.assign import Assignment
from trtllm_ct.plan.engine_files.cache import cache_scales
from trtllm_ct.plan.engine_files.choice import Choice, choose
from trtllm_ct.plan.engine_files.config import build_config, build_layers, config_warnings, rope_of_model
from trtllm_ct.plan.engine_files.layout import Layout
from trtllm_ct.plan.engine_files.options import EngineOptions, engine_options
from trtllm_ct.plan.engine_files.ranks import rank_modules
from trtllm_ct.plan.models.build_classes import BUILD_CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.checkpoint.write_plan import Segment, StackPart
    from trtllm_ct.engine.build_mode import BuildMode
    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.plan.equalize import Part
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.plan import ModulePlan, Plan
    from trtllm_ct.plan.probe import Probe

__all__ = ["BuiltModules", "EngineDirectory", "refuse_unbuilt"]

_CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".output_scale", "_cache.scale")
_CACHED = (".k_proj.", ".v_proj.")
"""In faults, names of scales of the KV cache by any writer, and of tensors of keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModules:
    """The plans of all modules with the pieces of all ranks, and what the plan of the directory needs beside them."""

    modules: tuple[ModulePlan, ...]
    places: Mapping[str, Segment | StackPart]
    quant_config: QuantConfig
    config: dict[str, Any]
    layers: dict[str, Any] | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    warnings: tuple[str, ...]

    def described(self, plan: Plan) -> Plan:
        """Return a plan of these modules with what only a directory with a file for each rank has."""
        return replace(
            plan,
            places=self.places,
            build_config=self.config,
            build_layers=self.layers,
            build_options=self.options.build,
            run_options=self.options.run,
        )


@dataclass(slots=True, kw_only=True)
class EngineDirectory:
    """Plans the directory of one model: first the mode, then the pieces of all ranks and config.json."""

    model: Model
    parallel: Parallel
    dtype: DType
    layout: Layout
    modes: tuple[BuildMode, ...]
    choice: Choice = field(default_factory=Choice)

    @classmethod
    def of(
        cls, model: Model, parallel: Parallel, dtype: DType, place: tuple[str, str], modes: tuple[BuildMode, ...]
    ) -> EngineDirectory:
        """Return the directory of a model whose class `refuse_unbuilt` accepts; it may have one of these modes.

        Its ranks divide experts and attention like all other modules, whatever `parallel` says of these.
        """
        parallel = replace(parallel, expert=1, attention_dp=False)
        layout = Layout(model=model, row=BUILD_CLASSES[model.name], parallel=parallel, place=place)
        return cls(model=model, parallel=parallel, dtype=dtype, layout=layout, modes=modes)

    def assign(
        self, parts: Sequence[Part], sites: Sequence[Site], probe: Probe, faults: FaultCollector
    ) -> dict[str, Assignment]:
        """Choose the mode, and return an assignment for every quantized module; refusals are added to `faults`.

        The assignments have no holding: the tensors of a mode take the place of the plain ones in `build`.
        """
        self.choice = choose(parts, sites, self.layout, self.modes, self.dtype, probe, faults)
        reasons = self.choice.reasons
        return {part.site.module: Assignment(holding=None, reason=reasons.get(part.site.module, "")) for part in parts}

    def build(self, modules: Iterable[ModulePlan], *, kv_cache: str | None, faults: FaultCollector) -> BuiltModules:
        """Return all modules with the pieces of all ranks; `modules` are the plans that deliver them plain."""
        modules = tuple(modules)
        self._refuse_biases(modules, faults)
        self._refuse_zeroed_biases(modules, faults)
        if kv_cache is not None:
            self._require_cache_scales(modules, kv_cache, faults)
        rope = rope_of_model(self.model, self.layout.row, faults)
        config = build_config(
            self.model,
            self.layout.row,
            self.choice,
            self.parallel,
            rope=rope,
            dtype=self.dtype,
            kv_cache=kv_cache,
            faults=faults,
        )
        gptq = any(module.native_mode is QuantAlgo.W4A16_GPTQ for module in modules)
        options = engine_options(self.model, self.layout.row, rope, self.choice, kv_cache)
        warnings = (*config_warnings(self.layout.row, rope, self.choice, gptq=gptq), *options.warnings)
        if faults.faults:
            return BuiltModules(
                modules=modules, places={}, quant_config=QuantConfig(), config=config, warnings=warnings
            )
        pieces, places = rank_modules(modules, self.layout, self.choice, self.dtype)
        quant_config = QuantConfig(
            layer=self.choice.layer,
            kv_cache_quant_algo=kv_cache,
            exclude_modules=tuple(config["quantization"].get("exclude_modules") or ()),
            quantized_layers=self.choice.layers,
        )
        return BuiltModules(
            modules=pieces,
            places=places,
            quant_config=quant_config,
            config=config,
            layers=build_layers(self.choice, kv_cache),
            options=options,
            warnings=warnings,
        )

    def _require_cache_scales(self, modules: Iterable[ModulePlan], kv_cache: str, faults: FaultCollector) -> None:
        """Add a fault if a layer has no stored scale of its cache: engines can't be built without one.

        A layer is left out if it has a fault about such a scale already, or about a projection that scales belong to.
        """
        names = [attention for attention, _, _ in cache_scales(modules).values()]
        names += [
            fault.where
            for fault in faults.faults
            if fault.where.endswith(_CACHE_SCALES) or any(part in fault.where for part in _CACHED)
        ]
        scaled = {self.layout.layer_of(name) for name in names}
        missing = [str(layer) for layer in range(self.model.layers) if layer not in scaled]
        if missing:
            faults.add(
                where="kv_cache_scheme",
                expected=f"stored scales of the {kv_cache} cache in every layer, which engines need",
                found=f"none in layer {', '.join(missing)}",
                remedy="Calibrate the KV cache with llm-compressor, remove kv_cache_scheme to build with a 16-bit "
                f"cache, {UNREAD_BY_DENSE}",
            )

    def _refuse_biases(self, modules: Iterable[ModulePlan], faults: FaultCollector) -> None:
        """Add a fault for each bias that the engine's class has no parameter for: it would be left out silently."""
        for module in modules:
            spot = self.layout.spot(module.name)
            if _has_bias(module) and (spot is None or spot.name not in self.layout.row.biases):
                faults.add(
                    where=f"{module.name}.bias",
                    expected=f"no bias: the class of {self.model.name} in the TensorRT backend leaves it out",
                    found="a bias",
                    remedy="Convert with --to modelopt: the PyTorch backend adds it.",
                )

    def _refuse_zeroed_biases(self, modules: Iterable[ModulePlan], faults: FaultCollector) -> None:
        """Add a fault for biases of plain Linears that the loader sets to zero on all ranks but the first.

        It knows them by their name only. A plain Linear adds its bias on every rank after the ranks are added up, so
        that the ranks would go on with different numbers.
        """
        mode = self.choice.mode
        if mode is None or mode.row_bias is not RowBias.ZEROED_BY_LOADER or self.parallel.tensor == 1:
            return
        names = [
            module.name
            for module in modules
            if _has_bias(module)
            and module.name in self.layout.sites.keys() - self.choice.held.keys()
            and self.layout.is_row_parallel(module.name)
        ]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            faults.add(
                where=f"{names[0]}.bias{more}",
                expected=f"no bias of a plain Linear beside {mode.algo}",
                found="one: the loader sets it to zero on all ranks but the first, and all of them add theirs",
                remedy="Convert with --tp 1, or with --to modelopt: the PyTorch backend adds it once.",
            )


def _has_bias(module: ModulePlan) -> bool:
    """Whether a module delivers a bias."""
    return any(delivery.name.endswith(".bias") for delivery in module.deliveries)


def refuse_unbuilt(
    model: Model, parallel: Parallel, cache: QuantArgs | None, faults: FaultCollector, *, dense_o_proj: bool
) -> bool:
    """Add faults for a model, sizes or a KV cache that engine files can't hold; return whether planning can go on.

    It can for every class whose names are known, to find all other faults; the plan is of no use then.
    """
    known = model.name in BUILD_CLASSES and not model.multimodal
    if not known:
        faults.add(
            where="config.json: architectures",
            expected=f"one of {', '.join(BUILD_CLASSES)}, whose names in the TensorRT backend are known",
            found=f"{model.name}{', a part of a larger model' if model.multimodal else ''}",
            remedy="Convert with --to modelopt, or with --to dense, which works for every architecture.",
        )
    if parallel.expert > 1 or parallel.attention_dp:
        faults.add(
            where="--ep",
            expected="1: target engine divides experts like all other modules (moe_tp_size)",
            found=str(parallel.expert),
            remedy="Leave --ep out, or convert with --to modelopt.",
        )
    if dense_o_proj:
        faults.add(
            where="--dense-o-proj",
            expected="no such option: attention of the TensorRT backend writes its output in the model's dtype",
            found="--dense-o-proj",
            remedy="Leave it out, or convert with --to modelopt.",
        )
    if cache is not None and not cache.symmetric:
        faults.add(
            where="kv_cache_scheme",
            expected="a symmetric KV cache: engines have no zero points, and would clip values at another bound",
            found=cache.label(),
            remedy="Remove kv_cache_scheme to build with a 16-bit cache.",
        )
    return known

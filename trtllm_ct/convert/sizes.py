"""For which sizes, release and GPU a converted directory was planned, and what it does with other settings.

The record is the key `planned_for` of hf_quant_config.json, beside `quantization`. Readers look only at `quantization`
and at the producer's name. Source: TensorRT-LLM `quantization/modelopt_config.py` (`read_modelopt_quant_config`), in
older releases `_torch/model_config.py` (`load_modelopt_quant_config`) and `llmapi/llm_utils.py`.
A directory without quantized modules has no such file: plain weights can be cut anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, FaultCollector, UsageError
from trtllm_ct.base.json_form import from_fields, json_object
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.checkpoint.source import as_source
from trtllm_ct.config.json_file import read_json_of
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.engine.quant_config import QuantConfig, read_quantization
from trtllm_ct.engine.releases import RELEASES, release_named
from trtllm_ct.plan.attention_output import unscaled_outputs
from trtllm_ct.plan.engine_class import lacks_class
from trtllm_ct.plan.gathering import gather_modules
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.plan.ranks.cuts import is_uneven
from trtllm_ct.plan.ranks.held import misread_biases, uneven_faults, unheld_modules, unrunnable_modules
from trtllm_ct.plan.ranks.planned_model import model_of_plan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from typing_extensions import Self

    from trtllm_ct.checkpoint.source import Source
    from trtllm_ct.engine.platform import Platform
    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.plan.stored import StoredModule

__all__ = [
    "CONVERTER",
    "QUANT_CONFIG",
    "ConvertedDirectory",
    "model_of_directory",
    "planned_for",
    "require_sizes",
    "size_warnings",
]

QUANT_CONFIG = "hf_quant_config.json"
CONVERTER = "trtllm-ct"
"""The name of this package as `converter` in that file."""

_KEY = "planned_for"
_COMMON_SIZES = (2, 4, 8)
_LARGER_SIZES = (1, *_COMMON_SIZES, 16)


def planned_for(plan: Plan) -> dict[str, Any]:
    """Return the record of a plan's sizes, release and SM, as a part of hf_quant_config.json.

    The SM is in it if the plan was made for one, and `requantized` if modules were rounded to codes on request.
    """
    more: dict[str, Any] = {} if plan.sm is None else {"sm": plan.sm}
    if plan.requantized:
        more["requantized"] = plan.requantized
    return {_KEY: json_object({"engine": plan.engine, "parallel": plan.parallel, **more})}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedDirectory:
    """A directory that this package converted for TensorRT-LLM; its JSON files are read.

    The headers of its tensors are read too. `directory` is its path, or the name of a repository that holds its files.

    `engine` is the name of the release that it was planned for, and `parallel` are the sizes. `sm` is the SM of the
    GPUs, None if it was planned for none in particular. `record_fault` says why these three can't be read; then it is
    not known which sizes the directory holds, except that one rank takes each weight as a whole.
    """

    directory: Path | str
    engine: str
    parallel: Parallel
    model: Model
    quant_config: QuantConfig
    sm: int | None = None
    record_fault: Fault | None = None

    @classmethod
    def open(cls, directory: str | Path | Source) -> Self | None:
        """Read a directory; returns None for a directory that this package did not convert for TensorRT-LLM.

        A prepared directory, which holds no weights, is none either: its plan was made for the sizes of its engine.
        Raises `ConfigError` or `CatalogError` for other JSON files or headers of it that can't be read.
        """
        source = as_source(directory)
        if not source.has(QUANT_CONFIG) or not any(name.endswith(".safetensors") for name in source.names()):
            return None
        document, where = read_json_of(source, QUANT_CONFIG), source.where(QUANT_CONFIG)
        converter = document.get("converter")
        made_here = isinstance(converter, Mapping) and converter.get("name") == CONVERTER
        if _KEY not in document and not made_here:
            return None
        quant_config = read_quantization(document, where)
        engine, parallel, sm, fault = _read_record(document.get(_KEY), where)
        return cls(
            directory=source.folder or source.place,
            engine=engine,
            parallel=parallel,
            model=model_of_directory(source, quant_config),
            quant_config=quant_config,
            sm=sm,
            record_fault=fault,
        )

    @property
    def modules(self) -> int:
        """The number of quantized modules."""
        layers = (self.quant_config.layer_config(site.module) for site in self._sites if len(site.shape) > 1)
        return sum(layer is not None for layer in layers)

    def faults(self, parallel: Parallel) -> tuple[Fault, ...]:
        """Return why the directory can't be served with these sizes, or that it is not known; empty if it can."""
        if self.record_fault is not None:
            return () if parallel == ONE_RANK else (self.record_fault,)
        uneven = uneven_faults(self.model, parallel)
        unheld = () if uneven else unheld_modules(self._sites, self.quant_config.layer_config, parallel)
        if not unheld:
            return uneven
        fitting = ", ".join(str(size) for size in self._held_sizes(parallel))
        return (
            Fault(
                where=str(self.directory),
                expected=f"the sizes that it was converted for ({_label(self.parallel)}), or others that it holds",
                found=f"{_label(parallel)}, which would cut modules apart: {_by_reason(unheld)}",
                remedy=f"Convert the source again with {_options(parallel)}"
                + (f", or serve with tensor-parallel size {fitting}." if fitting else "."),
            ),
        )

    def gpu_faults(self, platform: Platform) -> tuple[Fault, ...]:
        """Return why the directory can't be served by this release on its GPU; empty if it can, or for no known GPU."""
        unrunnable = unrunnable_modules(self._sites, self.quant_config.layer_config, platform, self.model.dtype)
        if not unrunnable:
            return ()
        made_for = "no GPU in particular" if self.sm is None else f"SM{self.sm}"
        return (
            Fault(
                where=str(self.directory),
                expected=f"a GPU that runs its modes; it was converted for {made_for}",
                found=f"SM{platform.sm}, which can't serve {_by_reason(unrunnable)}",
                remedy=f"Convert the source again with --engine {platform.release.name} --sm {platform.sm}.",
            ),
        )

    def older_release(self, engine: str) -> Fault | None:
        """Return a fault if the release named `engine` is older than the one that the directory was planned for."""
        names = [release.name for release in RELEASES]
        if {engine, self.engine} <= {*names} and names.index(engine) < names.index(self.engine):
            return Fault(
                where=str(self.directory),
                expected=f"TensorRT-LLM of {self.engine}, which it was converted for",
                found=f"{engine}, which may lack a mode or read it in another way",
                remedy=f"Convert the source again with --engine {engine}.",
            )
        return None

    def unscaled_outputs(self, engine: str, kv_cache: str | None = None) -> tuple[str, ...]:
        """Return the output projections whose input attention quantizes at a fixed scale; see `unscaled_outputs`.

        `engine` is the name of the release that serves the directory. `kv_cache` is the mode of the KV cache that a
        user sets; None means that of the directory.
        """
        layers = {site.module: self.quant_config.layer_config(site.module) for site in self._sites}
        algos = {name: layer.quant_algo if layer else None for name, layer in layers.items()}
        return unscaled_outputs(
            algos,
            kv_cache or self.quant_config.kv_cache_quant_algo,
            architecture=self.model.name,
            release=release_named(engine),
        )

    @property
    def _sites(self) -> list[Site]:
        """The modules of the model, under the names that the directory has."""
        names = {*self.quant_config.exclude_modules, *self.quant_config.quantized_layers}
        return list(self.model.sites(self.model.place(names)))

    def _held_sizes(self, parallel: Parallel) -> list[int]:
        """Return the tensor-parallel sizes among powers of two that the directory holds beside the other sizes."""
        sites = self._sites
        return [
            size
            for size in _LARGER_SIZES
            if size % parallel.expert == 0
            and not uneven_faults(self.model, replace(parallel, tensor=size))
            and not unheld_modules(sites, self.quant_config.layer_config, replace(parallel, tensor=size))
        ]


def _read_record(record: object, path: str) -> tuple[str, Parallel, int | None, Fault | None]:
    """Return the release, the sizes and the SM of a record, and a fault if they can't be read."""
    found = "no record"
    if isinstance(record, Mapping):
        try:
            engine, sm = record["engine"], record.get("sm")
            parallel = from_fields(Parallel, record["parallel"])
            if isinstance(engine, str) and release_named(engine) is not None:
                return engine, parallel, None if sm is None else int(sm), None
            found = f"an engine called {engine!r}"
        except (UsageError, AttributeError, KeyError, TypeError, ValueError) as error:
            found = f"no key {error}" if isinstance(error, KeyError) else str(error)
    names = ", ".join(release.name for release in RELEASES)
    fault = Fault(
        where=f"{path}: {_KEY}",
        expected=f"the engine ({names}) and the parallel sizes that the directory was converted for",
        found=f"{found}; whether it holds other sizes is not known",
        remedy="Convert the source again, with the parallel sizes that the engine will run with.",
    )
    return "", ONE_RANK, None, fault


def model_of_directory(source: Source, quant_config: QuantConfig) -> Model:
    """Return the model of a converted directory, with the modules in its headers."""
    model = Model.from_config(read_json_of(source, "config.json"))
    stored = gather_modules(Catalog.from_source(source), model, FaultCollector(), split_stacks=True)
    shapes = {name: _codes_shape(module, quant_config.layer_config(name)) for name, module in stored.items()}
    return model.in_checkpoint(stored, {name: shape for name, shape in shapes.items() if shape is not None})


def _codes_shape(module: StoredModule, layer: LayerQuantConfig | None) -> tuple[int, int] | None:
    """Return the shape of the weight of a converted module; None if it has no codes of a known mode."""
    weight = module.specs.get("weight")
    mode = None if layer is None else MODES_BY_ALGO.get(layer.quant_algo)
    if weight is None or mode is None or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    return (rows, columns) if mode.packing is None else mode.packing.unpacked_shape((rows, columns))


def require_sizes(
    directory: str | Path, parallel: Parallel, platform: Platform | None = None
) -> ConvertedDirectory | None:
    """Raise `UsageError` if a directory was converted by this package and doesn't hold the sizes, or the GPU's modes.

    `platform` is the installed release with the SM of its GPU, None without any.
    Sizes of several ranks that it is not known to hold are refused too.
    Returns the directory; None if this package did not convert it for TensorRT-LLM.
    """
    converted = ConvertedDirectory.open(directory)
    if converted is not None:
        gpu_faults = () if platform is None else converted.gpu_faults(platform)
        faults = FaultCollector([*converted.faults(parallel), *gpu_faults])
        faults.raise_if_any(UsageError)
    return converted


def size_warnings(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """Return a warning that names common sizes at which a directory would be wrong; empty if it holds them.

    Only for a plan with the default sizes: with others, a user has said with which ones the engine will run, and the
    files of ranks are for these sizes alone. Sizes that
    don't divide the model are left out, since the engine refuses them; and of a class that it lacks it reads nothing.
    """
    if plan.parallel != ONE_RANK or plan.quant_config.quant_algo is None or plan.build_config is not None:
        return ()
    if lacks_class(plan.problems):
        return ()
    model, layers = model_of_plan(plan, checkpoint.model), {module.name: module.layer for module in plan.modules}
    sites = list(model.sites(model.place(layers)))
    wrong: dict[tuple[str, ...], dict[int, str]] = {}
    for size in _COMMON_SIZES:
        parallel = Parallel(tensor=size)
        unheld = misread_biases(model, parallel) | unheld_modules(sites, layers.get, parallel)
        if unheld and not is_uneven(model, parallel):
            wrong.setdefault(tuple(unheld), {})[size] = _by_reason(unheld)
    # Reasons have numbers that differ by size: those of the first size of the same modules stand for all.
    return tuple(
        f"at tensor-parallel size {', '.join(map(str, reasons))}, an engine would misread the directory, as it cuts "
        f"modules apart: {next(iter(reasons.values()))}; convert with --tp"
        for reasons in wrong.values()
    )


def _by_reason(modules: Mapping[str, str]) -> str:
    """Return the last parts of the names of modules, each once for a reason, and the reasons behind them."""
    leaves: dict[str, dict[str, None]] = {}
    for module, reason in modules.items():
        leaves.setdefault(reason, {})[module.rpartition(".")[2]] = None
    return "; ".join(f"{format_names(names)} ({reason})" for reason, names in leaves.items())


def _label(parallel: Parallel) -> str:
    """Return sizes in words; pipeline and expert parallelism only where there are several ranks."""
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "expert": parallel.expert}
    return ", ".join(f"{name} parallel {size}" for name, size in sizes.items() if size > 1 or name == "tensor")


def _options(parallel: Parallel) -> str:
    """Return the options of `convert` for these sizes."""
    sizes: Iterable[tuple[str, int]] = (("tp", parallel.tensor), ("pp", parallel.pipeline), ("ep", parallel.expert))
    return " ".join(f"--{name} {size}" for name, size in sizes if size > 1 or name == "tp")

"""`diagnose`: report which engine `LLM` runs on this machine, its features, and how it would serve a directory.

Everything is probed: packages by whether they can be found, features of the engine by its signatures and members.
Release numbers are shown, but nothing depends on them.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.arguments import check_arguments
from trtllm_ct.base.errors import CheckpointError, Fault
from trtllm_ct.base.json_form import json_form, json_object
from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.checkpoint.opening import open_source
from trtllm_ct.checkpoint.source import local_folder
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS, ENGINE_BUILD, MODELOPT, SIDECAR, describe_method
from trtllm_ct.convert.sizes import ConvertedDirectory
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.engine.target import REFERENCE, target_named
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.options import PARALLEL
from trtllm_ct.serve.features import unknown_class
from trtllm_ct.serve.llm import engine_installed, require_engine
from trtllm_ct.serve.llm_arguments import converted_scale_fault, fixed_scale_fault
from trtllm_ct.serve.patch_switch import NO_PATCH
from trtllm_ct.serve.sidecar import Sidecar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trtllm_ct.checkpoint.source import Source
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.serve.features import EngineFeatures

__all__ = ["Diagnosis", "Machine", "Served", "diagnose", "inspect_machine"]

# What a machine may lack beside the engine; the other packages come with this one, or are asked for by an option.
_OPTIONAL = ("transformers",)
_REQUIRED = ("torch", "numpy", "numba", "llvmlite", "huggingface_hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The engine that `LLM` runs on this machine.

    Attributes:
        engine: `tensorrt_llm` or `reference`.
        why: The reason for this choice of engine.
        target: The target that checkpoints are planned for.
        features: The features of TensorRT-LLM; None when it is not installed.
        missing: Packages and features that are missing, with the consequence and the remedy.
    """

    engine: str
    why: str
    target: Target
    features: EngineFeatures | None
    missing: tuple[Fault, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the machine as a JSON object."""
        capabilities = self.target.capabilities
        return json_object(
            {
                "engine": self.engine,
                "why": self.why,
                "features": self.features,
                "capabilities": {
                    "name": capabilities.name,
                    "source": capabilities.source,
                    "linear": capabilities.linear,
                    "experts": capabilities.experts,
                    "kv_cache": capabilities.kv_cache,
                },
                "missing": self.missing,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How the engine would serve a directory.

    `directory` is its path, or the name of a repository with its commit. `plan` is None if the directory is neither a
    compressed-tensors checkpoint nor prepared from one, or if `problems` prevent it from being served. `traps` are
    faults that don't prevent the model from running, but may make its output wrong.
    """

    directory: Path | str
    parallel: Parallel
    detection: Detection
    plan: Plan | None
    traps: tuple[Fault, ...]
    problems: tuple[Fault, ...]
    warnings: tuple[str, ...] = ()

    @property
    def native(self) -> dict[str, int]:
        """The number of modules that are delivered quantized, by mode."""
        modules = self.plan.modules if self.plan else ()
        return dict(Counter(module.delivered_mode for module in modules if module.layer))

    @property
    def dequantized(self) -> dict[str, tuple[str, ...]]:
        """The names of the modules that are dequantized, by reason."""
        reasons: dict[str, tuple[str, ...]] = {}
        for module in self.plan.modules if self.plan else ():
            if module.dequantized:
                reasons[module.reason] = (*reasons.get(module.reason, ()), module.name)
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """Return the plan's summary and the faults as a JSON object."""
        plan = self.plan
        return json_object(
            {
                "directory": self.directory,
                "parallel": self.parallel,
                "description": self.detection.description,
                "native": self.native,
                "dequantized": self.dequantized,
                "kv_cache": plan.quant_config.kv_cache_quant_algo if plan else None,
                "delivered_bytes": plan.delivered_bytes if plan else None,
                "deviations": plan.deviations if plan else (),
                "warnings": self.warnings,
                "traps": self.traps,
                "problems": self.problems,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The result of `diagnose`: the machine, and how a directory would be served if one was given."""

    machine: Machine
    served: Served | None

    @property
    def good(self) -> bool:
        """Whether no directory was given, or the directory has no problems that prevent it from being served."""
        return self.served is None or not self.served.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as a JSON object: the machine's, with the directory as `served`."""
        return self.machine.to_dict() | {"served": json_form(self.served)}


def diagnose(directory: str | Path | None = None, *, parallel: Parallel = ONE_RANK) -> Diagnosis:
    """Report the engine of this machine and, if `directory` is given, how it would serve that checkpoint.

    `directory` may be the name of a repository of the Hub too, such as `ORG/NAME@REVISION`; see `open_source`.
    `parallel` are the parallel sizes that the checkpoint would be served with. Reads headers only. Raises
    `MissingDependencyError` if TensorRT-LLM is installed but can't be imported, `DetectionError` if `directory` is not
    a checkpoint directory, and `HubError` if a repository can't be read.
    """
    check_arguments({"parallel": PARALLEL}, {"parallel": parallel})
    machine = inspect_machine()
    return Diagnosis(machine=machine, served=_serve(open_source(directory), parallel, machine) if directory else None)


def inspect_machine() -> Machine:
    """Report the engine of this machine; raises `MissingDependencyError` as `diagnose` does."""
    packages = (PACKAGES[name] for name in (*_REQUIRED, *_OPTIONAL))
    missing = [package.fault() for package in packages if not package.installed]
    if not engine_installed():
        missing.insert(0, PACKAGES["tensorrt_llm"].fault())
        why = "TensorRT-LLM is not installed"
        return Machine(engine="reference", why=why, target=REFERENCE, features=None, missing=tuple(missing))
    # TensorRT-LLM prints a greeting to stdout when it is imported, which must not get into a JSON document there.
    with redirect_stdout(sys.stderr):
        require_engine()
        from trtllm_ct.serve.bindings import engine_features

        features = engine_features()
    target = target_named("tensorrt_llm", features.engine, sm=features.sm, additive_zeros=features.additive_zeros)
    missing += _missing_features(features, target)
    return Machine(
        engine="tensorrt_llm", why="it is installed", target=target, features=features, missing=tuple(missing)
    )


def _serve(source: Source, parallel: Parallel, machine: Machine) -> Served:
    detection = FormatDetector().detect(source)
    plan: Plan | None = None
    traps: tuple[Fault | None, ...] = ()
    problems: tuple[Fault, ...] = ()
    warnings: tuple[str, ...] = ()
    if detection.method in {COMPRESSED_TENSORS, SIDECAR}:
        try:
            plan = _plan(source, detection, parallel, machine)
            warnings = plan.warnings
        except CheckpointError as error:
            problems, warnings = error.faults, error.warnings
    elif detection.method == ENGINE_BUILD:
        problems = (_engine_build(source, detection),)
    else:
        try:
            problems, traps = _converted(source, parallel, machine)
        except CheckpointError as error:
            problems, warnings = error.faults, error.warnings
        warnings += _unknown_sizes(source, detection, parallel)
    if plan is not None and machine.features is not None:
        missing = unknown_class(detection, machine.features)
        problems = (missing,) if missing else ()
        traps = (fixed_scale_fault([plan], machine.features),)
    return Served(
        directory=source.folder or source.place,
        parallel=parallel,
        detection=detection,
        plan=plan,
        traps=tuple(trap for trap in traps if trap is not None),
        problems=problems,
        warnings=warnings,
    )


def _engine_build(source: Source, detection: Detection) -> Fault:
    """Return why an engine-build checkpoint can't be served as it is."""
    return Fault(
        where=source.place,
        expected="a directory that LLM loads",
        found=detection.description,
        remedy=describe_method(ENGINE_BUILD).remedy,
    )


def _unknown_sizes(source: Source, detection: Detection, parallel: Parallel) -> tuple[str, ...]:
    """Return a warning about sizes of a directory that another tool quantized: nothing says which ones it holds."""
    with suppress(CheckpointError):
        if detection.method != MODELOPT or parallel == ONE_RANK or ConvertedDirectory.open(source) is not None:
            return ()
        return ("no record says which parallel sizes it holds; the engine is told these without a check",)
    return ()


def _converted(
    source: Source, parallel: Parallel, machine: Machine
) -> tuple[tuple[Fault, ...], tuple[Fault | None, ...]]:
    """Return why a converted directory can't be served with these sizes on this GPU, and its traps in the engine.

    Both are empty for a directory that this package did not convert for TensorRT-LLM. Raises `CheckpointError` if it
    did, and its files don't say which sizes it holds.
    """
    converted = ConvertedDirectory.open(source)
    if converted is None:
        return (), ()
    if machine.features is None:
        return converted.faults(parallel), ()
    traps = (
        converted.older_release(machine.features.engine),
        converted_scale_fault(converted, machine.features.engine),
    )
    return converted.faults(parallel) + converted.gpu_faults(machine.features.platform), traps


def _plan(source: Source, detection: Detection, parallel: Parallel, machine: Machine) -> Plan:
    """Return the plan by which `LLM` would serve a checkpoint.

    For a prepared directory, this is the plan of its source with the options that the directory was prepared with.
    """
    prepared = Sidecar.open(local_folder(source)) if detection.method == SIDECAR else None
    features = machine.features
    if features is None:
        checkpoint = open_checkpoint(prepared.source) if prepared else open_checkpoint(source, detection)
        return checkpoint.plan(machine.target.name, parallel=parallel)
    if prepared:
        return prepared.checkpoint.plan_for(replace(prepared.options, parallel=parallel))
    return open_checkpoint(source, detection).plan_for(replace(features.plan_options, parallel=parallel))


def _missing_features(features: EngineFeatures, target: Target) -> Iterator[Fault]:
    """Yield the features that a later release, or this release with other settings, would have."""
    current, newest = target.capabilities, (target.newer or (target.capabilities,))[-1]
    algos = sorted((newest.linear | newest.experts) - (current.linear | current.experts))
    if algos:
        yield Fault(
            where=f"capability set {current.name}",
            expected=f"the modes of {newest.name}",
            found=f"no {', '.join(algos)}",
            remedy="Modules that need one of them are dequantized; a newer TensorRT-LLM has them.",
        )
    if not features.additive_zeros:
        yield Fault(
            where="W4A16_GPTQ",
            expected="a Linear for asymmetric int4, the engine's or this package's",
            found=f"neither: {NO_PATCH} is set, or this TensorRT-LLM offers no way to install this package's",
            remedy=f"Asymmetric int4 is dequantized; unset {NO_PATCH} to have it served as it is.",
        )
    if not features.force_dynamic_quantization:
        yield Fault(
            where="LLM(force_dynamic_quantization=...)",
            expected="an argument that keeps attention from quantizing its output at a fixed scale",
            found="none that attention honours in this TensorRT-LLM",
            remedy="With a quantized KV cache, pass dense_o_proj=True for row-wise or block-wise FP8.",
        )

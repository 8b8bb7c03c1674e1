"""`diagnose`: which engine `LLM` runs on this machine, what of it decides plans, and what it makes of a directory.

Everything is found by looking: packages by whether they are there, features of the engine by its signatures and
members. Release numbers are shown and decide nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CheckpointError, Fault
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.engine.target import REFERENCE, target_named
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.serve.llm import engine_installed, require_engine
from trtllm_ct.serve.llm_arguments import fixed_scale_fault
from trtllm_ct.serve.patch_switch import NO_PATCH
from trtllm_ct.serve.sidecar import ServingOptions, Sidecar, is_sidecar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.serve.features import EngineFeatures

__all__ = ["Diagnosis", "Machine", "Served", "diagnose", "look_at_machine"]

_PACKAGES = (
    ("transformers", "the CPU reference engine computes with its architectures", "pip install 'trtllm-ct[reference]'"),
    ("huggingface_hub", "ids of Hugging Face repositories are resolved by it", "pip install huggingface_hub"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The engine that `LLM` runs here and why, what it holds, and what is missing.

    `engine` is `tensorrt_llm` or `reference`, `target` what checkpoints are planned for. `features` are those of
    TensorRT-LLM, None without it.
    """

    engine: str
    why: str
    target: Target
    features: EngineFeatures | None
    missing: tuple[Fault, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        held = self.target.capabilities
        return {
            "engine": self.engine,
            "why": self.why,
            "features": self.features.to_dict() if self.features else None,
            "capabilities": {
                "name": held.name,
                "source": held.source,
                "linear": sorted(held.linear),
                "experts": sorted(held.experts),
                "kv_cache": sorted(held.kv_cache),
            },
            "missing": [fault.to_dict() for fault in self.missing],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the engine makes of a directory.

    `plan` is None for what is neither a compressed-tensors checkpoint nor prepared from one, and where `problems` keep
    it from being served. `traps` are faults with which the model runs, and may be wrong.
    """

    directory: Path
    parallel: Parallel
    detection: Detection
    plan: Plan | None
    traps: tuple[Fault, ...]
    problems: tuple[Fault, ...]

    @property
    def native(self) -> dict[str, int]:
        """How many modules keep their codes, by mode."""
        modules = self.plan.modules if self.plan else ()
        return dict(Counter(module.delivered_mode for module in modules if module.layer))

    @property
    def dequantized(self) -> dict[str, tuple[str, ...]]:
        """Modules that are dequantized, by reason."""
        reasons: dict[str, tuple[str, ...]] = {}
        for module in self.plan.modules if self.plan else ():
            if module.dequantized:
                reasons[module.reason] = (*reasons.get(module.reason, ()), module.name)
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        plan = self.plan
        return {
            "directory": str(self.directory),
            "parallel": self.parallel.to_dict(),
            "description": self.detection.description,
            "native": self.native,
            "dequantized": {reason: list(modules) for reason, modules in self.dequantized.items()},
            "kv_cache": plan.quant_config.kv_cache_quant_algo if plan else None,
            "delivered_bytes": plan.delivered_bytes if plan else None,
            "warnings": list(plan.warnings) if plan else [],
            "traps": [fault.to_dict() for fault in self.traps],
            "problems": [fault.to_dict() for fault in self.problems],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The machine, and a directory on it when one was named."""

    machine: Machine
    served: Served | None

    @property
    def good(self) -> bool:
        """Whether nothing keeps the directory from being served."""
        return self.served is None or not self.served.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return self.machine.to_dict() | {"served": self.served.to_dict() if self.served else None}


def diagnose(directory: str | Path | None = None, *, parallel: Parallel = ONE_RANK) -> Diagnosis:
    """Look at this machine, and at a checkpoint as its engine would serve it with these sizes; headers only.

    Raises `MissingDependencyError` for a TensorRT-LLM that is installed and can't be imported, `DetectionError` for
    what is no checkpoint directory.
    """
    machine = look_at_machine()
    return Diagnosis(machine=machine, served=_serve(Path(directory), parallel, machine) if directory else None)


def look_at_machine() -> Machine:
    """The machine alone; raises `MissingDependencyError` as `diagnose` does."""
    missing = [_not_installed(name, use, f"Run: {command}") for name, use, command in _PACKAGES if not _there(name)]
    if not engine_installed():
        use = "without it the CPU reference engine runs"
        missing.insert(0, _not_installed("tensorrt_llm", use, "Run: pip install 'trtllm-ct[tensorrt-llm]'"))
        why = "TensorRT-LLM is not installed"
        return Machine(engine="reference", why=why, target=REFERENCE, features=None, missing=tuple(missing))
    # It greets on stdout when it is imported, where a document may be expected.
    with redirect_stdout(sys.stderr):
        require_engine()
        from trtllm_ct.serve.bindings import engine_features

        features = engine_features()
    target = target_named("tensorrt_llm", features.engine, additive_zeros=features.additive_zeros)
    missing += _missing_features(features, target)
    return Machine(
        engine="tensorrt_llm", why="it is installed", target=target, features=features, missing=tuple(missing)
    )


def _serve(directory: Path, parallel: Parallel, machine: Machine) -> Served:
    detection = FormatDetector().detect(directory)
    plan: Plan | None = None
    trap: Fault | None = None
    problems: tuple[Fault, ...] = ()
    if detection.method == COMPRESSED_TENSORS or is_sidecar(directory):
        try:
            plan = _plan(directory, parallel, machine)
        except CheckpointError as error:
            problems = error.faults
    if plan is not None and machine.features is not None:
        trap = fixed_scale_fault([plan], machine.features)
    return Served(
        directory=directory,
        parallel=parallel,
        detection=detection,
        plan=plan,
        traps=(trap,) if trap else (),
        problems=problems,
    )


def _plan(directory: Path, parallel: Parallel, machine: Machine) -> Plan:
    """Of a prepared directory, that of its source under the options that it was prepared with, as `LLM` takes it."""
    prepared = Sidecar.open(directory) if is_sidecar(directory) else None
    features = machine.features
    if features is None:
        source = prepared.source if prepared else directory
        return open_checkpoint(source).plan(machine.target.name, parallel=parallel)
    if prepared:
        return replace(prepared.options, parallel=parallel).plan(prepared.checkpoint)
    options = ServingOptions(engine=features.engine, additive_zeros=features.additive_zeros, parallel=parallel)
    return options.plan(open_checkpoint(directory))


def _missing_features(features: EngineFeatures, target: Target) -> Iterator[Fault]:
    """What later releases, or this one with other settings, would add."""
    held, newest = target.capabilities, (target.newer or (target.capabilities,))[-1]
    algos = sorted((newest.linear | newest.experts) - (held.linear | held.experts))
    if algos:
        yield Fault(
            where=f"capability set {held.name}",
            expected=f"the modes of {newest.name}",
            found=f"no {', '.join(algos)}",
            remedy="Modules that need one of them are dequantized; a newer TensorRT-LLM has them.",
        )
    if not features.additive_zeros:
        yield Fault(
            where="W4A16_GPTQ",
            expected="a Linear for asymmetric int4, the engine's or this package's",
            found=f"neither: {NO_PATCH} is set, or this TensorRT-LLM gives no place for ours",
            remedy=f"Asymmetric int4 is dequantized; unset {NO_PATCH} to have it served as it is.",
        )
    if not features.force_dynamic_quantization:
        yield Fault(
            where="LLM(force_dynamic_quantization=...)",
            expected="an argument that keeps attention from quantizing its output at a fixed scale",
            found="none in this TensorRT-LLM",
            remedy="For row-wise FP8 pass dense_o_proj=True, or look at the text before you trust it.",
        )


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _not_installed(package: str, use: str, remedy: str) -> Fault:
    return Fault(where=package, expected=f"the package: {use}", found="not installed", remedy=remedy)

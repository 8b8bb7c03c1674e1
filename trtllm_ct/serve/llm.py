"""`LLM` and `SamplingParams`: the same program runs on machines with and without TensorRT-LLM.

With TensorRT-LLM, `LLM` returns a real `tensorrt_llm.LLM`, and `SamplingParams` is the class of TensorRT-LLM. Without
it, both come from the CPU reference engine. A log line says which engine runs, and why.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.errors import Fault, MissingDependencyError, UsageError
from trtllm_ct.base.packages import PACKAGES, missing_packages_as_errors
from trtllm_ct.serve.hub import repository_named

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.reference.requests import SamplingParams

__all__ = ["LLM", "Engine", "SamplingParams", "engine_installed", "require_engine"]

Engine = Literal["auto", "tensorrt_llm", "reference"]

_ENGINES = ("auto", "tensorrt_llm", "reference")
# The arguments of `LLM` that the reference engine uses.
_REFERENCE_ARGUMENTS = ("tokenizer", "skip_tokenizer_init", "dtype")

logger = logging.getLogger("trtllm_ct")


@missing_packages_as_errors()
def LLM(  # noqa: N802 (named like the TensorRT-LLM class of which it returns an instance)
    model: str | Path,
    *,
    engine: Engine = "auto",
    dense_o_proj: bool = False,
    requantize: str | Mapping[str, str] | None = None,
    calibration: str | Path | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> Any:
    """Return a model that generates text: a `tensorrt_llm.LLM`, or a `ReferenceLLM` with the same `generate`.

    `model` is a checkpoint directory or the id of a Hugging Face repository. A model that isn't compressed-tensors is
    passed to the engine unchanged. `engine` chooses the engine; "auto" means TensorRT-LLM if it is installed, and the
    CPU reference engine otherwise. `kwargs` are the other arguments of `tensorrt_llm.LLM`, which gets all of them.

    Some options apply to compressed-tensors models in TensorRT-LLM only: `dense_o_proj` dequantizes `o_proj` of
    attention where attention would quantize its input at a fixed scale of 1, `requantize`, such as `experts=fp8-block`,
    rounds modules to codes that would be dequantized, with the scales of inputs in the file `calibration` if kernels
    need them (`pipeline/calibration.py`), and `strict` raises instead of dequantizing a module for which
    the engine has no mode. The reference engine computes the stored weights, so it ignores them.

    Raises `UsageError` for arguments that can't work together, `MissingDependencyError` where a package is missing,
    `CheckpointError` with all faults of a checkpoint, and whatever the engine raises.
    """
    if engine not in _ENGINES:
        raise UsageError(
            Fault(where="engine", expected=" or ".join(_ENGINES), found=repr(engine), remedy="Choose one of these.")
        )
    if engine == "reference" or (engine == "auto" and not engine_installed()):
        reason = "engine='reference'" if engine == "reference" else "TensorRT-LLM is not installed here"
        from trtllm_ct.pipeline.calibration import asked_requantization

        # What is refused does not depend on the machine.
        asked_requantization(requantize, calibration)
        conversion = {
            "dense_o_proj": dense_o_proj,
            "requantize": requantize,
            "calibration": calibration,
            "strict": strict,
        }
        level = logging.INFO if engine == "reference" else logging.WARNING
        return _reference_llm(model, kwargs, conversion, reason, level=level)
    require_engine()
    from trtllm_ct.serve.bindings import LOADERS, engine_features, engine_llm
    from trtllm_ct.serve.llm_arguments import engine_arguments

    features = engine_features()
    reason = "it is installed" if engine == "auto" else "engine='tensorrt_llm'"
    logger.info("TensorRT-LLM %s runs %s: %s", features.version or "of unknown release", model, reason)
    arguments = {"model": model, **kwargs}
    prepared = engine_arguments(
        arguments,
        features,
        LOADERS,
        dense_o_proj=dense_o_proj,
        requantize=requantize,
        calibration=calibration,
        strict=strict,
    )
    return engine_llm()(**prepared)


def engine_installed() -> bool:
    """Whether TensorRT-LLM is installed. Does not import it."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def require_engine() -> None:
    """Raise `MissingDependencyError` when TensorRT-LLM is not installed or can't be imported."""
    try:
        import trtllm_ct.serve.bindings  # noqa: F401
    except ImportError as error:
        fault = PACKAGES["tensorrt_llm"].fault(found=f"{type(error).__name__}: {error}")
        remedy = f"{fault.remedy} Or pass engine='reference' to compute on the CPU."
        raise MissingDependencyError(replace(fault, remedy=remedy)) from error


def _reference_llm(
    model: str | Path, arguments: Mapping[str, Any], conversion: Mapping[str, Any], reason: str, *, level: int
) -> Any:
    """Return a `ReferenceLLM`, and log at `level` what it ignores of the arguments and of the options of a conversion.

    It computes the stored weights, and a sidecar stands for its source.
    """
    from trtllm_ct.reference.llm import ReferenceLLM
    from trtllm_ct.serve.sidecar import Sidecar, is_sidecar

    ignored = [name for name in arguments if name not in (*_REFERENCE_ARGUMENTS, "revision")]
    ignored_note = f"; it ignores {', '.join(ignored)}" if ignored else ""
    note = f"{ignored_note}{_unused_note(conversion)}"
    logger.log(level, "The CPU reference engine runs %s: %s%s", model, reason, note)
    path = path_of("model", model)
    repository = repository_named(model, arguments.get("revision"))
    directory = repository.checkpoint() if repository else path
    if is_sidecar(directory):
        sidecar = Sidecar.open(directory)
        directory, options = sidecar.source, sidecar.options
        prepared = {"dense_o_proj": options.dense_o_proj, "requantize": options.requantize.words}
        if note := _unused_note(prepared):
            logger.log(level, "%s was prepared from %s%s of the preparation", sidecar.directory, directory, note)
    return ReferenceLLM(directory, **{name: arguments[name] for name in _REFERENCE_ARGUMENTS if name in arguments})


def _unused_note(conversion: Mapping[str, Any]) -> str:
    """Return what a log line says of the options of a conversion that are set; empty if none is."""
    unused = [name for name, value in conversion.items() if value]
    return f"; it computes the stored weights, so it ignores {', '.join(unused)}" if unused else ""


def __getattr__(name: str) -> Any:
    """Return `SamplingParams` of the engine that `engine="auto"` chooses.

    The class is not stored in the module, because tests change what is installed.
    """
    if name != "SamplingParams":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not engine_installed():
        from trtllm_ct.reference import requests

        return requests.SamplingParams
    require_engine()
    from trtllm_ct.serve.bindings import engine_sampling_params

    return engine_sampling_params()

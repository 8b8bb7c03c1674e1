"""`LLM` and `SamplingParams`: one program for a machine with TensorRT-LLM and for one without.

With TensorRT-LLM, `LLM` gives a real `tensorrt_llm.LLM`, and `SamplingParams` is its own class. Without it, the CPU
reference engine answers behind the same names. A log line says which one runs, and why.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtllm_ct.base.errors import Fault, MissingDependencyError, UsageError
from trtllm_ct.serve.hub import repository_named

if TYPE_CHECKING:
    from trtllm_ct.reference.requests import SamplingParams

__all__ = ["LLM", "Engine", "SamplingParams", "engine_installed", "require_engine"]

Engine = Literal["auto", "tensorrt_llm", "reference"]

_ENGINES = ("auto", "tensorrt_llm", "reference")
# What the reference engine takes of the arguments of `LLM`.
_REFERENCE_ARGUMENTS = ("tokenizer", "skip_tokenizer_init", "dtype")

logger = logging.getLogger("trtllm_ct")


def LLM(  # noqa: N802 (it stands where TensorRT-LLM has a class, and gives an instance of it)
    model: str | Path,
    *,
    engine: Engine = "auto",
    dense_o_proj: bool = False,
    strict: bool = False,
    **kwargs: Any,
) -> Any:
    """A model that generates text: `tensorrt_llm.LLM`, or a `ReferenceLLM` with the same `generate`.

    `model` is a checkpoint directory or the id of a Hugging Face repository; one that isn't compressed-tensors goes to
    the engine untouched. `engine` chooses; "auto" means TensorRT-LLM where it is installed. `kwargs` are those of
    `tensorrt_llm.LLM`, all of which it gets. `dense_o_proj` dequantizes row-wise FP8 output projections of attention,
    `strict` refuses to dequantize what the engine has no mode for; both for compressed-tensors models only.

    Raises `UsageError` for arguments that can't work together, `CheckpointError` with every fault of a checkpoint, and
    whatever the engine raises.
    """
    if engine not in _ENGINES:
        raise UsageError(
            Fault(where="engine", expected=" or ".join(_ENGINES), found=repr(engine), remedy="Choose one of these.")
        )
    if engine == "reference" or (engine == "auto" and not engine_installed()):
        why = "engine='reference'" if engine == "reference" else "TensorRT-LLM is not installed here"
        return _reference_llm(model, kwargs, why, level=logging.INFO if engine == "reference" else logging.WARNING)
    require_engine()
    from trtllm_ct.serve.bindings import LOADERS, engine_features, engine_llm
    from trtllm_ct.serve.llm_arguments import served_arguments

    features = engine_features()
    why = "it is installed" if engine == "auto" else "engine='tensorrt_llm'"
    logger.info("TensorRT-LLM %s runs %s: %s", features.version or "of unknown release", model, why)
    given = served_arguments({"model": model, **kwargs}, features, LOADERS, dense_o_proj=dense_o_proj, strict=strict)
    return engine_llm()(**given)


def engine_installed() -> bool:
    """Whether TensorRT-LLM is installed; it is not imported for this."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def require_engine() -> None:
    """Raise `MissingDependencyError` when TensorRT-LLM is not installed or can't be imported."""
    try:
        import trtllm_ct.serve.bindings  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            Fault(
                where="tensorrt_llm",
                expected="TensorRT-LLM, which serves on a GPU",
                found=f"{type(error).__name__}: {error}",
                remedy="Run: pip install 'trtllm-ct[tensorrt-llm]'; or pass engine='reference' to compute on the CPU.",
            )
        ) from error


def _reference_llm(model: str | Path, arguments: dict[str, Any], why: str, *, level: int) -> Any:
    from trtllm_ct.reference.llm import ReferenceLLM
    from trtllm_ct.serve.sidecar import Sidecar, is_sidecar

    idle = [name for name in arguments if name not in (*_REFERENCE_ARGUMENTS, "revision")]
    without = f"; it makes nothing of {', '.join(idle)}" if idle else ""
    logger.log(level, "The CPU reference engine runs %s: %s%s", model, why, without)
    repository = repository_named(model, arguments.get("revision"))
    directory = repository.checkpoint() if repository else Path(model)
    if is_sidecar(directory):
        directory = Sidecar.open(directory).source
    return ReferenceLLM(directory, **{name: arguments[name] for name in _REFERENCE_ARGUMENTS if name in arguments})


def __getattr__(name: str) -> Any:
    """`SamplingParams` of the engine that "auto" means; not kept, as tests change what is installed."""
    if name != "SamplingParams":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not engine_installed():
        from trtllm_ct.reference import requests

        return requests.SamplingParams
    require_engine()
    from trtllm_ct.serve.bindings import engine_sampling_params

    return engine_sampling_params()

"""The arguments of TensorRT-LLM's `LLM` for a compressed-tensors model: a sidecar as `model`, and a checkpoint loader.

A loader alone is not enough, because `LLM` reads config.json in the parent process before it calls any loader.
The arguments for a model that is not compressed-tensors are passed on unchanged. The user's objects are never modified.
Source: TensorRT-LLM `llmapi/llm_args.py`, `llmapi/llm_utils.py` and `mapping.py`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CheckpointError, Fault, FaultCollector, UsageError
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS
from trtllm_ct.convert.sizes import ConvertedDirectory, require_sizes
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.releases import KV_CACHE_WORDS
from trtllm_ct.pipeline.calibration import asked_requantization
from trtllm_ct.plan.attention_output import has_static_activations, unscaled_outputs_of
from trtllm_ct.plan.options import dense_dtype
from trtllm_ct.serve.features import require_class
from trtllm_ct.serve.hub import Repository, repository_named
from trtllm_ct.serve.sidecar import Sidecar, is_sidecar, make_sidecar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trtllm_ct.plan.options import PlanOptions
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.serve.features import EngineFeatures

__all__ = [
    "converted_scale_fault",
    "engine_arguments",
    "fixed_scale_fault",
    "kv_cache_named",
    "kv_cache_of",
    "parallel_of",
    "refuse_sizes",
]

logger = logging.getLogger("trtllm_ct")

# The names of the field that holds a draft model, from the newest release to the oldest.
_DRAFT_FIELDS = ("speculative_model", "speculative_model_dir")
_OTHER_BACKENDS = ("_autodeploy", "tensorrt")
_FORCE_DYNAMIC = "force_dynamic_quantization"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A compressed-tensors checkpoint on this machine, and the repository that it came from, pinned to a commit.

    `detection` is None for a sidecar and for a repository, whose configuration was detected before its weights came.
    """

    directory: Path
    repository: Repository | None = None
    detection: Detection | None = None


def engine_arguments(
    arguments: Mapping[str, Any],
    features: EngineFeatures,
    loaders: tuple[type, ...],
    *,
    dense_o_proj: bool = False,
    requantize: str | Mapping[str, str] | None = None,
    calibration: str | Path | None = None,
    strict: bool = False,
) -> Mapping[str, Any]:
    """Return the arguments to pass to the engine's `LLM`, given the user's arguments, `model` among them.

    A compressed-tensors model or draft model is replaced by its sidecar, and a checkpoint loader is added unless the
    user passed one. If neither is compressed-tensors, `arguments` itself is returned.
    `loaders` are the classes in `bindings.LOADERS`: the first is this package's checkpoint loader, which is added; the
    others are parts of it that a user may have put into one of the engine's loaders.
    Raises `UsageError` for arguments with which the engine would ignore the loader, and for a converted directory that
    doesn't hold the parallel sizes or whose modes don't run on the GPU; `PlanError` for a model whose class the engine
    lacks; and what planning raises.
    """

    def check(directory: Path) -> None:
        refuse_sizes(directory, arguments, features)

    model = _source(arguments.get("model"), arguments.get("revision"), features, check)
    draft_field, draft_model = _draft_model(arguments.get("speculative_config"))
    draft = _source(draft_model, None, features, check)
    if model is None and draft is None:
        return arguments
    _refuse_conflicts(arguments, loaders)
    options = replace(
        features.plan_options,
        parallel=parallel_of(arguments),
        dtype=dense_dtype(arguments.get("dtype")),
        dense_o_proj=dense_o_proj,
        requantize=asked_requantization(requantize, calibration),
        kv_cache=kv_cache_of(arguments),
        strict=strict,
    )
    prepared = dict(arguments)
    sidecars = []
    if model is not None:
        sidecars.append(_sidecar(model, options))
        prepared["model"] = str(sidecars[-1].directory)
    if draft is not None:
        sidecars.append(_sidecar(draft, options))
        prepared["speculative_config"] = _with_field(
            arguments["speculative_config"], draft_field, str(sidecars[-1].directory)
        )
    if prepared.get("checkpoint_loader") is None:
        # Pass only the sidecars of this LLM, because a node makes every sidecar that it lacks and may have to download
        # its checkpoint.
        records = {str(sidecar.directory): sidecar.record() for sidecar in sidecars}
        prepared["checkpoint_loader"] = loaders[0](sidecars=records)
    return prepared | _dynamic_outputs([sidecar.plan for sidecar in sidecars], arguments, features)


def parallel_of(arguments: Mapping[str, Any]) -> Parallel:
    """Return the parallel sizes that `LLM` will run with.

    If one of `moe_expert_parallel_size` and `moe_tensor_parallel_size` is missing, it follows from the other.
    Raises `UsageError` for sizes that don't fit together.
    """
    tensor, pipeline = (_whole(arguments, f"{name}_parallel_size") or 1 for name in ("tensor", "pipeline"))
    expert = _size(arguments, "moe_expert_parallel_size")
    expert_tensor = _size(arguments, "moe_tensor_parallel_size")
    if expert is None:
        expert = tensor // expert_tensor if expert_tensor else 1
    if expert_tensor is not None and expert * expert_tensor != tensor:
        raise UsageError(
            Fault(
                where="moe_expert_parallel_size, moe_tensor_parallel_size",
                expected=f"sizes whose product is tensor_parallel_size ({tensor})",
                found=f"{expert} and {expert_tensor}",
                remedy="Leave one of them out; it follows from the other.",
            )
        )
    attention_dp = bool(arguments.get("enable_attention_dp"))
    return Parallel(tensor=tensor, pipeline=pipeline, expert=expert, attention_dp=attention_dp)


def _size(arguments: Mapping[str, Any], name: str) -> int | None:
    """Return a size as an integer; None if it is unset. The engine treats None and -1 as unset."""
    size = _whole(arguments, name)
    return size if size is not None and size > 0 else None


def _whole(arguments: Mapping[str, Any], name: str) -> int | None:
    """Return a size as an integer, which the engine also takes as text; None if it is left out.

    Raises `UsageError` for anything else.
    """
    value = arguments.get(name)
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError):
        remedy = "Give the size as a number, or leave it out."
        fault = Fault(where=name, expected="a number of ranks", found=repr(value), remedy=remedy)
        raise UsageError(fault) from None


def refuse_sizes(directory: Path, arguments: Mapping[str, Any], features: EngineFeatures) -> None:
    """Raise `UsageError` if a directory that this package converted can't be served here.

    It must hold the parallel sizes in `arguments`, and its modes must run on this machine's GPU.
    Logs a warning if it was converted for a newer release, and if attention would quantize its output at a fixed scale.
    """
    converted = ConvertedDirectory.open(directory)
    if converted is None:
        return
    require_sizes(directory, parallel_of(arguments), features.platform)
    forced = bool(arguments.get(_FORCE_DYNAMIC)) and features.force_dynamic_quantization
    scale = None if forced else converted_scale_fault(converted, features.engine, kv_cache_of(arguments))
    for fault in (converted.older_release(features.engine), scale):
        if fault is not None:
            logger.warning("%s", fault)


def _source(
    model: Any, revision: str | None, features: EngineFeatures, check: Callable[[Path], None]
) -> _Source | None:
    """Return the checkpoint that `model` names if it is compressed-tensors or a sidecar.

    Returns None for anything else, which is left to the engine after `check` was called with its directory. The weights
    of a repository are downloaded only if its configuration is compressed-tensors and the engine has its model class;
    otherwise `PlanError` is raised.
    """
    if not isinstance(model, (str, Path)):
        return None
    repository = repository_named(model, revision)
    try:
        directory = repository.configuration() if repository else Path(model)
        detection = None if is_sidecar(directory) else FormatDetector().detect(directory)
    except CheckpointError as error:
        logger.debug("%s is left to TensorRT-LLM: %s", model, error)
        return None
    if detection is not None and detection.method != COMPRESSED_TENSORS:
        check(directory)
        return None
    if detection is not None:
        require_class(detection, features)
    if repository is None:
        return _Source(directory=directory, detection=detection)
    directory = repository.checkpoint()
    return _Source(directory=directory, repository=repository.pinned(directory))


def _sidecar(source: _Source, options: PlanOptions) -> Sidecar:
    """Return the sidecar of a checkpoint, and make it if needed.

    If the source is a sidecar itself, it is returned, or made again for the parallel sizes and the KV cache in
    `options`.
    """
    if not is_sidecar(source.directory):
        made = make_sidecar(source.directory, options, repository=source.repository, detection=source.detection)
        return Sidecar.open(made)
    prepared = Sidecar.open(source.directory)
    kv_cache = options.kv_cache or prepared.options.kv_cache
    wanted = replace(prepared.options, parallel=options.parallel, kv_cache=kv_cache)
    if wanted == prepared.options:
        return prepared
    return Sidecar.open(make_sidecar(prepared.source, wanted, repository=prepared.repository))


def _draft_model(config: Any) -> tuple[str, Any]:
    """Return the name and the value of the field that holds the draft model; the value is None without a draft."""
    for name in _DRAFT_FIELDS:
        value = _field(config, name)
        if value is not None:
            return name, value
    return _DRAFT_FIELDS[0], None


def _field(config: Any, name: str) -> Any:
    """Return a field of a configuration, a mapping or an object; None if it is unset."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _with_field(config: Any, name: str, value: str) -> Any:
    """Return a copy of a configuration, a mapping or an object, with another value in one field."""
    if isinstance(config, Mapping):
        return {**config, name: value}
    changed = copy.copy(config)
    setattr(changed, name, value)
    return changed


def _refuse_conflicts(arguments: Mapping[str, Any], loaders: tuple[type, ...]) -> None:
    """Raise `UsageError` for arguments with which the engine ignores this package's loader, mostly silently."""
    faults = FaultCollector()
    backend, loader = arguments.get("backend"), arguments.get("checkpoint_loader")
    if backend in _OTHER_BACKENDS:
        faults.add(
            where=f"backend={backend!r}",
            expected="the PyTorch backend, the only one that asks a checkpoint loader",
            found=f"backend={backend!r} with a compressed-tensors model",
            remedy="Leave backend out; or run `trtllm-ct convert DIR OUT --to dense` and serve OUT with it.",
        )
    if arguments.get("checkpoint_format") is not None:
        faults.add(
            where=f"checkpoint_format={arguments['checkpoint_format']!r}",
            expected="no checkpoint_format beside this package's loader",
            found="one, with which TensorRT-LLM drops the loader",
            remedy="Leave checkpoint_format out: a compressed-tensors model is recognized by its files.",
        )
    if loader is not None and not any(isinstance(part, loaders) for part in (loader, _weight_loader(loader))):
        faults.add(
            where="checkpoint_loader",
            expected="this package's loader, or none",
            found=f"{type(loader).__module__}.{type(loader).__qualname__}",
            remedy="Leave checkpoint_loader out; no other loader reads compressed-tensors weights.",
        )
    faults.raise_if_any(UsageError)


def _weight_loader(loader: Any) -> Any:
    return getattr(loader, "weight_loader", None)


def _dynamic_outputs(plans: Sequence[Plan], arguments: Mapping[str, Any], features: EngineFeatures) -> dict[str, Any]:
    """Return `force_dynamic_quantization=True` if attention would quantize its output at a fixed scale.

    An argument that the user has set is kept. Where it is set to False, or doesn't help, logs a warning and returns
    nothing to add; see `fixed_scale_fault`.
    """
    kv_cache = kv_cache_of(arguments)
    if not any(unscaled_outputs_of(plan, kv_cache) for plan in plans):
        return {}
    wish = arguments.get(_FORCE_DYNAMIC)
    if wish and features.force_dynamic_quantization:
        return {}
    fault = fixed_scale_fault(plans, features, kv_cache, refused=wish is not None and not wish)
    if fault is not None:
        logger.warning("%s", fault)
        return {}
    logger.info("%s=True, so that attention leaves its output to o_proj", _FORCE_DYNAMIC)
    return {_FORCE_DYNAMIC: True}


def converted_scale_fault(converted: ConvertedDirectory, engine: str, kv_cache: str | None = None) -> Fault | None:
    """Return a fault if attention quantizes its output at a fixed scale in a converted directory; else None.

    `engine` is the name of the release that serves it. `kv_cache` is the mode of the KV cache that a user sets.
    """
    outputs = converted.unscaled_outputs(engine, kv_cache)
    if not outputs:
        return None
    return Fault(
        where=f"{converted.directory}: {len(outputs)} o_proj behind a quantized KV cache",
        expected="inputs quantized with scales of their own values",
        found="attention that quantizes them at a fixed scale of 1",
        remedy=f"Convert the source again with --dense-o-proj; {_FORCE_DYNAMIC}=True helps where attention honours it.",
    )


def kv_cache_of(arguments: Mapping[str, Any]) -> str | None:
    """Return the mode of the KV cache that a user sets in `kv_cache_config`; None if the checkpoint decides.

    Source: TensorRT-LLM `_torch/pyexecutor/model_loader.py` (`validate_and_set_kv_cache_quant`).
    """
    return kv_cache_named(_field(arguments.get("kv_cache_config"), "dtype"), "kv_cache_config.dtype")


def kv_cache_named(dtype: object, argument: str) -> str | None:
    """Return the engine's mode of a KV cache of this dtype, such as `FP8`; None for `auto`.

    Raises `UsageError` for a dtype that no engine takes, naming `argument`.
    """
    if dtype is None or dtype == "auto":
        return None
    mode = str(dtype).upper()
    if mode not in KV_CACHE_WORDS:
        words = " or ".join(("auto", *(word.lower() for word in KV_CACHE_WORDS)))
        remedy = "Leave it out for what the checkpoint asks for."
        raise UsageError(Fault(where=argument, expected=words, found=repr(dtype), remedy=remedy))
    return mode


def fixed_scale_fault(
    plans: Sequence[Plan], features: EngineFeatures, kv_cache: str | None = None, *, refused: bool = False
) -> Fault | None:
    """Return a fault if the engine will quantize the output of attention with a fixed scale of 1; else None.

    `kv_cache` is the mode of the KV cache that a user sets; see `unscaled_outputs`, also for the source.
    `force_dynamic_quantization` prevents it where attention honours that. The argument would also change modules with
    static activation scales, so it can't be used when a plan has such modules. `refused` says that the user has set it
    to False.
    """
    outputs = sum(len(unscaled_outputs_of(plan, kv_cache)) for plan in plans)
    static = sum(has_static_activations(module) for plan in plans for module in plan.modules)
    helps = features.force_dynamic_quantization and not static
    if not outputs or (helps and not refused):
        return None
    reason = f"no {_FORCE_DYNAMIC} that attention honours in this TensorRT-LLM"
    if helps:
        reason = f"{_FORCE_DYNAMIC}=False forbids the engine to leave them to o_proj"
    elif features.force_dynamic_quantization:
        reason = f"{_FORCE_DYNAMIC} would change {static} modules with static activation scales"
    return Fault(
        where=f"{outputs} o_proj behind a quantized KV cache",
        expected="inputs quantized with scales of their own values",
        found=f"attention that quantizes them at a fixed scale of 1, and {reason}",
        remedy=(f"Leave {_FORCE_DYNAMIC} out, or pass" if helps else "Pass")
        + " dense_o_proj=True to have these modules dequantized, or serve with a 16-bit KV cache.",
    )

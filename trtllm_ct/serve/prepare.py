"""`prepare`: makes the directory to pass to TensorRT-LLM's `LLM` in place of a compressed-tensors directory."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.arguments import FLAG, check_arguments, path_of, whole_number
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS
from trtllm_ct.convert.sizes import ConvertedDirectory, require_sizes
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.calibration import asked_requantization
from trtllm_ct.plan.attention_output import unscaled_outputs_of
from trtllm_ct.plan.options import dense_dtype
from trtllm_ct.serve.features import DEFAULT_FEATURES, EngineFeatures, require_class
from trtllm_ct.serve.llm import engine_installed, require_engine
from trtllm_ct.serve.llm_arguments import fixed_scale_fault, kv_cache_named
from trtllm_ct.serve.sidecar import make_sidecar_and_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from trtllm_ct.plan.options import PlanOptions
    from trtllm_ct.plan.plan import Plan

__all__ = ["installed_features", "prepare"]


logger = logging.getLogger("trtllm_ct")

_SIZE = whole_number("a number of ranks", "Give the size that LLM will get.")
_CHECKS = {
    "tensor_parallel_size": _SIZE,
    "pipeline_parallel_size": _SIZE,
    "moe_expert_parallel_size": _SIZE.or_none(),
    "enable_attention_dp": FLAG,
}


@missing_packages_as_errors()
def prepare(
    model_dir: str | Path,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    moe_expert_parallel_size: int | None = None,
    enable_attention_dp: bool = False,
    dtype: str | None = None,
    dense_o_proj: bool = False,
    requantize: str | Mapping[str, str] | None = None,
    calibration: str | Path | None = None,
    kv_cache_dtype: str = "auto",
    strict: bool = False,
) -> Path:
    """Return the directory to pass to `LLM` as `model`, together with `CompressedTensorsCheckpointLoader()`.

    For a compressed-tensors checkpoint this is a sidecar in the cache, planned for the installed TensorRT-LLM and for
    the given parallel sizes; pass `LLM` the same sizes. Any other directory is returned unchanged. Reads headers only.
    `dtype` is the dtype of dequantized modules; None or "auto" means the dtype of the model. `dense_o_proj`, `strict`
    and `requantize`, such as `experts=fp8-block`, are passed to `make_plan`, and so are the scales of inputs in the
    file `calibration`, which some forms need. `kv_cache_dtype` is the dtype in the `kv_cache_config` that `LLM` will
    get.
    Logs a warning for modules that are dequantized, and for outputs of attention that are quantized at a fixed scale.

    Raises `DetectionError` when `model_dir` is not a checkpoint directory, `CheckpointError` with all faults of a
    checkpoint that can't be served, `SidecarError` when the cache can't be written, and `UsageError` for invalid
    arguments, and for sizes that a converted directory doesn't hold.
    """
    path = path_of("model_dir", model_dir)
    kv_cache = kv_cache_named(kv_cache_dtype, "kv_cache_dtype")
    sizes = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "moe_expert_parallel_size": moe_expert_parallel_size,
        "enable_attention_dp": enable_attention_dp,
    }
    check_arguments(_CHECKS, sizes)
    detection = FormatDetector().detect(path)
    parallel = Parallel(
        tensor=tensor_parallel_size,
        pipeline=pipeline_parallel_size,
        expert=moe_expert_parallel_size or 1,
        attention_dp=enable_attention_dp,
    )
    if detection.method != COMPRESSED_TENSORS:
        if ConvertedDirectory.open(model_dir) is not None:
            require_sizes(model_dir, parallel, installed_features().platform)
        return path
    features = installed_features()
    require_class(detection, features)
    options = replace(
        features.plan_options,
        parallel=parallel,
        dtype=dense_dtype(dtype),
        dense_o_proj=dense_o_proj,
        requantize=asked_requantization(requantize, calibration),
        kv_cache=kv_cache,
        strict=strict,
    )
    directory, plan = make_sidecar_and_plan(model_dir, options, detection=detection)
    for warning in _warnings(plan, options, features):
        logger.warning("%s: %s", model_dir, warning)
    return directory


def installed_features() -> EngineFeatures:
    """Return the features of the installed TensorRT-LLM, or `DEFAULT_FEATURES` if it is not installed.

    Imports TensorRT-LLM. Raises `MissingDependencyError` when it is installed but can't be imported.
    """
    if not engine_installed():
        return DEFAULT_FEATURES
    require_engine()
    from trtllm_ct.serve.bindings import engine_features

    return engine_features()


def _warnings(plan: Plan, options: PlanOptions, features: EngineFeatures) -> Iterator[str]:
    """Yield warnings about dequantized modules, and about outputs that attention quantizes at a fixed scale."""
    reasons = Counter(module.reason for module in plan.modules if module.dequantized)
    for reason, count in reasons.items():
        yield f"{count} modules are dequantized: {reason}"
    outputs = unscaled_outputs_of(plan, options.kv_cache)
    if outputs:
        fault = fixed_scale_fault([plan], features, options.kv_cache)
        yield str(fault) if fault else f"{len(outputs)} o_proj: pass force_dynamic_quantization=True to LLM"

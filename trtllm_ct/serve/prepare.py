"""`prepare`: makes the directory to pass to TensorRT-LLM's `LLM` in place of a compressed-tensors directory."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DENSE_DTYPES, DType
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS
from trtllm_ct.engine.modes import LINEAR_MODES
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.serve.features import DEFAULT_FEATURES, EngineFeatures, require_class
from trtllm_ct.serve.llm import engine_installed, require_engine
from trtllm_ct.serve.sidecar import ServingOptions, Sidecar, make_sidecar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["installed_features", "prepare"]


logger = logging.getLogger("trtllm_ct")


def prepare(
    model_dir: str | Path,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    moe_expert_parallel_size: int | None = None,
    enable_attention_dp: bool = False,
    dtype: str | None = None,
    dense_o_proj: bool = False,
    strict: bool = False,
) -> Path:
    """Return the directory to pass to `LLM` as `model`, together with `CompressedTensorsCheckpointLoader()`.

    For a compressed-tensors checkpoint this is a sidecar in the cache, planned for the installed TensorRT-LLM and for
    the given parallel sizes; pass `LLM` the same sizes. Any other directory is returned unchanged. Reads headers only.
    `dtype` is the dtype of dequantized modules; None or "auto" means the dtype of the model. `dense_o_proj` and
    `strict` are passed to `make_plan`. Logs a warning for modules that are dequantized.

    Raises `DetectionError` when `model_dir` is not a checkpoint directory, `CheckpointError` with all faults of a
    checkpoint that can't be served, `SidecarError` when the cache can't be written, and `UsageError` for invalid
    arguments.
    """
    detection = FormatDetector().detect(model_dir)
    if detection.method != COMPRESSED_TENSORS:
        return Path(model_dir)
    features = installed_features()
    require_class(detection, features)
    options = ServingOptions(
        engine=features.engine,
        additive_zeros=features.additive_zeros,
        parallel=Parallel(
            tensor=tensor_parallel_size,
            pipeline=pipeline_parallel_size,
            expert=moe_expert_parallel_size or 1,
            attention_dp=enable_attention_dp,
        ),
        dtype=_dtype(dtype),
        dense_o_proj=dense_o_proj,
        strict=strict,
    )
    sidecar = Sidecar.open(make_sidecar(model_dir, options, detection=detection))
    for warning in _warnings(sidecar):
        logger.warning("%s: %s", model_dir, warning)
    return sidecar.directory


def installed_features() -> EngineFeatures:
    """Return the features of the installed TensorRT-LLM, or `DEFAULT_FEATURES` if it is not installed.

    Imports TensorRT-LLM. Raises `MissingDependencyError` when it is installed but can't be imported.
    """
    if not engine_installed():
        return DEFAULT_FEATURES
    require_engine()
    from trtllm_ct.serve.bindings import engine_features

    return engine_features()


def _warnings(sidecar: Sidecar) -> Iterator[str]:
    """Yield warnings about dequantized modules and about `o_proj` in row-wise FP8."""
    reasons = Counter(reason for mode, reason in sidecar.modes.values() if mode == "dequantized")
    for reason, count in reasons.items():
        yield f"{count} modules are dequantized: {reason}"
    unscaled = {str(mode.algo) for mode in LINEAR_MODES if mode.unscaled_attention_output}
    if any(module.endswith(".self_attn.o_proj") and mode in unscaled for module, (mode, _) in sidecar.modes.items()):
        yield (
            "o_proj is row-wise FP8, for which TensorRT-LLM's attention quantizes its output at a fixed scale of 1; "
            "pass force_dynamic_quantization=True to LLM if it has that argument, or dense_o_proj=True to prepare"
        )


def _dtype(name: str | None) -> DType | None:
    if name is None or name == "auto":
        return None
    if name not in DENSE_DTYPES:
        raise UsageError(
            Fault(where="dtype", expected=" or ".join(DENSE_DTYPES), found=repr(name), remedy="Choose one of these.")
        )
    return DType.from_torch(name)

"""`prepare`: what to give TensorRT-LLM's `LLM` as its model in place of a compressed-tensors directory."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.serve.features import DEFAULT_FEATURES, EngineFeatures
from trtllm_ct.serve.llm import engine_installed, require_engine
from trtllm_ct.serve.sidecar import ServingOptions, Sidecar, make_sidecar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["installed_features", "prepare"]

_DTYPES = ("auto", "bfloat16", "float16", "float32")

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
    """The directory to pass to `LLM` as model, together with `CompressedTensorsCheckpointLoader()`; headers only.

    For a compressed-tensors checkpoint it is a sidecar in the cache, planned for the sizes, which are those that `LLM`
    is given, and for the installed TensorRT-LLM. Any other directory is given back as it is. `dtype` is that of
    dequantized modules, the model's own when None or "auto"; `dense_o_proj` and `strict` are those of `make_plan`.
    Raises `DetectionError` when this is no checkpoint directory, `CheckpointError` with all faults of one that can't be
    served, `SidecarError` when the cache can't be written, and `UsageError` for arguments that mean nothing.
    """
    if FormatDetector().detect(model_dir).method != COMPRESSED_TENSORS:
        return Path(model_dir)
    features = installed_features()
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
    sidecar = Sidecar.open(make_sidecar(model_dir, options))
    for remark in _remarks(sidecar):
        logger.warning("%s: %s", model_dir, remark)
    return sidecar.directory


def installed_features() -> EngineFeatures:
    """The features of the installed TensorRT-LLM, or `DEFAULT_FEATURES` without one.

    Imports it; raises `MissingDependencyError` when it is installed and can't be imported.
    """
    if not engine_installed():
        return DEFAULT_FEATURES
    require_engine()
    from trtllm_ct.serve.bindings import engine_features

    return engine_features()


def _remarks(sidecar: Sidecar) -> Iterator[str]:
    """What a user should know before the model answers."""
    reasons = Counter(reason for mode, reason in sidecar.modes.values() if mode == "dequantized")
    for reason, count in reasons.items():
        yield f"{count} modules are dequantized: {reason}"
    row_wise = str(QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN)
    if any(module.endswith(".self_attn.o_proj") and mode == row_wise for module, (mode, _) in sidecar.modes.items()):
        yield (
            "o_proj is row-wise FP8, for which TensorRT-LLM's attention quantizes its output at a fixed scale of 1; "
            "pass force_dynamic_quantization=True to LLM where it knows that, or dense_o_proj=True to prepare"
        )


def _dtype(name: str | None) -> DType | None:
    if name is None or name == "auto":
        return None
    if name not in _DTYPES:
        raise UsageError(
            Fault(where="dtype", expected=" or ".join(_DTYPES), found=repr(name), remedy="Choose one of these.")
        )
    return DType.from_torch(name)

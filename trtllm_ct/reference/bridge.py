"""The bridge from the pipeline to the reference engine: streams the delivered tensors of a source directory.

This is the only file that imports both sides. The reference engine itself never sees a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.config.hf_config import with_tie
from trtllm_ct.layouts.torch_tensors import tensors_of
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.pipeline.stream import stream_delivered

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from trtllm_ct.config.detect import Detection
    from trtllm_ct.engine.quant_config import QuantConfig

__all__ = ["Delivered", "deliver"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """What the reference engine needs to run a converted checkpoint.

    `config` is the parsed config.json, `quant_config` holds the mode of every quantized module, and `tensors` yields
    the delivered tensors with their full names. The iterator can be read once.
    """

    config: Mapping[str, Any]
    quant_config: QuantConfig
    tensors: Iterator[tuple[str, Tensor]]


def deliver(directory: str | Path, *, dtype: torch.dtype, detection: Detection | None = None) -> Delivered:
    """Plan a compressed-tensors directory for the `reference` target and stream its delivered tensors.

    Modules get a native layout where one exists; all others are dequantized to `dtype`. `detection` is the detection of
    the directory, if it was made before.
    """
    checkpoint = open_checkpoint(directory, detection)
    plan = checkpoint.plan("reference", dtype=DType.from_torch(dtype))
    streamed = stream_delivered(plan, checkpoint.catalog)
    return Delivered(
        config=with_tie(checkpoint.hf_config, tied=plan.tied),
        quant_config=plan.quant_config,
        tensors=(item for _module, arrays in streamed for item in tensors_of(arrays).items()),
    )

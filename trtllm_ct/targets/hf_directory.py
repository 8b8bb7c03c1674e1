"""Deliver a plan as a Hugging Face directory, for stock TensorRT-LLM (`modelopt`) or any reader (`dense`).

The two differ in what their plans deliver and in one file: `hf_quant_config.json`, from which TensorRT-LLM takes
the modes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct import __version__
from trtllm_ct.checkpoint.side_files import carry_side_files
from trtllm_ct.checkpoint.writer import ShardedWriter
from trtllm_ct.pipeline import Checkpoint, stream_delivered
from trtllm_ct.targets.hf_config import portable_config

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.formats.codecs import Codec
    from trtllm_ct.plan.model import Plan
    from trtllm_ct.quant_config import QuantConfig

__all__ = ["MODELOPT_LAYOUT", "DeliveredFiles", "write_hf_directory"]

MODELOPT_LAYOUT = "0.47.0"
"""The ModelOpt release whose directory layout is written; readers look at the producer's name only."""

Progress = Callable[[int], None]
"""Called with the number of payload bytes just written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveredFiles:
    """What was written: weight files, and side files that were carried along."""

    weights: tuple[str, ...]
    carried: tuple[str, ...]


def write_hf_directory(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    max_shard_bytes: int,
    progress: Progress,
    codec: Codec | None = None,
    device: str = "cpu",
) -> DeliveredFiles:
    """Write the plan's tensors and everything else of a model directory into `out`, an existing empty directory.

    Memory: one module at a time. Raises `PayloadError` for values that can't be delivered.
    """
    carried = carry_side_files(checkpoint.directory, out)
    _write_json(out / "config.json", portable_config(checkpoint.hf_config, plan.dtype))
    if plan.quant_config.quant_algo is not None:
        _write_json(out / "hf_quant_config.json", hf_quant_config(plan.quant_config))
    if plan.quant_config.quantized_layers:
        _write_json(out / "quant_cfg.json", layer_modes(plan.quant_config))
    with ShardedWriter(out, plan.delivered_specs, max_shard_bytes=max_shard_bytes) as writer:
        for _module, tensors in stream_delivered(plan, checkpoint.catalog, codec=codec, device=device):
            for name, tensor in tensors.items():
                writer.write(name, tensor.cpu())
                progress(tensor.nbytes)
        files = writer.finish()
    return DeliveredFiles(weights=files, carried=carried)


def hf_quant_config(quant_config: QuantConfig) -> dict[str, Any]:
    """The document that TensorRT-LLM reads before config.json; `producer.name` is what makes it a ModelOpt one."""
    return {
        "producer": {"name": "modelopt", "version": MODELOPT_LAYOUT},
        "converter": {"name": "trtllm-ct", "version": __version__},
        "quantization": quant_config.to_dict(),
    }


def layer_modes(quant_config: QuantConfig) -> dict[str, Any]:
    """What releases before 1.2 read instead of `quantized_layers` in hf_quant_config.json; newer ones lay it over that.

    Source: TensorRT-LLM `_torch/model_config.py`, MIXED_PRECISION.
    """
    entry = quant_config.to_dict()
    return {key: entry[key] for key in ("kv_cache_quant_algo", "quantized_layers")}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

"""Deliver a plan as a Hugging Face directory, for stock TensorRT-LLM (`modelopt`) or any reader (`dense`).

The two differ in what their plans deliver and in one file: `hf_quant_config.json`, from which TensorRT-LLM takes
the modes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.output import clear
from trtllm_ct.checkpoint.side_files import carry_side_files
from trtllm_ct.checkpoint.writer import create_files, write_index
from trtllm_ct.config.hf_config import portable_config
from trtllm_ct.convert.coordinate import run_units
from trtllm_ct.convert.journal import JOURNAL, Journal

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.convert.executors import Pool
    from trtllm_ct.convert.job import Conversion
    from trtllm_ct.engine.quant_config import QuantConfig
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import Plan

__all__ = ["MODELOPT_LAYOUT", "DeliveredFiles", "write_configuration", "write_hf_directory"]

MODELOPT_LAYOUT = "0.47.0"
"""The ModelOpt release whose directory layout is written; readers look at the producer's name only."""

Progress = Callable[[int], None]
"""Called with the number of payload bytes that are done, as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveredFiles:
    """What was written: weight files, and side files that were carried along.

    `resumed_bytes` of the weights had been written by an earlier run.
    """

    weights: tuple[str, ...]
    carried: tuple[str, ...]
    resumed_bytes: int


def write_hf_directory(conversion: Conversion, pool: Pool, *, progress: Progress) -> DeliveredFiles:
    """Write the tensors of a conversion and everything else of a model directory into the place that its job names.

    What an earlier run of the same conversion left there is checked and kept, anything else there is deleted. Memory:
    that of `run_unit` for each worker. Raises `PayloadError` with all values that can't be delivered, and `UsageError`
    when the disk is too small.
    """
    out, write_plan = conversion.job.files, conversion.write_plan
    with Journal(out / JOURNAL, conversion.digest) as journal:
        clear(out, keep={JOURNAL, *(write_plan.file_names if journal.records else ())})
        carried = carry_side_files(conversion.checkpoint.directory, out)
        write_configuration(conversion.checkpoint, conversion.plan, out)
        create_files(out, write_plan)
        resumed = run_units(conversion, pool, journal, progress)
        write_index(out, write_plan)
    (out / JOURNAL).unlink()
    return DeliveredFiles(weights=write_plan.file_names, carried=carried, resumed_bytes=resumed)


def write_configuration(checkpoint: Checkpoint, plan: Plan, out: Path) -> None:
    """Write what TensorRT-LLM is told of a model: config.json, and the modes where there are any."""
    _write_json(out / "config.json", portable_config(checkpoint.hf_config, plan.dtype))
    if plan.quant_config.quant_algo is not None:
        _write_json(out / "hf_quant_config.json", hf_quant_config(plan.quant_config))
    if plan.quant_config.quantized_layers:
        _write_json(out / "quant_cfg.json", layer_modes(plan.quant_config))


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

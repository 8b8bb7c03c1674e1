"""Write the delivered tensors of a plan as a directory.

It is a Hugging Face directory for stock TensorRT-LLM (target `modelopt`) or for any reader (target `dense`), or an
engine-build checkpoint (target `engine`). The targets differ in what their plans deliver, and in the files from which
TensorRT-LLM reads the modes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError
from trtllm_ct.base.source_errors import source_errors
from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.output_errors import output_errors
from trtllm_ct.checkpoint.side_files import NO_SIDE_FILES, SideFiles, copy_side_files, side_bytes, side_files
from trtllm_ct.checkpoint.staged import Staged
from trtllm_ct.checkpoint.writer import create_files, require_room, write_index
from trtllm_ct.config.hf_config import portable_config, with_tie
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.config.tokenizer_config import TOKENIZER_CONFIG, class_of_transformers_5, portable_tokenizer_config
from trtllm_ct.convert.coordinate import run_units
from trtllm_ct.convert.journal import Journal
from trtllm_ct.convert.sizes import CONVERTER, QUANT_CONFIG, planned_for
from trtllm_ct.convert.staging import fetch_side_files, side_file_names, with_left_behind

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.convert.executors import Pool
    from trtllm_ct.convert.job import Conversion
    from trtllm_ct.engine.quant_config import QuantConfig
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import Plan

__all__ = [
    "MODELOPT_LAYOUT",
    "DeliveredFiles",
    "rewritten_side_files",
    "write_configuration",
    "write_hf_directory",
]

logger = logging.getLogger("trtllm_ct")

MODELOPT_LAYOUT = "0.47.0"
"""The ModelOpt release whose directory layout is written; readers check only the name of the producer."""

Progress = Callable[[int], None]
"""Called with the number of payload bytes of each unit that is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveredFiles:
    """The names of the files that were written: weight files (with the index); and the side files of the source.

    `resumed_bytes` is the part of the weights that an earlier run had already written.
    """

    weights: tuple[str, ...]
    side_files: SideFiles
    resumed_bytes: int


def write_hf_directory(
    conversion: Conversion, pool: Pool, *, progress: Progress, carry: Collection[str] = ()
) -> DeliveredFiles:
    """Write all files of the output, weights and side files, into the working directory `conversion.job.files`.

    `carry` are patterns of further side files to copy.
    Files that an earlier run of the same conversion left there are checked and kept, and the others of earlier runs are
    deleted. The journal stays there until the directory is complete.
    Memory: see `run_unit`, once for each worker. Raises `PayloadError` with all values that can't be delivered,
    `UsageError` when the disk is too small or a file there is of no conversion, `CatalogError` when a side file can't
    be read, and `OutputError` when the disk fails.
    """
    out, write_plan = conversion.job.files, conversion.write_plan
    # An engine-build checkpoint consists of its configuration and the files of the ranks.
    by_rank = conversion.plan.build_config is not None
    source = conversion.checkpoint.directory
    fetched, downloads = _fetched(conversion, None if by_rank else carry)
    kept = (*write_plan.file_names, *fetched, *downloads)
    with source_errors(source):
        side = NO_SIDE_FILES if by_rank else side_files(source, carry)
        others = side_bytes(source, side) + conversion.shards.room
    configuration = configuration_files(conversion.checkpoint, conversion.plan)
    with output_errors(out.path):
        require_room(out, write_plan, others)
    with (
        output_errors(out.path, write_plan.file_bytes),
        _journal(conversion, (*kept, *side.carried, *configuration), kept) as journal,
    ):
        copy_side_files(source, side, out)
        out.remove_files(fetched)
        for name, content in configuration.items():
            out.write(name, content)
        create_files(out, write_plan)
        resumed = run_units(conversion, pool, journal, progress)
        write_index(out, write_plan)
        out.remove_files(downloads)
    side = with_left_behind(conversion.checkpoint.source, side, carry)
    return DeliveredFiles(weights=write_plan.file_names, side_files=side, resumed_bytes=resumed)


def _fetched(conversion: Conversion, carry: Collection[str] | None) -> tuple[frozenset[str], frozenset[str]]:
    """Fetch the side files of a source far away, with None no side files; of a directory, nothing is fetched.

    Returns the places in the working directory of side files and of weight files that this conversion downloads: the
    journal lists them before the first one is there.
    """
    source, out = conversion.checkpoint.source, conversion.job.files
    if not isinstance(source, Staged):
        return frozenset(), frozenset()
    names = [] if carry is None else side_file_names(source, carry)
    fetched, downloads = (frozenset(map(source.staged_name, files)) for files in (names, conversion.source_files))
    with output_errors(out.path):
        beside = sum(map(source.remote.size, names))
        require_room(out, conversion.write_plan, beside + conversion.shards.room)
        kept = (*conversion.write_plan.file_names, *fetched, *downloads)
        with _journal(conversion, kept, kept):
            fetch_side_files(source, names)
    return fetched, downloads


def _journal(conversion: Conversion, files: Collection[str], kept: Collection[str]) -> Journal:
    """Open the journal; `kept` are those of `files` that an earlier run may have left and this one goes on with."""
    out = conversion.job.files
    far_away = isinstance(conversion.checkpoint.source, Staged)
    journal = Journal(out, conversion.identity, files, kept=kept, at_once=far_away)
    if journal.discarded:
        logger.warning("%s: of another conversion, or of source files that changed; starting anew", out.path)
    return journal


def write_configuration(checkpoint: Checkpoint, plan: Plan, out: Path) -> None:
    """Write the `configuration_files` into a directory; a link of the same name is replaced, never followed."""
    for name, content in configuration_files(checkpoint, plan).items():
        (out / name).unlink(missing_ok=True)
        (out / name).write_bytes(content)


def configuration_files(checkpoint: Checkpoint, plan: Plan) -> dict[str, bytes]:
    """Return config.json and, where the plan has quantized modules, the files from which TensorRT-LLM reads modes.

    tokenizer_config.json is among them where transformers 4 could not read that of the checkpoint.
    The config.json of an engine-build checkpoint is a part of its plan.
    """
    if plan.build_config is not None:
        files = {"config.json": _json_file(dict(plan.build_config))}
        if plan.build_layers is not None:
            files["quant_cfg.json"] = _json_file(dict(plan.build_layers))
        return files
    files = {"config.json": _json_file(with_tie(portable_config(checkpoint.hf_config, plan.dtype), tied=plan.tied))}
    files |= rewritten_side_files(checkpoint.directory)
    if plan.quant_config.quant_algo is not None:
        files[QUANT_CONFIG] = _json_file(hf_quant_config(plan.quant_config) | planned_for(plan))
    if plan.quant_config.quantized_layers:
        files["quant_cfg.json"] = _json_file(layer_modes(plan.quant_config))
    return files


def rewritten_side_files(source: Path) -> dict[str, bytes]:
    """Return tokenizer_config.json if it is written otherwise than `source` has it; a damaged one is only copied."""
    try:
        stored = read_json_object(source / TOKENIZER_CONFIG)
    except ConfigError:
        return {}
    unknown = class_of_transformers_5(stored)
    if unknown is not None:
        logger.warning(
            "%s: %s is a tokenizer class of transformers 5 only; releases of TensorRT-LLM that use transformers 4 "
            "can't load it: pass them the tokenizer of the original model",
            TOKENIZER_CONFIG,
            unknown,
        )
    portable = portable_tokenizer_config(stored)
    return {} if portable == stored else {TOKENIZER_CONFIG: _json_file(portable)}


def hf_quant_config(quant_config: QuantConfig) -> dict[str, Any]:
    """Return the content of hf_quant_config.json, which TensorRT-LLM reads before config.json.

    `producer.name` marks it as the configuration of a ModelOpt checkpoint.
    """
    return {
        "producer": {"name": "modelopt", "version": MODELOPT_LAYOUT},
        "converter": {"name": CONVERTER, "version": __version__},
        "quantization": quant_config.to_dict(),
    }


def layer_modes(quant_config: QuantConfig) -> dict[str, Any]:
    """Return the content of quant_cfg.json, the modes of the quantized layers.

    TensorRT-LLM releases before 1.2 read it instead of `quantized_layers` in hf_quant_config.json; newer releases
    overlay it on `quantized_layers`.
    Source: TensorRT-LLM `_torch/model_config.py`, MIXED_PRECISION.
    """
    entry = quant_config.to_dict()
    return {key: entry[key] for key in ("kv_cache_quant_algo", "quantized_layers")}


def _json_file(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()

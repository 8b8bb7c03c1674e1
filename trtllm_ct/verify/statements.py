"""Check what the configuration of a converted directory says of its tensors.

Readers follow the configuration: they drop a head that is said to be tied, read scales of the KV cache only if a
quantized cache is stated, and a class looks for its text model under one prefix. A wrong statement loses tensors
whose values are right. The rules are written apart from those of the planner; those of config.json as a whole are in
`config_statements.py`, and those of modes in `mode_statements.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.regular_files import is_present
from trtllm_ct.base.schemes import NumberType
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.verify.config_statements import TIE, check_config
from trtllm_ct.verify.mode_statements import (
    MODES_FILE,
    OLDER_MODES_FILE,
    check_modes,
    check_module_names,
    check_record,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.verify.matching import DirectoryMatch
    from trtllm_ct.verify.source.modules import Module, Modules

__all__ = ["cache_mode", "check_statements"]

_CHUNK_BYTES = 1 << 19
# What the file for older releases has of hf_quant_config.json.
_IN_BOTH = ("kv_cache_quant_algo", "quantized_layers")
_CACHE_MODES: Mapping[tuple[NumberType, int], str] = {(NumberType.FLOAT, 8): "FP8", (NumberType.INT, 8): "INT8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """Where a model class reads the parts of a larger model.

    `bodies` are the prefixes of the text model's body, and `heads` the names of its head. `dropped` are prefixes of
    other parts that the class does not read, each with the one that it reads.
    """

    bodies: tuple[str, ...]
    heads: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...] = ()


# `Gemma3VLM.load_weights` and `Mistral3VLM.load_weights` keep the keys below `language_model.`, `vision_tower.` and
# `multi_modal_projector.`, and drop all others (TensorRT-LLM `_torch/models/modeling_gemma3vl.py` and
# `modeling_mistral.py`).
_INNER = _Reading(
    bodies=("language_model.model.",),
    heads=("language_model.lm_head",),
    dropped=(
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
)
# `modeling_qwen3vl.py`, `checkpoints/hf/qwen2vl_weight_mapper.py` and `exaone4_5_weight_mapper.py` turn
# `model.language_model.` into `model.`, and change no other key of the text model.
_OUTER = _Reading(bodies=("model.language_model.", "model."), heads=("lm_head",))
_READINGS: Mapping[str, _Reading] = {
    "Gemma3ForConditionalGeneration": _INNER,
    "Mistral3ForConditionalGeneration": _INNER,
    "Qwen2VLForConditionalGeneration": _OUTER,
    "Qwen2_5_VLForConditionalGeneration": _OUTER,
    "Qwen3VLForConditionalGeneration": _OUTER,
    "Qwen3VLMoeForConditionalGeneration": _OUTER,
    "Qwen3_5ForConditionalGeneration": _OUTER,
    "Qwen3_5MoeForConditionalGeneration": _OUTER,
    "Exaone4_5_ForConditionalGeneration": _OUTER,
    # `modeling_kimi_k25.py: KimiK25ForConditionalGeneration.load_weights`.
    "KimiK25ForConditionalGeneration": _Reading(
        bodies=("language_model.model.", "model."), heads=("language_model.lm_head", "lm_head")
    ),
}


def cache_mode(config: QuantizationConfig, modes: tuple[str, ...]) -> str | None:
    """Return the mode of the KV cache, among `modes`, that a source's configuration asks for; None for a 16-bit one.

    It asks for one in `kv_cache_scheme`, or in a group that targets nothing but attention.
    """
    args = config.kv_cache_scheme or _attention_inputs(config)
    mode = None if args is None else _CACHE_MODES.get((args.type, args.num_bits))
    return mode if mode in modes else None


def check_statements(
    match: DirectoryMatch,
    converted: Path,
    source_config: Mapping[str, Any],
    config: Mapping[str, Any],
    faults: FaultCollector,
) -> None:
    """Add a fault for each statement of a converted directory that contradicts its tensors or the source.

    `config` is its parsed config.json, and `source_config` that of the source. The names of modules and the KV cache
    matter only to an engine that reads modes.
    """
    check_config(match, source_config, config, converted, faults)
    _check_tie(match, converted, source_config, config, faults)
    _check_body(match, converted, faults)
    if not (converted / MODES_FILE).is_file():
        return
    document = read_json_object(converted / MODES_FILE)
    check_record(document, converted, faults)
    check_modes(document, converted, faults)
    if match.quant_config.quant_algo is not None:
        _check_cache(match, converted, faults)
        _check_prefixes(match, converted, config, faults)
        _check_older_modes(match, converted, faults)
        check_module_names(match, document, config, converted, faults)


def _attention_inputs(config: QuantizationConfig) -> QuantArgs | None:
    """Return the arguments of the inputs of a group without weights that targets attention modules only."""
    for group in config.groups:
        if group.targets and group.scheme.weights is None and all(name.endswith("Attention") for name in group.targets):
            return group.scheme.input_activations
    return None


def _check_tie(
    match: DirectoryMatch,
    converted: Path,
    source_config: Mapping[str, Any],
    config: Mapping[str, Any],
    faults: FaultCollector,
) -> None:
    """Add a fault if config.json ties a head that differs from the table, or unties a head that is not there.

    Readers drop a tied head, and look for the weight of any other. A flag that the source has is left as it is.
    """
    head, table = (match.delivered.by_key.get(key) for key in ("lm_head", "embed_tokens"))
    expected, found = "", ""
    for before, after in zip(_levels(source_config), _levels(config), strict=True):
        flag = after.get(TIE)
        if not isinstance(flag, bool) and flag is not None:
            expected, found = "true or false", repr(flag)
        elif flag is True and head is not None and table is not None and not _same_weight(head, table):
            expected, found = (
                f"false, since {head.name} differs from {table.name}",
                "true, so that readers drop the head",
            )
        elif flag is False and head is None and before.get(TIE) is not False:
            expected, found = "true, since no weight of a head is there", "false, so that readers look for one"
    if expected:
        faults.add(
            where=f"{converted}/config.json: {TIE}",
            expected=expected,
            found=found,
            remedy="Convert again; config.json and weights of this directory don't belong together.",
        )


def _levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return a configuration and that of the text model inside of it, which is empty without one."""
    text = config.get("text_config")
    return config, text if isinstance(text, dict) else {}


def _same_weight(head: Module, table: Module) -> bool:
    """Whether two plain weights have the same bytes; they are compared in chunks of rows."""
    tensors = (head.tensors.get("weight"), table.tensors.get("weight"))
    if any(tensor is None for tensor in tensors):
        return False
    first, second = head.tensors["weight"], table.tensors["weight"]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    rows = max(1, _CHUNK_BYTES // max(1, 4 * prod(first.shape[1:])))
    return all(
        np.array_equal(
            head.plain_rows("weight", begin, min(begin + rows, first.shape[0])).view(np.uint8),
            table.plain_rows("weight", begin, min(begin + rows, first.shape[0])).view(np.uint8),
        )
        for begin in range(0, first.shape[0], rows)
    )


def _check_cache(match: DirectoryMatch, converted: Path, faults: FaultCollector) -> None:
    """Add a fault if the mode of the KV cache is not that of the source's scheme; the PyTorch backend has FP8 only."""
    wanted, stated = cache_mode(match.config, ("FP8",)), match.quant_config.kv_cache_quant_algo
    if stated != wanted:
        faults.add(
            where=f"{converted}/{MODES_FILE}: kv_cache_quant_algo",
            expected=f"{wanted or 'none'}, by the configuration of the source",
            found=stated or "none",
            remedy="Convert again; an engine would have another KV cache than the one that was calibrated.",
        )


def _check_older_modes(match: DirectoryMatch, converted: Path, faults: FaultCollector) -> None:
    """Add a fault if the file for older releases says something else than hf_quant_config.json.

    Skips a directory that already has a fault: a difference may only follow from it.
    """
    path = converted / OLDER_MODES_FILE
    if faults.faults or not is_present(path):
        return
    older, newer = read_json_object(path), match.quant_config.to_dict()
    for key in _IN_BOTH:
        if older.get(key) != newer.get(key):
            faults.add(
                where=f"{path}: {key}",
                expected=f"what {MODES_FILE} says",
                found="something else",
                remedy="Convert again; TensorRT-LLM before 1.2 reads this file, and newer releases read both.",
            )


def _check_body(match: DirectoryMatch, converted: Path, faults: FaultCollector) -> None:
    """Add a fault for each name of a text model whose prefix the source doesn't have.

    A conversion leaves the place of a text model that is no part of a larger one as it is; in Hugging Face's form of
    Mistral's own names it is below `model.`. Readers look for it there alone.
    """
    names = match.source.names
    if names.multimodal:
        return
    read = {"model.", "lm_head"} if names.native else {_place(match.source, key) for key in match.source.by_key}
    unread: dict[str, str] = {}
    for key, module in match.delivered.by_key.items():
        place = _place(match.delivered, key)
        if place not in read and key in match.source.by_key:
            unread.setdefault(str(place), module.name)
    for place, name in unread.items():
        faults.add(
            where=f"{converted}: {name}",
            expected=f"a name with {' or '.join(sorted(filter(None, read)))}, as the source has it",
            found=f"one with {place or 'no prefix'}",
            remedy="Convert again; a reader would not find these weights.",
        )


def _place(modules: Modules, key: str) -> str | None:
    """Return the prefix of a module of the body, or the name of the head; None for any other module."""
    name = modules.by_key[key].name
    return name if key == "lm_head" else modules.names.body(name)


def _check_prefixes(match: DirectoryMatch, converted: Path, config: Mapping[str, Any], faults: FaultCollector) -> None:
    """Add a fault for each part of a larger model whose names the model's class does not read."""
    architectures = config.get("architectures") or [""]
    reading = _READINGS.get(str(architectures[0] if isinstance(architectures, list) else architectures))
    if reading is None or not match.delivered.names.multimodal:
        return
    names = {module.name for module in match.delivered.by_key.values()}
    unread: dict[str, tuple[str, str]] = {}
    for key, module in match.delivered.by_key.items():
        body = match.delivered.names.body(module.name)
        if key == "lm_head" and module.name not in reading.heads:
            unread.setdefault(module.name, (" or ".join(reading.heads), module.name))
        elif body is not None and body not in reading.bodies:
            unread.setdefault(body, (" or ".join(reading.bodies), module.name))
        for dropped, read in reading.dropped:
            if module.name.startswith(dropped) and read + module.name.removeprefix(dropped) not in names:
                unread.setdefault(dropped, (read, module.name))
    for prefix, (expected, name) in unread.items():
        faults.add(
            where=f"{converted}: {name}",
            expected=f"a name with {expected}, as the class of this model reads it",
            found=f"one with {prefix or 'no prefix'}",
            remedy="Convert again; a reader would not find these weights.",
        )

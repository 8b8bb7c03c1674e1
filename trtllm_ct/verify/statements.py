"""Check what the configuration of a converted directory says of its tensors.

Readers follow the configuration: they drop a head that is said to be tied, read scales of the KV cache only if a
quantized cache is stated, and a class looks for its text model under one prefix. A wrong statement loses tensors
whose values are right. The rules are written apart from those of the planner.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.schemes import NumberType
from trtllm_ct.config.json_file import read_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.verify.matching import DirectoryMatch
    from trtllm_ct.verify.source.modules import Module

__all__ = ["cache_mode", "check_statements"]

_CHUNK_BYTES = 1 << 19
_MODES = "hf_quant_config.json"
# The file from which releases before 1.2 read the modes of layers, and what it has of hf_quant_config.json.
_OLDER_MODES = "quant_cfg.json"
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


def check_statements(match: DirectoryMatch, converted: Path, config: Mapping[str, Any], faults: FaultCollector) -> None:
    """Add a fault for each statement of a converted directory that contradicts its tensors or the source.

    `config` is its parsed config.json. The names of modules and the KV cache matter only to an engine that reads modes.
    """
    _check_tie(match, converted, config, faults)
    if (converted / _MODES).is_file() and match.quant_config.quant_algo is not None:
        _check_cache(match, converted, faults)
        _check_prefixes(match, converted, config, faults)
        _check_older_modes(match, converted, faults)


def _attention_inputs(config: QuantizationConfig) -> QuantArgs | None:
    """Return the arguments of the inputs of a group without weights that targets attention modules only."""
    for group in config.groups:
        if group.targets and group.scheme.weights is None and all(name.endswith("Attention") for name in group.targets):
            return group.scheme.input_activations
    return None


def _check_tie(match: DirectoryMatch, converted: Path, config: Mapping[str, Any], faults: FaultCollector) -> None:
    """Add a fault if head and table differ where config.json ties them: readers then drop the head."""
    text = config.get("text_config")
    levels = (config, text if isinstance(text, dict) else {})
    head, table = (match.delivered.by_key.get(key) for key in ("lm_head", "embed_tokens"))
    stated = any(level.get("tie_word_embeddings") is True for level in levels)
    if stated and head is not None and table is not None and not _same_weight(head, table):
        faults.add(
            where=f"{converted}/config.json: tie_word_embeddings",
            expected=f"false, since {head.name} differs from {table.name}",
            found="true, so that readers drop the head",
            remedy="Convert again; config.json and weights of this directory don't belong together.",
        )


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
            where=f"{converted}/{_MODES}: kv_cache_quant_algo",
            expected=f"{wanted or 'none'}, by the configuration of the source",
            found=stated or "none",
            remedy="Convert again; an engine would have another KV cache than the one that was calibrated.",
        )


def _check_older_modes(match: DirectoryMatch, converted: Path, faults: FaultCollector) -> None:
    """Add a fault if the file for older releases says something else than hf_quant_config.json.

    Skips a directory that already has a fault: a difference may only follow from it.
    """
    path = converted / _OLDER_MODES
    if faults.faults or not path.is_file():
        return
    older, newer = read_json_object(path), match.quant_config.to_dict()
    for key in _IN_BOTH:
        if older.get(key) != newer.get(key):
            faults.add(
                where=f"{path}: {key}",
                expected=f"what {_MODES} says",
                found="something else",
                remedy="Convert again; TensorRT-LLM before 1.2 reads this file, and newer releases read both.",
            )


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

"""Detect which quantization format a checkpoint directory holds, and on what evidence. Only JSON is read, no tensors.

A quantization block can be in several places: in config.json, in the params.json of Mistral's own repositories, in
ModelOpt's hf_quant_config.json, and in the side files of early GPTQ and AWQ tools. A block is recognized by its
`quant_method` or producer, never by the presence of `config_groups`, which ModelOpt writes too. compressed-tensors has
priority over ModelOpt, and ModelOpt over all others. Places that disagree are reported, whichever has priority.
A directory that this package prepared for an engine (a sidecar) is not a checkpoint of its own: where the sidecar file
is present, no other file is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.arguments import HF_CONFIG, check_arguments
from trtllm_ct.base.errors import ConfigError, DetectionError, Fault
from trtllm_ct.base.json_form import fields_form, json_object
from trtllm_ct.base.source_errors import source_errors
from trtllm_ct.checkpoint.source import as_source
from trtllm_ct.config.json_file import not_an_object, read_json_of
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS, ENGINE_BUILD, MODELOPT, SIDECAR, UNKNOWN, describe_method

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.checkpoint.source import Source

__all__ = ["SIDECAR_FILE", "Detection", "Evidence", "FormatDetector", "unwrap_block"]

SIDECAR_FILE = "trtllm_ct.json"
"""The file that marks a directory as prepared for an engine, and names the source checkpoint."""

_CONFIG = "config.json"
_PARAMS = "params.json"
_MODELOPT_CONFIG = "hf_quant_config.json"
_GPTQ_CONFIG = "quantize_config.json"
_AWQ_CONFIG = "quant_config.json"
_MAX_NAMES = 8

# Where a block can be: file and keys. Among places that indicate the same method, the first one decides.
_PLACES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_CONFIG, ("quantization_config",)),
    (_CONFIG, ("text_config", "quantization_config")),
    (_CONFIG, ("compression_config",)),
    (_CONFIG, ("text_config", "compression_config")),
    (_CONFIG, ("quantization",)),
    (_PARAMS, ("quantization",)),
    (_PARAMS, ("quantization_config",)),
    (_MODELOPT_CONFIG, ()),
    (_GPTQ_CONFIG, ()),
    (_AWQ_CONFIG, ()),
)
# A block without a method name is recognized in one of four ways: by a key that only one method has in a place,
_METHOD_OF_KEY_AT = {(f"{_CONFIG}: quantization", "quant_algo"): ENGINE_BUILD}
# by a key that only one method has in all others,
_METHOD_OF_KEY = {
    "quant_algo": MODELOPT,
    "qformat_weight": "mistral-fp8",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
}
# by holding nothing but sparsity, as compressed-tensors 0.6 wrote it,
_SPARSITY_ONLY = frozenset({"sparsity_config", "version"})
# or by its place, when only one method uses that place.
_METHOD_OF_PLACE = {
    f"{_CONFIG}: compression_config": COMPRESSED_TENSORS,
    f"{_CONFIG}: text_config.compression_config": COMPRESSED_TENSORS,
    f"{_CONFIG}: quantization": "mlx",
    _MODELOPT_CONFIG: MODELOPT,
    _GPTQ_CONFIG: "gptq",
    _AWQ_CONFIG: "awq",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One observation: file, key and value, and the method that it indicates.

    `read_as` is None where it indicates a checkpoint without quantization.
    """

    file: str
    key: str
    found: str
    read_as: str | None

    def __str__(self) -> str:
        return f"{self.file}: {self.key} is {self.found}"

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form: the four fields by name."""
        return fields_form(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """The detected quantization method of a checkpoint.

    `method` is None for a checkpoint without quantization. `origin` names file and key of the block that decided, and
    `block` is that block as it was read; both are None when there is no block. `disagreements` are messages about other
    blocks that contradict it. `files` are the JSON files that were read, parsed, by name, and
    `source` is where they were read; None for the detection of a dictionary.
    """

    method: str | None
    evidence: tuple[Evidence, ...]
    disagreements: tuple[str, ...] = ()
    origin: str | None = None
    block: Mapping[str, Any] | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    source: Source | None = field(default=None, repr=False)

    @property
    def directory(self) -> str | None:
        """The path or the name of the checkpoint; None for the detection of a dictionary."""
        return None if self.source is None else self.source.place

    @property
    def description(self) -> str:
        """A noun phrase for the checkpoint, such as `an AutoGPTQ checkpoint, not compressed-tensors`."""
        name = describe_method(self.method).name
        return name if self.method == COMPRESSED_TENSORS else f"{name}, not compressed-tensors"

    def require_compressed_tensors(self) -> Mapping[str, Any]:
        """Return the compressed-tensors block.

        Raises `DetectionError` when there is none; the message says what the checkpoint is instead.
        """
        if self.method == COMPRESSED_TENSORS and self.block is not None:
            return self.block
        raise DetectionError(
            Fault(
                where=self.directory or self.origin or _CONFIG,
                expected="a compressed-tensors checkpoint",
                found=f"{self.description} ({self.evidence[0]})",
                remedy=describe_method(self.method).remedy,
            )
        )

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form, without the block."""
        return json_object(
            {
                "method": self.method,
                "description": self.description,
                "origin": self.origin,
                "evidence": self.evidence,
                "disagreements": self.disagreements,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """A quantization block, and the method that it indicates."""

    method: str
    origin: str
    block: Mapping[str, Any]
    evidence: Evidence


class FormatDetector:
    """Looks for quantization blocks and decides which method a checkpoint is quantized with."""

    def detect(self, directory: str | Path | Source) -> Detection:
        """Detect the method of a checkpoint directory, or of a checkpoint elsewhere.

        Raises `DetectionError` when `directory` is not a checkpoint directory, `CatalogError` when it can't be looked
        at, and `ConfigError` when a configuration file is not a JSON object.
        """
        source = as_source(directory)
        with source_errors(source.place):
            _require_checkpoint(source)
        if source.has(SIDECAR_FILE):
            return _detect_sidecar(read_json_of(source, SIDECAR_FILE), source)
        names = dict.fromkeys(file for file, _ in _PLACES)
        return _decide({name: read_json_of(source, name) for name in names if source.has(name)}, source)

    def detect_config(self, config: Mapping[str, Any]) -> Detection:
        """Detect the method from the dictionary of a config.json alone.

        Raises `ConfigError` when a block is not a JSON object.
        """
        check_arguments({"config": HF_CONFIG}, {"config": config})
        return _decide({_CONFIG: config}, None)


def _decide(files: Mapping[str, Mapping[str, Any]], source: Source | None) -> Detection:
    claims = [claim for file, keys in _PLACES if file in files for claim in _claims_at(files[file], file, keys)]
    if not claims:
        evidence = [
            Evidence(file=file, key="quantization_config", found="absent", read_as=None)
            for file in (_CONFIG, _PARAMS)
            if file in files
        ]
        return Detection(method=None, evidence=tuple(evidence), files=files, source=source)
    claims.sort(key=_priority)
    winner = claims[0]
    return Detection(
        method=winner.method,
        evidence=tuple(claim.evidence for claim in claims),
        disagreements=tuple(text for other in claims[1:] for text in _disagreements(winner, other)),
        origin=winner.origin,
        block=winner.block,
        files=files,
        source=source,
    )


def _detect_sidecar(content: Mapping[str, Any], source: Source) -> Detection:
    """Return the detection for a directory whose sidecar file has this content."""
    made_from = Evidence(file=SIDECAR_FILE, key="source", found=json.dumps(content.get("source")), read_as=SIDECAR)
    return Detection(method=SIDECAR, evidence=(made_from,), origin=SIDECAR_FILE, block=content, source=source)


def _priority(claim: _Claim) -> int:
    """The rank of a claim: the claim with the lowest number decides."""
    order = {COMPRESSED_TENSORS: 0, MODELOPT: 1, UNKNOWN: 3}
    return order.get(claim.method, 2)


def _claims_at(content: Mapping[str, Any], file: str, keys: tuple[str, ...]) -> list[_Claim]:
    """Return the claims of one place: one claim, or none when there is no block."""
    block: Any = content
    for depth, key in enumerate(keys, start=1):
        block = block.get(key)
        if block is None:
            return []
        if not isinstance(block, Mapping):
            raise ConfigError(not_an_object(f"{file}: {'.'.join(keys[:depth])}", block))
    if not block:
        return []
    block = unwrap_block(block)
    path = ".".join(keys)
    origin = f"{file}: {path}" if path else file
    method, key, found = _identify(block, origin)
    evidence = Evidence(file=file, key=f"{path}.{key}" if path else key, found=found, read_as=method)
    return [_Claim(method=method, origin=origin, block=block, evidence=evidence)]


def unwrap_block(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the block without the extra `quantization_config` level that the first transformers integration wrote.

    That integration stored `{"quantization_config": {...}, "sparsity_config": {...}}` in place of the block.
    """
    if "quantization_config" not in block:
        return block
    outer = {key: value for key, value in block.items() if key != "quantization_config"}
    inner = block["quantization_config"]
    return outer | dict(inner) if isinstance(inner, Mapping) else outer


def _identify(block: Mapping[str, Any], origin: str) -> tuple[str, str, str]:
    """Return the method that a block indicates, the key that indicates it, and the value of the key for messages."""
    producer = block.get("producer")
    names = {
        "quant_method": block.get("quant_method"),
        "producer.name": producer.get("name") if isinstance(producer, Mapping) else None,
    }
    for key, name in names.items():
        if isinstance(name, str):
            return _method_named(name), key, json.dumps(name)
    for key, method in _METHOD_OF_KEY.items():
        if key in block:
            return _METHOD_OF_KEY_AT.get((origin, key), method), key, json.dumps(block[key])
    if block.keys() <= _SPARSITY_ONLY:
        return COMPRESSED_TENSORS, "quant_method", "absent beside sparsity_config, as in releases up to 0.6"
    if origin in _METHOD_OF_PLACE:
        return _METHOD_OF_PLACE[origin], "quant_method", "absent, as usual in this place"
    return UNKNOWN, "quant_method", "absent"


def _method_named(name: str) -> str:
    """Return the usual spelling of a method name; early releases of compressed-tensors wrote sparseml."""
    lowered = name.strip().lower()
    if lowered.replace("_", "-") in (COMPRESSED_TENSORS, "sparseml"):
        return COMPRESSED_TENSORS
    return MODELOPT if lowered.startswith(MODELOPT) else lowered


def _disagreements(winner: _Claim, other: _Claim) -> list[str]:
    if winner.method != other.method:
        return [f"{winner.origin} says {winner.method}, {other.origin} says {other.method}; the first one counts"]
    differing = _differing_keys(winner, other)
    if not differing:
        return []
    keys = ", ".join(differing)
    return [f"{winner.origin} and {other.origin} are both {winner.method} but differ in {keys}; the first one counts"]


def _differing_keys(winner: _Claim, other: _Claim) -> list[str]:
    if winner.evidence.file in _METHOD_OF_PLACE or other.evidence.file in _METHOD_OF_PLACE:
        # The blocks of side files have another structure than those of config.json, so only ModelOpt's key is compared.
        algorithms = {_modelopt_algorithm(winner.block), _modelopt_algorithm(other.block)}
        return ["quant_algo"] if len(algorithms) > 1 else []
    keys = dict.fromkeys((*winner.block, *other.block))
    return [key for key in keys if winner.block.get(key) != other.block.get(key)]


def _modelopt_algorithm(block: Mapping[str, Any]) -> str:
    quantization = block.get("quantization")
    settings = quantization if isinstance(quantization, Mapping) else block
    return str(settings.get("quant_algo")).upper()


def _require_checkpoint(source: Source) -> None:
    """Raise `DetectionError` unless a source has a model configuration."""
    path = source.folder
    if path is None or path.is_dir():
        if any(source.has(name) for name in (_CONFIG, _PARAMS)):
            return
        found, remedy = _describe_files(source)
    elif path.exists():
        found, remedy = "a file", f"Give the directory that holds {_CONFIG} and the weights."
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        found = "no such directory"
        remedy = f"If this is a Hugging Face repository, download it first: hf download {path} --local-dir DIR"
    else:
        found, remedy = "no such directory", "Check the path; it is read on this machine."
    expected = f"a {'repository' if path is None else 'directory'} with {_CONFIG} or {_PARAMS}"
    raise DetectionError(Fault(where=source.place, expected=expected, found=found, remedy=remedy))


def _describe_files(source: Source) -> tuple[str, str]:
    """Return what a source without a model configuration holds instead, and the remedy."""
    names = source.names()
    if any(name.endswith(".gguf") for name in names):
        return describe_method("gguf").name, describe_method("gguf").remedy
    if "adapter_config.json" in names:
        return "a LoRA adapter", "Merge the adapter into its base model, or give the directory of the base model."
    inner = source.folders_with(_CONFIG)
    if inner:
        named = ", ".join(inner[:_MAX_NAMES]) + (", ..." if len(inner) > _MAX_NAMES else "")
        return "neither of them here", f"Give one of the directories inside instead: {named}"
    return "neither of them", "Give the directory of a whole checkpoint; an interrupted download may lack files."

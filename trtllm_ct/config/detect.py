"""Which quantization format a checkpoint directory holds, and on what evidence. JSON is read, tensors are not.

Several places may speak: blocks in config.json, params.json of Mistral's own repositories, hf_quant_config.json of
ModelOpt, and the side files of early GPTQ and AWQ tools. Each is judged by its `quant_method` or producer, never
by the presence of `config_groups`, which ModelOpt writes too. compressed-tensors goes before ModelOpt, ModelOpt
before all others; places that disagree are reported, whoever wins. A directory that this package prepared for an
engine is no checkpoint of its own, and what stands beside its mark isn't asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_ct.base.errors import ConfigError, DetectionError, Fault
from trtllm_ct.config.json_file import not_an_object, read_json_object
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS, MODELOPT, SIDECAR, UNKNOWN, describe_method

__all__ = ["SIDECAR_FILE", "Detection", "Evidence", "FormatDetector", "unwrap_block"]

SIDECAR_FILE = "trtllm_ct.json"
"""What makes a directory one that was prepared for an engine, and says from which source."""

_CONFIG = "config.json"
_PARAMS = "params.json"
_MODELOPT_CONFIG = "hf_quant_config.json"
_GPTQ_CONFIG = "quantize_config.json"
_AWQ_CONFIG = "quant_config.json"
_MOST_NAMED = 8

# Where a block may stand: file and keys. Among places that name the same method the first one counts.
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
# What a block without a name says instead: a key that only one method has,
_TELLING_KEYS = {
    "quant_algo": MODELOPT,
    "qformat_weight": "mistral-fp8",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
}
# nothing but sparsity, as compressed-tensors 0.6 wrote it,
_SPARSE_ONLY = frozenset({"sparsity_config", "version"})
# or a place that only one method uses.
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
    """One thing that was seen: file, key, value, and the method that it was read as (None: no quantization)."""

    file: str
    key: str
    found: str
    read_as: str | None

    def __str__(self) -> str:
        return f"{self.file}: {self.key} is {self.found}"

    def to_dict(self) -> dict[str, object]:
        """JSON form: the four fields by name."""
        return {"file": self.file, "key": self.key, "found": self.found, "read_as": self.read_as}


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What a checkpoint is.

    `method` is None for a checkpoint without quantization. `origin` names file and key of the deciding block, and
    `block` is that block as it was read; both are None when there is none.
    """

    method: str | None
    evidence: tuple[Evidence, ...]
    disagreements: tuple[str, ...] = ()
    origin: str | None = None
    block: Mapping[str, Any] | None = None
    directory: str | None = None

    @property
    def description(self) -> str:
        """A noun phrase that says what this is, such as `an AutoGPTQ checkpoint, not compressed-tensors`."""
        name = describe_method(self.method).name
        return name if self.method == COMPRESSED_TENSORS else f"{name}, not compressed-tensors"

    def require_compressed_tensors(self) -> Mapping[str, Any]:
        """The compressed-tensors block; raises `DetectionError` that says what the checkpoint is instead."""
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
        """JSON form, without the block."""
        return {
            "method": self.method,
            "description": self.description,
            "origin": self.origin,
            "evidence": [entry.to_dict() for entry in self.evidence],
            "disagreements": list(self.disagreements),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """A block that was found, and the method that it names."""

    method: str
    origin: str
    block: Mapping[str, Any]
    evidence: Evidence


class FormatDetector:
    """Looks for quantization blocks and decides whose checkpoint this is."""

    def detect(self, directory: str | Path) -> Detection:
        """Decide for a checkpoint directory.

        Raises `DetectionError` when this is no checkpoint directory, and `ConfigError` when a configuration
        file is no JSON object.
        """
        path = Path(directory)
        _require_checkpoint(path)
        if (path / SIDECAR_FILE).is_file():
            return _sidecar(read_json_object(path / SIDECAR_FILE), str(directory))
        names = dict.fromkeys(file for file, _ in _PLACES)
        files = {name: read_json_object(path / name) for name in names if (path / name).is_file()}
        return _decide(files, str(directory))

    def detect_config(self, config: Mapping[str, Any]) -> Detection:
        """Decide for the dictionary of a config.json alone; raises `ConfigError` when a block is no JSON object."""
        return _decide({_CONFIG: config}, None)


def _decide(files: Mapping[str, Mapping[str, Any]], directory: str | None) -> Detection:
    claims = [claim for file, keys in _PLACES if file in files for claim in _claims_at(files[file], file, keys)]
    if not claims:
        nothing = [
            Evidence(file=file, key="quantization_config", found="absent", read_as=None)
            for file in (_CONFIG, _PARAMS)
            if file in files
        ]
        return Detection(method=None, evidence=tuple(nothing), directory=directory)
    claims.sort(key=_priority)
    winner = claims[0]
    return Detection(
        method=winner.method,
        evidence=tuple(claim.evidence for claim in claims),
        disagreements=tuple(text for other in claims[1:] for text in _disagreements(winner, other)),
        origin=winner.origin,
        block=winner.block,
        directory=directory,
    )


def _sidecar(content: Mapping[str, Any], directory: str) -> Detection:
    source = Evidence(file=SIDECAR_FILE, key="source", found=json.dumps(content.get("source")), read_as=SIDECAR)
    return Detection(method=SIDECAR, evidence=(source,), origin=SIDECAR_FILE, block=content, directory=directory)


def _priority(claim: _Claim) -> int:
    order = {COMPRESSED_TENSORS: 0, MODELOPT: 1, UNKNOWN: 3}
    return order.get(claim.method, 2)


def _claims_at(content: Mapping[str, Any], file: str, keys: tuple[str, ...]) -> list[_Claim]:
    """The claim of one place: a list of one, or empty when nothing stands there."""
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
    method, key, found = _judge(block, origin)
    evidence = Evidence(file=file, key=f"{path}.{key}" if path else key, found=found, read_as=method)
    return [_Claim(method=method, origin=origin, block=block, evidence=evidence)]


def unwrap_block(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block without the extra `quantization_config` level that the first transformers integration wrote.

    It stored `{"quantization_config": {...}, "sparsity_config": {...}}` in place of the block.
    """
    if "quantization_config" not in block:
        return block
    outer = {key: value for key, value in block.items() if key != "quantization_config"}
    inner = block["quantization_config"]
    return outer | dict(inner) if isinstance(inner, Mapping) else outer


def _judge(block: Mapping[str, Any], origin: str) -> tuple[str, str, str]:
    """Whose block this is: the method, the key that says so, and what stands there."""
    producer = block.get("producer")
    names = {
        "quant_method": block.get("quant_method"),
        "producer.name": producer.get("name") if isinstance(producer, Mapping) else None,
    }
    for key, name in names.items():
        if isinstance(name, str):
            return _method_named(name), key, json.dumps(name)
    for key, method in _TELLING_KEYS.items():
        if key in block:
            return method, key, json.dumps(block[key])
    if block.keys() <= _SPARSE_ONLY:
        return COMPRESSED_TENSORS, "quant_method", "absent beside sparsity_config, as in releases up to 0.6"
    if origin in _METHOD_OF_PLACE:
        return _METHOD_OF_PLACE[origin], "quant_method", "absent, as usual in this place"
    return UNKNOWN, "quant_method", "absent"


def _method_named(name: str) -> str:
    """The method by its usual spelling; early releases of compressed-tensors called it sparseml."""
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


def _differing_keys(one: _Claim, other: _Claim) -> list[str]:
    if one.evidence.file in _METHOD_OF_PLACE or other.evidence.file in _METHOD_OF_PLACE:
        # A side file and a block in config.json have different shapes; ModelOpt's must agree in the algorithm.
        algorithms = {_modelopt_algorithm(one.block), _modelopt_algorithm(other.block)}
        return ["quant_algo"] if len(algorithms) > 1 else []
    keys = dict.fromkeys((*one.block, *other.block))
    return [key for key in keys if one.block.get(key) != other.block.get(key)]


def _modelopt_algorithm(block: Mapping[str, Any]) -> str:
    quantization = block.get("quantization")
    holder = quantization if isinstance(quantization, Mapping) else block
    return str(holder.get("quant_algo")).upper()


def _require_checkpoint(path: Path) -> None:
    """Raise unless this is a directory with a model configuration."""
    if path.is_dir():
        if any((path / name).is_file() for name in (_CONFIG, _PARAMS)):
            return
        found, remedy = _what_else(path)
    elif path.exists():
        found, remedy = "a file", f"Give the directory that holds {_CONFIG} and the weights."
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        found = "no such directory"
        remedy = f"If this is a Hugging Face repository, download it first: hf download {path} --local-dir DIR"
    else:
        found, remedy = "no such directory", "Check the path; it is read on this machine."
    raise DetectionError(
        Fault(where=str(path), expected=f"a directory with {_CONFIG} or {_PARAMS}", found=found, remedy=remedy)
    )


def _what_else(path: Path) -> tuple[str, str]:
    """What a directory without a model configuration seems to be, and what to do."""
    if any(path.glob("*.gguf")):
        return describe_method("gguf").name, describe_method("gguf").remedy
    if (path / "adapter_config.json").is_file():
        return "a LoRA adapter", "Merge the adapter into its base model, or give the directory of the base model."
    inner = sorted(found.parent.name for found in path.glob(f"*/{_CONFIG}"))
    if inner:
        named = ", ".join(inner[:_MOST_NAMED]) + (", ..." if len(inner) > _MOST_NAMED else "")
        return "neither of them here", f"Give one of the directories inside instead: {named}"
    return "neither of them", "Give the directory of a whole checkpoint; an interrupted download may lack files."

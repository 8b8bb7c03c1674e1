"""The modes that a converted directory states, as engines compare them with the modules that they build.

Every quantized module needs its mode, and every plain one an exclusion, under each name that an engine may compare
(`compared_names.py`). A statement that no engine understands as meant is a fault too. The rules are written apart from
those of the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.engine.releases import release_named
from trtllm_ct.verify.compared_names import ComparedNames
from trtllm_ct.verify.source.names import OTHER, is_expert

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.verify.matching import DirectoryMatch
    from trtllm_ct.verify.source.modules import Module

__all__ = ["MODES_FILE", "OLDER_MODES_FILE", "check_modes", "check_module_names", "check_record"]

MODES_FILE = "hf_quant_config.json"
OLDER_MODES_FILE = "quant_cfg.json"
"""The file from which releases before 1.2 read the modes of layers."""

_MIXED = "MIXED_PRECISION"
_MODE_KEYS = frozenset({"quant_algo", "group_size", "has_zero_point", "pre_quant_scale"})
_KEYS = _MODE_KEYS | {"kv_cache_quant_algo", "exclude_modules", "quantized_layers"}
_SIZES = ("tensor", "pipeline", "expert")
_ATTENTION_DP = "attention_dp"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flags:
    """What the entry of an algorithm says beside its name."""

    group_sizes: frozenset[int | None] = frozenset({None})
    has_zero_point: bool = False
    pre_quant_scale: bool = False


_AWQ_SIZES = frozenset({64, 128})
# What `QuantConfig` of an algorithm says: TensorRT-LLM `_torch/modules/linear.py`, the `create_weights` of each method;
# a flag of zero points makes AWQ methods read tensors of zeros.
_FLAGS: Mapping[str, _Flags] = {
    "W4A16_AWQ": _Flags(group_sizes=_AWQ_SIZES, pre_quant_scale=True),
    "W4A8_AWQ": _Flags(group_sizes=_AWQ_SIZES, pre_quant_scale=True),
    "W4A16_GPTQ": _Flags(group_sizes=_AWQ_SIZES, has_zero_point=True),
    "FP8_BLOCK_SCALES": _Flags(group_sizes=frozenset({None, 128})),
    **dict.fromkeys(("W4A16", "W8A16", "FP8", "FP8_PER_CHANNEL_PER_TOKEN"), _Flags()),
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4"), _Flags(group_sizes=frozenset({16}))),
    **dict.fromkeys(("MXFP8", "W4A16_MXFP4", "W4A8_MXFP4_MXFP8"), _Flags(group_sizes=frozenset({None, 32}))),
}


def check_record(document: Mapping[str, Any], out: Path, faults: FaultCollector) -> None:
    """Add a fault if hf_quant_config.json doesn't say for which release and sizes the directory was planned."""
    record = document.get("planned_for")
    record = record if isinstance(record, dict) else {}
    parallel = record.get("parallel")
    known = (
        release_named(str(record.get("engine"))) is not None
        and isinstance(parallel, dict)
        and all(_is_size(name, size) for name, size in parallel.items())
        and type(record.get("sm", 0)) is int
    )
    if not known:
        _add(
            faults,
            f"{out}/{MODES_FILE}: planned_for",
            "the release and the parallel sizes that it was converted for",
            f"{document.get('planned_for', 'no such key')}",
        )


def _is_size(name: str, size: object) -> bool:
    """Whether a member of the sizes in a record can be one."""
    return type(size) is int and size > 0 if name in _SIZES else name == _ATTENTION_DP and isinstance(size, bool)


def check_modes(document: Mapping[str, Any], out: Path, faults: FaultCollector) -> None:
    """Add a fault for each statement about modes that engines would not understand as it is meant.

    `document` is the parsed hf_quant_config.json, whose `quantization` is known to be well-formed.
    """
    quantization = document["quantization"]
    layers = quantization.get("quantized_layers") or {}
    where = f"{out}/{MODES_FILE}: quantization"
    for key in quantization.keys() - _KEYS:
        _add(faults, f"{where}.{key}", "no such key", str(quantization[key]))
    if (quantization.get("quant_algo") == _MIXED) != bool(layers):
        expected = f"{_MIXED}, without which engines ignore quantized_layers" if layers else "one mode for all modules"
        _add(faults, f"{where}.quant_algo", expected, str(quantization.get("quant_algo")))
    elif not layers:
        _check_entry({key: quantization[key] for key in _MODE_KEYS & quantization.keys()}, where, faults)
    for name, entry in layers.items():
        _check_entry(entry, f"{where}.quantized_layers.{name}", faults)
    if layers and not (out / OLDER_MODES_FILE).is_file():
        expected = "the modes of layers, which TensorRT-LLM before 1.2 reads from this file"
        _add(faults, f"{out}/{OLDER_MODES_FILE}", expected, "no such file")


def _check_entry(entry: Mapping[str, Any], where: str, faults: FaultCollector) -> None:
    """Add a fault for each flag of a mode that isn't that of its algorithm, if the table has it."""
    flags = _FLAGS.get(str(entry.get("quant_algo")))
    if flags is None:
        return
    for key in entry.keys() - _MODE_KEYS:
        _add(faults, f"{where}.{key}", "no such key", str(entry[key]))
    if entry.get("group_size") not in flags.group_sizes:
        sizes = " or ".join(sorted(map(str, flags.group_sizes)))
        _add(faults, f"{where}.group_size", f"{sizes}, for {entry.get('quant_algo')}", str(entry.get("group_size")))
    for key, expected in (("has_zero_point", flags.has_zero_point), ("pre_quant_scale", flags.pre_quant_scale)):
        if entry.get(key, False) is not expected:
            _add(faults, f"{where}.{key}", f"{expected}, for {entry.get('quant_algo')}", str(entry.get(key)))


def check_module_names(
    match: DirectoryMatch, document: Mapping[str, Any], config: Mapping[str, Any], out: Path, faults: FaultCollector
) -> None:
    """Add a fault for entries and exclusions that are missing under a name, and for those of no such module.

    `config` is the parsed config.json. Skips a directory that already has a fault: a difference may only follow from
    it.
    """
    if faults.faults:
        return
    quantization = document["quantization"]
    wanted = _Wanted.of(match, ComparedNames.of(config, _engine(document), _body(match)))
    entries, excluded = quantization.get("quantized_layers") or {}, set(quantization.get("exclude_modules") or ())
    stated = {name: entry.get("quant_algo") for name, entry in entries.items()}
    missing = {name: algo for name, algo in wanted.modes.items() if stated.get(name) != algo} if entries else {}
    key = f"{out}/{MODES_FILE}: quantization"
    for where, names, expected in (
        (f"{key}.exclude_modules", wanted.excluded - excluded, "plain modules under each name that engines compare"),
        (f"{key}.exclude_modules", excluded - wanted.plain, "only names of plain modules"),
        (f"{key}.quantized_layers", missing.keys(), "quantized modules under each name that engines compare"),
        (f"{key}.quantized_layers", stated.keys() - wanted.quantized, "only names of quantized modules"),
    ):
        if names:
            verb = "also" if expected.startswith("only") else "without, or in another mode,"
            _add(faults, where, expected, f"{verb} {format_names(sorted(names))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What a configuration has to state: modes and exclusions by name.

    `quantized` and `plain` are the names that may have a mode or an exclusion. Modules that have no source of their
    own, such as values that are keys too, need none: engines fuse them with others, whose names they look for.
    """

    modes: dict[str, str] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)
    quantized: set[str] = field(default_factory=set)
    plain: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, match: DirectoryMatch, names: ComparedNames) -> _Wanted:
        """Return what the delivered modules need."""
        wanted = cls()
        for key, module in match.delivered.by_key.items():
            layer = match.layer_of(key, module.name)
            compared = names.of_module(module.name)
            (wanted.plain if layer is None else wanted.quantized).update(compared)
            if key not in match.source.by_key:
                continue
            if layer is not None:
                wanted.modes.update(dict.fromkeys(compared, str(layer.quant_algo)))
            elif _could_be_quantized(key, module):
                wanted.excluded.update(compared)
        return wanted


def _could_be_quantized(key: str, module: Module) -> bool:
    """Whether an engine could build a plain module quantized: a Linear, an expert, or any matrix of another part."""
    weight = module.tensors.get("weight")
    if weight is None:
        return False
    axes = len(weight.shape)
    return is_expert(key) or (axes > 1 if key.startswith(OTHER) else axes == 2)


def _engine(document: Mapping[str, Any]) -> str:
    """Return the name of the release that a directory was planned for."""
    return str(document["planned_for"]["engine"])


def _body(match: DirectoryMatch) -> str | None:
    """Return the prefix of a text model's body in a larger model, as it is delivered; None for a text model alone."""
    names = match.delivered.names
    bodies: Iterator[str | None] = (names.body(module.name) for module in match.delivered.by_key.values())
    return next((body for body in bodies if body and "language_model" in body), None)


def _add(faults: FaultCollector, where: str, expected: str, found: str) -> None:
    faults.add(
        where=where,
        expected=expected,
        found=found,
        remedy="Convert again; an engine would build modules in other modes than those of their weights.",
    )

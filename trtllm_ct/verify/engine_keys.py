"""The keys of an engine-build checkpoint's config.json without which its files can't be read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CatalogError, FaultCollector
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.config.json_object import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["checked_layers"]

_MIXED = "MIXED_PRECISION"
_MOST = 2**31


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_Check = tuple["Callable[[Any], bool]", str]
_COUNT: _Check = (_is_count, "a positive integer")
_FLAG: _Check = (_is_flag, "true or false")
_CACHE: _Check = (lambda value: value is None or value in ("FP8", "INT8"), "null, FP8 or INT8")
_TOP: Mapping[str, _Check] = {
    "dtype": (lambda value: value in ("float16", "bfloat16"), "float16 or bfloat16"),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size"), _COUNT),
}
_MAPPING: Mapping[str, _Check] = dict.fromkeys(("world_size", "tp_size", "pp_size"), _COUNT)
_BLOCK: Mapping[str, _Check] = {"group_size": _COUNT, "has_zero_point": _FLAG, "pre_quant_scale": _FLAG}
_EXCLUDED: Mapping[str, _Check] = {"exclude_modules": (_is_names, "null or a list of names")}
_SM: Mapping[str, _Check] = {
    "sm": (lambda value: not isinstance(value, bool) and value in (80, 89, 90), "80, 89 or 90, the GPUs that it is for")
}
_IN_KERNEL_ORDER = ("W4A16_GPTQ", "W8A16_GPTQ")


def checked_layers(directory: Path, config: Mapping[str, Any], algorithms: Collection[str]) -> Mapping[str, Any] | None:
    """Return quant_cfg.json with the block of each Linear, None if config.json has one block for all.

    `algorithms` are those whose files can be read. Raises `CatalogError` with a fault for each value in config.json or
    there that the files can't be read with: after it, every value that is read has its type.
    """
    faults = FaultCollector()
    file = str(directory / "config.json")
    quantization = _block(config, "quantization")
    _check(file, "", config, _TOP, faults)
    mapping = _block(config, "mapping")
    _check(file, "mapping.", mapping, _MAPPING, faults)
    faults.raise_if_any(CatalogError)
    ranks = mapping["tp_size"] * mapping["pp_size"]
    if mapping["world_size"] != ranks:
        _add(file, "mapping.world_size", f"{ranks}, tp_size * pp_size", mapping["world_size"], faults)
    algo: _Check = (
        lambda value: value is None or (isinstance(value, str) and value in {*algorithms, _MIXED}),
        "null or an algorithm of engines",
    )
    one = {"quant_algo": algo, **_BLOCK}
    mixed = quantization.get("quant_algo") == _MIXED
    _check(file, "quantization.", quantization, {"quant_algo": algo} if mixed else {**one, **_EXCLUDED}, faults)
    _check_cache(file, "quantization.", quantization, faults)
    if "moe" in config:
        _check(file, "moe.", _block(config, "moe"), {"num_experts": _COUNT}, faults)
    if quantization.get("quant_algo") in _IN_KERNEL_ORDER:
        _check(file, "producer.", _block(config, "producer"), _SM, faults)
    layers = _checked_modes(directory / "quant_cfg.json", one, faults) if mixed else None
    faults.raise_if_any(CatalogError)
    return layers


def _checked_modes(path: Path, one: Mapping[str, _Check], faults: FaultCollector) -> Mapping[str, Any]:
    """Return quant_cfg.json; adds a fault for each value that the files can't be read with. `one` checks a block."""
    document = read_json_object(path)
    _check_cache(str(path), "", document, faults)
    layers = document.get("quantized_layers")
    if not isinstance(layers, Mapping):
        _add(str(path), "quantized_layers", "an object", layers, faults)
    for name in _block(document, "quantized_layers"):
        _check(str(path), f"{name}.", _block(document["quantized_layers"], name), one, faults)
    return document


def _check_cache(file: str, prefix: str, block: Mapping[str, Any], faults: FaultCollector) -> None:
    """Add a fault for a mode of the KV cache that is left out or unknown."""
    _check(file, prefix, block, {"kv_cache_quant_algo": _CACHE}, faults)


def _check(
    file: str, prefix: str, values: Mapping[str, Any], checks: Mapping[str, _Check], faults: FaultCollector
) -> None:
    for key, (accepts, expected) in checks.items():
        if key not in values or not accepts(values[key]):
            _add(file, prefix + key, expected, values.get(key, "no such key"), faults)


def _add(file: str, key: str, expected: str, value: Any, faults: FaultCollector) -> None:
    remedy = "Convert again into an empty directory."
    faults.add(where=f"{file}: {key}", expected=expected, found=shown(value), remedy=remedy)


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = config.get(key)
    return block if isinstance(block, Mapping) else {}

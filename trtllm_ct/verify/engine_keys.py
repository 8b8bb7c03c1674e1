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


_Check = tuple["Callable[[Any], bool]", str]
_COUNT: _Check = (_is_count, "a positive integer")
_FLAG: _Check = (_is_flag, "true or false")
_TOP: Mapping[str, _Check] = {
    "dtype": (lambda value: value in ("float16", "bfloat16"), "float16 or bfloat16"),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size"), _COUNT),
}
_MAPPING: Mapping[str, _Check] = dict.fromkeys(("world_size", "tp_size", "pp_size"), _COUNT)
_BLOCK: Mapping[str, _Check] = {"group_size": _COUNT, "has_zero_point": _FLAG, "pre_quant_scale": _FLAG}


def checked_layers(directory: Path, config: Mapping[str, Any], algorithms: Collection[str]) -> Mapping[str, Any] | None:
    """Return the block of each Linear in quant_cfg.json, None if config.json has one block for all.

    `algorithms` are those whose files can be read. Raises `CatalogError` with a fault for each value in config.json or
    there that the files can't be read with.
    """
    faults = FaultCollector()
    file = str(directory / "config.json")
    quantization = _block(config, "quantization")
    mixed = quantization.get("quant_algo") == _MIXED
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
    _check(file, "quantization.", quantization, {"quant_algo": algo} if mixed else one, faults)
    if "kv_cache_quant_algo" not in quantization:
        _add(file, "quantization.kv_cache_quant_algo", "null, FP8 or INT8", None, faults)
    if "moe" in config:
        _check(file, "moe.", _block(config, "moe"), {"num_experts": _COUNT}, faults)
    layers = _block(read_json_object(directory / "quant_cfg.json"), "quantized_layers") if mixed else {}
    for name in layers:
        _check(str(directory / "quant_cfg.json"), f"{name}.", _block(layers, name), one, faults)
    faults.raise_if_any(CatalogError)
    return layers if mixed else None


def _check(
    file: str, prefix: str, values: Mapping[str, Any], checks: Mapping[str, _Check], faults: FaultCollector
) -> None:
    for key, (accepts, expected) in checks.items():
        if not accepts(values.get(key)):
            _add(file, prefix + key, expected, values.get(key), faults)


def _add(file: str, key: str, expected: str, value: Any, faults: FaultCollector) -> None:
    remedy = "Convert again into an empty directory."
    faults.add(where=f"{file}: {key}", expected=expected, found=shown(value), remedy=remedy)


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = config.get(key)
    return block if isinstance(block, Mapping) else {}

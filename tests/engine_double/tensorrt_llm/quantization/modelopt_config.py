"""Imitates `quantization/modelopt_config.py`, earlier in `_torch/model_config.py`: configurations of ModelOpt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm.models.modeling_utils import QuantConfig
from tensorrt_llm.quantization.mode import QuantAlgo

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["build_quant_config", "is_modelopt", "read_algo", "read_modelopt_quant_config"]

_CACHE_SCHEMES = {("float", 8): "FP8", ("float", 4): "NVFP4", ("int", 8): "INT8"}
_LAYER_FIELDS = ("has_zero_point", "pre_quant_scale")


def is_modelopt(block: dict[str, Any]) -> bool:
    """Whether an inline `quantization_config` is ModelOpt's; only newer releases check this."""
    by_modelopt = (block.get("producer") or {}).get("name") == "modelopt"
    return RELEASE.newest_algos and (by_modelopt or str(block.get("quant_method")).startswith("modelopt"))


def read_modelopt_quant_config(document: dict[str, Any]) -> dict[str, Any]:
    """The `quantization` part; newer releases also read the flat shape, with `ignore` and `kv_cache_scheme`."""
    if "quantization" in document or not RELEASE.newest_algos:
        return dict(document["quantization"])
    scheme = document.get("kv_cache_scheme")
    cache = _CACHE_SCHEMES[scheme["type"], scheme["num_bits"]] if isinstance(scheme, dict) else scheme
    dropped = {"ignore", "kv_cache_scheme", "config_groups", "quant_method", "producer"}
    kept = {key: value for key, value in document.items() if key not in dropped}
    return kept | {"exclude_modules": document.get("ignore"), "kv_cache_quant_algo": cache}


def read_algo(name: str | None) -> QuantAlgo | None:
    """Return the member with a name; raises ValueError for other names, such as ModelOpt's `mxfp4`."""
    if name is None or (RELEASE.any_case_aliases and name in {"none", "null"}):
        return None
    alias = name.lower() if RELEASE.any_case_aliases else name
    return QuantAlgo.FP8_BLOCK_SCALES if alias == "fp8_pb_wo" else QuantAlgo(name)


def build_quant_config(
    quantization: dict[str, Any], directory: Path
) -> tuple[QuantConfig, dict[str, QuantConfig] | None]:
    """Read it as the worker does: a missing group_size is None, or 128 for FP8 blocks."""
    config = QuantConfig(
        quant_algo=read_algo(quantization.get("quant_algo")),
        kv_cache_quant_algo=read_algo(quantization.get("kv_cache_quant_algo")),
        group_size=quantization.get("group_size"),
        exclude_modules=quantization.get("exclude_modules"),
    )
    if config.quant_algo == QuantAlgo.MIXED_PRECISION:
        return config, _layers(config, quantization, directory)
    if RELEASE.newest_algos:
        for name in _LAYER_FIELDS:
            setattr(config, name, quantization.get(name, False))
    if config.quant_algo == QuantAlgo.FP8_BLOCK_SCALES and config.group_size is None:
        config.group_size = 128
    return config, None


def _layers(whole: QuantConfig, quantization: dict[str, Any], directory: Path) -> dict[str, QuantConfig]:
    """Return the entries per module, from quant_cfg.json, which older releases require with both of its keys."""
    path = directory / "quant_cfg.json"
    overlay: dict[str, Any] = {}
    if path.exists() or not RELEASE.layers_in_hf_quant_config:
        overlay = json.loads(path.read_text())
    source = overlay if not RELEASE.layers_in_hf_quant_config else quantization | overlay
    cache = read_algo(source["kv_cache_quant_algo"])
    if overlay and None not in {cache, whole.kv_cache_quant_algo} and cache != whole.kv_cache_quant_algo:
        raise RuntimeError(
            f"The kvcache config in 'quant_cfg.json', {cache}, is different from 'hf_quant_config.json', "
            f"{whole.kv_cache_quant_algo}!"
        )
    whole.kv_cache_quant_algo = cache or whole.kv_cache_quant_algo
    extra = _LAYER_FIELDS if RELEASE.newest_algos else ()
    return {
        name: QuantConfig(
            quant_algo=read_algo(entry["quant_algo"]),
            kv_cache_quant_algo=whole.kv_cache_quant_algo,
            group_size=entry.get("group_size"),
            **{field: entry[field] for field in extra if field in entry},
        )
        for name, entry in source["quantized_layers"].items()
    }

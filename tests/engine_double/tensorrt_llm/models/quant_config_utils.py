"""Imitates `models/quant_config_utils.py`: the compressed-tensors parser that newer releases have.

Generation A reads `config_groups["group_0"]` and its activations first; B (after pull request 17269) knows MXFP4
before it reads activations; C (pull request 17725) reads several groups when it is given module names.
No generation looks at the type of 8-bit weights, symmetry, activation order, block structure, sparsity or transforms.
"""

from __future__ import annotations

import re
from typing import Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm.models.modeling_utils import QuantConfig
from tensorrt_llm.quantization import QuantAlgo

__all__ = ["update_quant_config_from_compressed_tensors"]

if RELEASE.ct_parser is None:
    raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)


def _groups(block: dict[str, Any]) -> dict[str, Any]:
    groups = block.get("config_groups")
    if groups is None:
        raise ValueError("config_groups is not set in the compressed-tensors quantization_config.")
    if not groups:
        raise ValueError("config_groups is empty in the compressed-tensors quantization_config.")
    return groups


def _is_mxfp4(group: dict[str, Any], block_format: str | None) -> bool:
    """The format alone decides; activations, even quantized ones, are dropped."""
    weights = group["weights"]
    weight_only = group.get("input_activations") is None
    is_float_group = (weights["num_bits"], weights.get("type"), weights["strategy"]) == (4, "float", "group")
    return "mxfp4-pack-quantized" in {group.get("format"), block_format} or (is_float_group and weight_only)


def _group_algo(group: dict[str, Any], block_format: str | None) -> tuple[QuantAlgo, int | None]:
    weights = group["weights"]
    if RELEASE.ct_parser != "A" and _is_mxfp4(group, block_format):
        if weights.get("group_size") != 32:
            raise ValueError(f"Unsupported group_size: {weights.get('group_size')}. Supported: 32 for MXFP4.")
        return QuantAlgo.W4A16_MXFP4, 32
    inputs = group["input_activations"]
    inputs_strategy = inputs["strategy"]  # TypeError for every weight-only scheme
    if weights["num_bits"] == 4 and weights.get("type") == "float":
        return _nvfp4(weights, inputs_strategy)
    if weights["num_bits"] != 8:
        raise ValueError(f"Unsupported quant_bits: {weights['num_bits']}. Supported: 8 (FP8) or 4 (NVFP4).")
    return _fp8(weights, inputs)


def _nvfp4(weights: dict[str, Any], inputs_strategy: str) -> tuple[QuantAlgo, int | None]:
    if inputs_strategy != "tensor_group":
        raise ValueError(f"Unsupported inputs_quant_strategy for NVFP4: {inputs_strategy}.")
    if weights.get("group_size") != 16:
        raise ValueError(f"Unsupported group_size: {weights.get('group_size')}. Supported: 16 for NVFP4.")
    return QuantAlgo.NVFP4, 16


def _fp8(weights: dict[str, Any], inputs: dict[str, Any]) -> tuple[QuantAlgo, int | None]:
    """The type of the weights is not checked."""
    strategy = weights["strategy"]
    if strategy == "channel":
        if inputs["strategy"] != "token":
            raise ValueError(f"Unsupported inputs_quant_strategy: {inputs['strategy']}.")
        return QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, None
    if strategy == "block":
        if inputs.get("group_size") != 128:
            raise ValueError(f"Unsupported group_size: {inputs.get('group_size')}. Supported: 128.")
        return QuantAlgo.FP8_BLOCK_SCALES, 128
    raise ValueError(f"Unsupported weights_quant_strategy: {strategy}. Supported strategies: 'channel', 'block'.")


def update_quant_config_from_compressed_tensors(
    quant_config: QuantConfig, hf_quant_config: dict[str, Any], module_names: list[str] | None = None
) -> dict[str, QuantConfig] | None:
    """Set algorithm, group size, exclusions and KV cache of one config; per-module ones in generation C only."""
    groups = _groups(hf_quant_config)
    block_format = hf_quant_config.get("format")
    quant_config.exclude_modules = list(hf_quant_config.get("ignore") or [])
    cache = hf_quant_config.get("kv_cache_scheme")
    if cache is not None:
        if (cache.get("num_bits"), cache.get("type")) != (8, "float"):
            raise ValueError(f"Unsupported kv_cache_scheme: {cache}.")
        quant_config.kv_cache_quant_algo = QuantAlgo.FP8
    if RELEASE.ct_parser == "C" and module_names is not None and len(groups) > 1:
        quant_config.quant_algo = QuantAlgo.MIXED_PRECISION
        return _several(groups, block_format, module_names, quant_config)
    first = groups["group_0"] if RELEASE.ct_parser == "A" else next(iter(groups.values()))
    quant_config.quant_algo, quant_config.group_size = _group_algo(first, block_format)
    return None


def _several(
    groups: dict[str, Any], block_format: str | None, module_names: list[str], whole: QuantConfig
) -> dict[str, QuantConfig]:
    layers = {}
    for group in groups.values():
        names = [name for name in module_names if any(_targets(target, name) for target in group["targets"])]
        if not names:
            raise ValueError(f"config_groups targets matched no checkpoint module: {group['targets']}")
        algo, size = _group_algo(group, block_format)
        for name in names:
            layers[name] = QuantConfig(quant_algo=algo, group_size=size, kv_cache_quant_algo=whole.kv_cache_quant_algo)
    return layers


def _targets(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name

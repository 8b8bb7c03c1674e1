"""Rotary embeddings in config.json: the older keys and the newer block, each derived from the other.

transformers 5 writes one block `rope_parameters`; classes that rotate their kinds of layers differently have a block
for each kind in it. transformers 4 reads `rope_theta`, `rope_scaling` and, by class, `partial_rotary_factor` and
`rope_local_base_freq`; it ignores the block and computes with the theta of its class.
Source: transformers 5.23 `modeling_rope_utils.py` and `models/*/configuration_*.py: convert_rope_params_to_dict`,
4.57 `models/gemma3/configuration_gemma3.py`, `models/phi3/configuration_phi3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["missing_rope_keys"]

_THETA, _PARTIAL, _SCALING, _BLOCK = "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"
_LOCAL_THETA = "rope_local_base_freq"
_FULL, _SLIDING = "full_attention", "sliding_attention"

# Blocks by label: the labels, the older key of the second label's theta, and whose scaling `rope_scaling` is.
# The second pair is that of DeepSeek-V4; TensorRT-LLM reads its older keys (`_torch/configs/deepseek_v4.py`, 10a6f270).
_LABELS = ((_FULL, _SLIDING, _LOCAL_THETA, _FULL), ("main", "compress", "compress_rope_theta", "compress"))

_BY_LAYER_TYPE = {"gemma3_text": _LOCAL_THETA, "gemma3n_text": _LOCAL_THETA, "olmo3": _THETA}
"""Classes of transformers 4 with a block for each kind of layer in transformers 5: the older key of sliding layers."""

_WITH_OLDER_KEYS = frozenset({None, "deepseek_v4", *_BY_LAYER_TYPE})
"""Models with blocks by labels that get older keys. Classes of transformers 5 alone may drop their blocks for these."""

_OWN_BLOCKS = frozenset(
    {
        "beam", "cohere_compass_text", "cosmos3_edge_text", "deepseek_v4", "diffusion_gemma_text",
        "dots3_note_text", "embedding_gemma2_text",
        "gemma4_text", "gemma4_unified_text", "laguna", "lfm3", "mellum", "mimo_v2_flash", "modernbert",
        "modernbert-decoder", "neomme", "step3p5", "t5gemma2_decoder", "t5gemma2_text", "ultrabert", "zaya",
    }
)  # fmt: skip
"""Classes with a block that is neither flat nor known to transformers 4; they read older keys themselves, if any."""

_SCALED_BY_DEFAULT = frozenset(
    {
        "apertus", "cwm", "gpt_oss", "higgs_audio_v2", "ministral3", "mistral4", "mistral_large4_text",
        "openai_privacy_filter",
    }
)  # fmt: skip
"""Classes whose rotary embedding is scaled where config.json does not mention `rope_scaling`."""

# Types that only name what the class does without them; TensorRT-LLM knows neither (`RotaryScalingType.from_string`).
_UNSCALED = frozenset({"default", "axial"})
# Sections of M-RoPE stand beside the default type. `modeling_qwen2vl.py` and `modeling_qwen3vl.py` of TensorRT-LLM set
# `rope_scaling["type"]` to "mrope", so `rope_scaling` must be a dictionary (f4faed18).
_MROPE = "mrope_"
_QWEN2_SECTIONS = {"mrope_section": [16, 24, 24]}
_QWEN3_SECTIONS = {"mrope_interleaved": True, "mrope_section": [24, 20, 20]}
_SECTIONS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _QWEN2_SECTIONS),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text"), _QWEN3_SECTIONS),
}
"""The sections that models of transformers 5 take where none are stated, by class; older readers need them stated."""

# transformers 4 names of types, and their names in transformers 5 (`models/qwen2_vl/configuration_qwen2_vl.py`, phi3).
_OLDER_TYPES = {"mrope": "default", "su": "longrope"}
# `models/phi3/configuration_phi3.py` of 4.57 accepts these three keys and no others.
_THREE_KEYS = frozenset({"phi3", "phi4_multimodal"})
_LONGROPE_KEYS = ("short_factor", "long_factor")


def missing_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary keys that `config`, of one model, lacks, derived from those that it has.

    A key that has a value is never in the result. A type of scaling for sliding layers has no older spelling.
    """
    parameters = config.get(_BLOCK)
    if isinstance(parameters, Mapping):
        return {key: value for key, value in _older_keys(parameters, config).items() if config.get(key) is None}
    return _newer_block(config) if config.get(_THETA) is not None else {}


def _older_keys(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of transformers 4; none for blocks by labels that it has no keys for."""
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        return _flat_keys(parameters, config)
    if config.get("model_type") not in _WITH_OLDER_KEYS:
        return {}
    for first, second, second_theta, scaled in _LABELS:
        one, other = (_block(parameters, label) for label in (first, second))
        if first in parameters and parameters.keys() <= {first, second}:
            scaling = _flat_keys(_block(parameters, scaled), config)[_SCALING]
            keys = _flat_keys(one, config) | {_SCALING: scaling}
            return keys | ({second_theta: other[_THETA]} if _THETA in other else {})
    return {}


def _block(parameters: Mapping[str, Any], label: str) -> Mapping[str, Any]:
    """Return the block of a label; empty where layers of this kind have no rotary embedding (null)."""
    block = parameters.get(label)
    return block if isinstance(block, Mapping) else {}


def _flat_keys(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of transformers 4 for the parameters of one rotary embedding."""
    scaling = {key: value for key, value in parameters.items() if key not in {_THETA, _PARTIAL}}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type in _UNSCALED and not any(key.startswith(_MROPE) for key in scaling):
        sections = _SECTIONS.get(str(config.get("model_type")))
        scaling = {"rope_type": "default", **sections} if sections else {}
    elif rope_type == "longrope" and config.get("model_type") in _THREE_KEYS:
        scaling = {"type": rope_type} | {key: scaling[key] for key in _LONGROPE_KEYS if key in scaling}
    beside = {key: parameters[key] for key in (_THETA, _PARTIAL) if key in parameters}
    return {_SCALING: scaling or None} | beside


def _newer_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters`; nothing for classes that fill it in themselves."""
    model_type = config.get("model_type")
    if model_type in _OWN_BLOCKS or (model_type in _SCALED_BY_DEFAULT and _SCALING not in config):
        return {}
    scaling = dict(config.get(_SCALING) or {})
    rope_type = scaling.pop("rope_type", scaling.get("type", "default"))
    scaling.pop("type", None)
    partial = {} if config.get(_PARTIAL) is None else {_PARTIAL: config[_PARTIAL]}
    full = {_THETA: config[_THETA], "rope_type": _OLDER_TYPES.get(rope_type, rope_type), **scaling, **partial}
    local = _BY_LAYER_TYPE.get(str(model_type), _LOCAL_THETA if _LOCAL_THETA in config else None)
    if local is None:
        return {_BLOCK: full}
    theta = {} if config.get(local) is None else {_THETA: config[local]}
    return {_BLOCK: {_FULL: full, _SLIDING: {**theta, "rope_type": "default"}}}

"""What config.json says about rotary positions, in the spellings of transformers 4 and 5.

transformers 5 has one block `rope_parameters`, or one in it for each type of layer. transformers 4 has `rope_scaling`
beside keys for the base. A key that a conversion adds must say what the source says. The rules are written apart from
the code that adds them.
Source: transformers 5.23 `modeling_rope_utils.py` and `models/gemma3/configuration_gemma3.py`, 4.57
`modeling_rope_utils.py` and `models/qwen2_vl/configuration_qwen2_vl.py` (`mrope` is `default`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ROTARY_KEYS", "says_the_same"]

_MAIN, _SLIDING = "full_attention", "sliding_attention"
# The base of each type of layer in its own key.
_BASES: Mapping[str, str] = {
    "rope_theta": _MAIN,
    "global_rope_theta": _MAIN,
    "rope_local_base_freq": _SLIDING,
    "local_rope_theta": _SLIDING,
    "swa_rope_theta": _SLIDING,
    "compress_rope_theta": "compress",
}
# DeepSeek-V4 calls its blocks by other names, and `rope_scaling` is that of the second one.
_SAME_LABELS: Mapping[str, str] = {"main": _MAIN}
_COMPRESSED = "compress"
# A class of transformers 4 whose sliding layers have the base of all layers, unscaled: `models/olmo3`.
_ONE_BASE = frozenset({"olmo3"})
# Classes whose `rope_scaling` may have no other keys: transformers 4.57 `models/phi3/configuration_phi3.py`.
_THREE_KEYS = frozenset({"phi3", "phi4_multimodal"})
_FACTORS = frozenset({"short_factor", "long_factor"})
# The sections of M-RoPE that classes of transformers 5 have where none are stated (`models/qwen*_vl/configuration_*`).
_QWEN2_SECTIONS: Mapping[str, Any] = {"mrope_section": [16, 24, 24]}
_QWEN3_SECTIONS: Mapping[str, Any] = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
_SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_vl": _QWEN2_SECTIONS,
    "qwen2_vl_text": _QWEN2_SECTIONS,
    "qwen2_5_vl": _QWEN2_SECTIONS,
    "qwen2_5_vl_text": _QWEN2_SECTIONS,
    "qwen3_vl_text": _QWEN3_SECTIONS,
    "qwen3_vl_moe_text": _QWEN3_SECTIONS,
}
_PARTS = ("partial_rotary_factor", "rotary_pct")
_BLOCKS = ("rope_parameters", "rope_scaling")
_KIND, _BASE, _PART = "rope_type", "rope_theta", _PARTS[0]
_LENGTH = "original_max_position_embeddings"
_SAME_KINDS: Mapping[str, str] = {"mrope": "default", "su": "longrope"}

ROTARY_KEYS = frozenset({*_BASES, *_PARTS, *_BLOCKS})
"""The keys of config.json that describe rotary positions."""


def says_the_same(key: str, value: object, source: Mapping[str, Any]) -> bool:
    """Whether the value of a rotary key says what the source says; `source` is its config.json at the same level."""
    blocks = _blocks_of(source)
    if key in _BASES:
        return value is not None and value == blocks.get(_BASES[key], {}).get(_BASE)
    if key in _PARTS:
        return value is not None and value == blocks[_MAIN].get(_PART)
    if not isinstance(value, Mapping):
        # null is the older spelling of positions that are not scaled; elsewhere it says nothing.
        return value is None and source.get(key) is None
    if key == "rope_scaling":
        expected = blocks.get(_COMPRESSED, blocks[_MAIN])
        may_lack = {_PART, _BASE}
        if source.get("model_type") in _THREE_KEYS:
            may_lack |= expected.keys() - _FACTORS - {_KIND}
        return not _is_by_type(value) and _fits(_normal(value), expected, source, may_lack)
    if not _is_by_type(value):
        return _fits(_normal(value), blocks[_MAIN], source, {_PART})
    if source.get("model_type") in _ONE_BASE and _BASE in blocks[_MAIN]:
        blocks.setdefault(_SLIDING, {_KIND: "default", _BASE: blocks[_MAIN][_BASE]})
    blocks.setdefault(_SLIDING, {_KIND: "default"})
    return value.keys() >= _types_of(source) and all(
        _SAME_LABELS.get(kind, kind) in blocks
        and _fits(_normal(block or {}), blocks[_SAME_LABELS.get(kind, kind)], source, {_PART})
        for kind, block in value.items()
    )


def _fits(found: Mapping[str, Any], expected: Mapping[str, Any], source: Mapping[str, Any], may_lack: set[str]) -> bool:
    """Whether a block has all parameters of the source, and no others.

    Parameters that the source has in keys of their own may be missing, and a length that it has there may be added, or
    sections that the class has by itself.
    """
    added = {_LENGTH: source[_LENGTH]} if _LENGTH in source else {}
    if "mrope_section" not in expected:
        added |= _SECTIONS.get(str(source.get("model_type")), {})
    needed = {key: value for key, value in expected.items() if key not in may_lack}
    return needed.items() <= found.items() and all(
        (key in expected and expected[key] == value) or (key in added and added[key] == value)
        for key, value in found.items()
    )


def _blocks_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parameters of each type of layer by one set of names, from all spellings that a configuration has."""
    parameters, scaling = (config.get(key) for key in _BLOCKS)
    part = next((config[key] for key in _PARTS if config.get(key) is not None), None)
    main: dict[str, Any] = {_PART: part} if part is not None else {}
    main |= _normal(scaling) if isinstance(scaling, Mapping) else {_KIND: "default"}
    blocks = {_MAIN: main}
    for key, kind in _BASES.items():
        if config.get(key) is not None:
            blocks.setdefault(kind, {_KIND: "default"})[_BASE] = config[key]
    if isinstance(parameters, Mapping):
        stated = parameters if _is_by_type(parameters) else {_MAIN: parameters}
        for kind, block in stated.items():
            if isinstance(block, Mapping):
                label = _SAME_LABELS.get(kind, kind)
                blocks[label] = {**blocks.get(label, {}), **_normal(block)}
    return blocks


def _types_of(config: Mapping[str, Any]) -> set[str]:
    """Return the types of layers that a configuration has parameters for of their own."""
    parameters = config.get("rope_parameters")
    return set(parameters) if isinstance(parameters, Mapping) and _is_by_type(parameters) else set()


def _is_by_type(parameters: Mapping[str, Any]) -> bool:
    """Whether parameters are given for each type of layer."""
    return any(isinstance(value, Mapping) for value in parameters.values())


def _normal(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block with one name for its kind, and without null."""
    kind = str(block.get(_KIND) or block.get("type") or "default")
    others = {key: value for key, value in block.items() if key not in {_KIND, "type"} and value is not None}
    return {**others, _KIND: _SAME_KINDS.get(kind, kind)}

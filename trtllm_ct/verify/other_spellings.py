"""Keys of config.json that say under another name what a source says.

Releases of transformers, and the classes of TensorRT-LLM, read one name or the other, so a conversion may add the one
that is missing. The rules are written apart from the code that adds them.
Sources: transformers 5.23 `attribute_map` in `models/*/configuration_*.py`, and what the classes of Nemotron-H and
DeepSeek-V4 there make of older keys; TensorRT-LLM `_torch/configs/deepseek_v4.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from trtllm_ct.verify.rotary import ROTARY_KEYS, says_the_same

__all__ = ["is_other_spelling", "same_json"]

_SAME_MEANING = (
    frozenset({"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}),
    frozenset({"num_experts_per_tok", "num_experts_per_token", "moe_topk"}),
    frozenset({"hidden_act", "hidden_activation"}),
    frozenset({"rms_norm_eps", "layer_norm_epsilon"}),
    frozenset({"dtype", "torch_dtype"}),
)
# Kinds of layers as one character each or by name, and the names that are the same kind.
_KIND_OF: Mapping[str, str] = {
    "M": "mamba",
    "linear_attention": "mamba",
    "*": "attention",
    "full_attention": "attention",
    "-": "mlp",
    "E": "moe",
}
_SAME_LAYERS: Mapping[str, str] = {
    "hybrid_override_pattern": "layers_block_type",
    "layers_block_type": "hybrid_override_pattern",
    "mtp_hybrid_override_pattern": "mtp_layers_block_type",
    "mtp_layers_block_type": "mtp_hybrid_override_pattern",
}
# The tokens that DeepSeek-V4 compresses into one, by kind of layer.
_RATIOS: Mapping[str, int] = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


def is_other_spelling(key: str, value: Any, source: Mapping[str, Any]) -> bool:
    """Whether a key that is new, or has another value than in the source, says what other keys of the source say.

    `source` is its config.json at the same level.
    """
    if key in ROTARY_KEYS:
        return says_the_same(key, value, source)
    if source.get(key) is not None or value is None:
        return False
    for keys in _SAME_MEANING:
        if key in keys:
            return any(same_json(source[other], value) for other in keys if source.get(other) is not None)
    if key in _SAME_LAYERS:
        kinds = _kinds(source.get(_SAME_LAYERS[key]))
        return bool(kinds) and _kinds(value) == kinds
    return key in _COUNTED and same_json(_COUNTED[key](source), value)


def same_json(first: Any, second: Any) -> bool:
    """Whether two JSON values are the same; 1, 1.0 and true are not, and NaN is."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def _kinds(layers: Any) -> list[str]:
    """Return the names of the kinds of layers; none for a value that is no list of them."""
    return [_KIND_OF.get(str(kind), str(kind)) for kind in layers] if isinstance(layers, str | list) else []


def _ratios(source: Mapping[str, Any]) -> list[int | None]:
    """Return the ratio of each layer, and 0 for each draft layer, which isn't compressed."""
    stated = source.get("compress_rates")
    rates = {**_RATIOS, **(stated if isinstance(stated, Mapping) else {})}
    drafts = source.get("num_nextn_predict_layers") or 0
    return [rates.get(kind) for kind in source.get("layer_types") or ()] + [0] * drafts


def _hash_layers(source: Mapping[str, Any]) -> int | None:
    """Return how many layers at the beginning choose experts by hash; None if others do so too."""
    hashed = [kind == "hash_moe" for kind in source.get("mlp_layer_types") or ()]
    count = sum(hashed)
    return count if hashed and all(hashed[:count]) else None


_COUNTED: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "num_hidden_layers": lambda source: len(_kinds(source.get("layers_block_type"))) or None,
    "compress_ratios": _ratios,
    "num_hash_layers": _hash_layers,
}

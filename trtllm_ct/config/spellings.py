"""Keys of config.json that transformers 5 writes under new names only: one table of the older names.

transformers 5 reads the older names too (`attribute_map` and `__post_init__` of its classes), so only these have to be
added. Releases before it, and TensorRT-LLM's own classes, read the older ones and silently take the default of the
class where they are missing. Rotary embeddings are in `rope_spellings.py`.
A test compares the table with keys of both releases, `tests/config/spellings.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SPELLINGS", "Spelling", "missing_older_keys"]

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """A key that has an older name.

    `model_types` are the classes that have both; None: all classes. `value` makes the older value from the newer one
    and the whole configuration; None if there is none.
    """

    older: str
    newer: str
    model_types: frozenset[str] | None = None
    value: Callable[[Any, Config], Any] = lambda value, _config: value


_PATTERN_OF = {
    "mamba": "M", "linear_attention": "M",
    "attention": "*", "full_attention": "*",
    "mlp": "-", "moe": "E",
}  # fmt: skip


def _pattern(kinds: Any, _config: Config) -> str | None:
    """Return kinds of layers as one character each; transformers 5.23 `NemotronHConfig._list_to_pattern`."""
    characters = [_PATTERN_OF.get(kind) for kind in _names(kinds)]
    return "".join(filter(None, characters)) if characters and None not in characters else None


def _count(kinds: Any, _config: Config) -> int | None:
    return len(_names(kinds)) or None


_DEFAULT_RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def _compress_ratios(kinds: Any, config: Config) -> list[int] | None:
    """Return the ratio of each layer, 0 without compression; layers of the draft have none either."""
    rates = config.get("compress_rates")
    known = {"sliding_attention": 0, **_DEFAULT_RATES, **(rates if isinstance(rates, Mapping) else {})}
    ratios = [known.get(kind) for kind in _names(kinds)]
    if not ratios or not all(isinstance(ratio, int) for ratio in ratios):
        return None
    drafts = config.get("num_nextn_predict_layers") or 0
    return [*(ratio for ratio in ratios if ratio is not None), *[0] * drafts] if isinstance(drafts, int) else None


def _hash_layers(kinds: Any, _config: Config) -> int | None:
    """Return how many layers at the beginning choose experts by hash; None if they are elsewhere too."""
    hashed = [kind == "hash_moe" for kind in _names(kinds)]
    return sum(hashed) if hashed and hashed == sorted(hashed, reverse=True) else None


def _names(kinds: Any) -> list[str]:
    return kinds if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds) else []


_NEMOTRON_H = frozenset({"nemotron_h"})
_DEEPSEEK_V4 = frozenset({"deepseek_v4"})

SPELLINGS: tuple[Spelling, ...] = (
    # 4.53 knows `torch_dtype` only; 4.56 and newer read both.
    Spelling(older="torch_dtype", newer="dtype"),
    Spelling(older="dtype", newer="torch_dtype"),
    # `attribute_map` of Qwen3-MoE, Qwen3-VL-MoE and others in 5.23; TensorRT-LLM reads the older name
    # (`_torch/models/modeling_qwen3_moe.py`, 03441af1). Classes without the older name ignore it.
    Spelling(older="num_experts", newer="num_local_experts"),
    # `_torch/models/modeling_nemotron_h.py` (00620eb0) goes through the pattern and reads `rms_norm_eps`; the class in
    # the model's repository compares the pattern with `num_hidden_layers`.
    Spelling(older="hybrid_override_pattern", newer="layers_block_type", model_types=_NEMOTRON_H, value=_pattern),
    Spelling(older="num_hidden_layers", newer="layers_block_type", model_types=_NEMOTRON_H, value=_count),
    Spelling(
        older="mtp_hybrid_override_pattern", newer="mtp_layers_block_type", model_types=_NEMOTRON_H, value=_pattern
    ),
    Spelling(older="rms_norm_eps", newer="layer_norm_epsilon", model_types=_NEMOTRON_H),
    # `_torch/configs/deepseek_v4.py` (10a6f270) reads the older ones; its defaults are those of one model.
    Spelling(older="compress_ratios", newer="layer_types", model_types=_DEEPSEEK_V4, value=_compress_ratios),
    Spelling(older="num_hash_layers", newer="mlp_layer_types", model_types=_DEEPSEEK_V4, value=_hash_layers),
)
"""The older names of keys. A key that has several is listed once for each."""


def missing_older_keys(config: Config) -> dict[str, Any]:
    """Return the older keys that `config`, of one model, lacks or has as null, with their values."""
    missing = {}
    for spelling in SPELLINGS:
        applies = spelling.model_types is None or config.get("model_type") in spelling.model_types
        if applies and config.get(spelling.older) is None and config.get(spelling.newer) is not None:
            value = spelling.value(config[spelling.newer], config)
            if value is not None:
                missing[spelling.older] = value
    return missing

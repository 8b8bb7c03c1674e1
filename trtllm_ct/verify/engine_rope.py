"""What a rotary embedding means, as transformers reads the source's config.json and as engines read theirs.

Both sides are brought to the same numbers, each with the defaults of its own reader. It is written from transformers
5.23 `modeling_rope_utils.py` and from TensorRT-LLM `layers/attention.py: create_attention_const_params` (34c6cd4) with
`functional.py: RopeEmbeddingUtils` (8c2fa7f), and shares nothing with `plan/`.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, Any

from trtllm_ct.verify.engine_classes import class_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["rope_of_engine", "rope_of_source", "scaling_problem"]

_ORIGINAL = "original_max_position_embeddings"
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow"),
}
_ATTENTION_OF_YARN = ("mscale", "mscale_all_dim")
_BASE = 1e4
"""What an engine takes for a missing `rotary_base`."""


def rope_of_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return kind, base and numbers of the embedding that transformers computes for a config.json.

    Dynamic scaling changes nothing up to the length of the model, and is none here.
    """
    block = {**_block(source, "rope_scaling"), **_block(source, "rope_parameters")}
    defaults = class_of(source).defaults
    stated = (_number(source.get("rope_theta")), _number(block.get("rope_theta")))
    base = next((value for value in stated if value is not None), defaults["rope_theta"])
    kind = str(block.get("rope_type") or block.get("type") or "default")
    kind = "default" if kind == "dynamic" else kind
    longest = source.get("max_position_embeddings") or defaults["max_position_embeddings"]
    length = source.get(_ORIGINAL) or block.get(_ORIGINAL) or longest
    numbers = block | {
        _ORIGINAL: length,
        "beta_fast": block.get("beta_fast") or 32,
        "beta_slow": block.get("beta_slow") or 1,
    }
    rope = _numbers(kind, base, numbers)
    if kind == "yarn":
        both = [_number(block.get(key)) for key in _ATTENTION_OF_YARN]
        inferred = _attention(block, *both) if all(both) else _attention(block, 1, 0)
        given = _number(block.get("attention_factor"))
        rope["attention_factor"] = _shown(inferred if given is None else given)
    return rope


def rope_of_engine(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return kind, base and numbers of the embedding that an engine of this config.json has."""
    block = _block(engine, "rotary_scaling")
    kind = str(block.get("type") or block.get("rope_type") or "default")
    defaults = {"beta_fast": 32, "beta_slow": 1, _ORIGINAL: 8192 if kind == "llama3" else 4096}
    rope = _numbers(kind, _number(engine.get("rotary_base", _BASE)), defaults | block)
    if kind == "yarn":
        both = [_number(block.get(key, usual)) for key, usual in (("mscale", 1), ("mscale_all_dim", 0))]
        rope["attention_factor"] = _shown(_attention(block, *both))
    return rope


def scaling_problem(scaling: Any, kind: str) -> str:
    """Return what `rotary_scaling` of an engine must be beside the numbers; empty if it is.

    `kind` is that of the source. A key that its reader doesn't know changes nothing, or is read by another kind.
    """
    if kind == "default":
        return "null: the source has no scaling that an engine computes" if scaling is not None else ""
    if not isinstance(scaling, dict):
        return f"an object with the numbers of {kind}"
    known = {*_NUMBERS.get(kind, ()), *(_ATTENTION_OF_YARN if kind == "yarn" else ())}
    unknown = sorted(scaling.keys() - known - {"type", "rope_type"})
    if unknown:
        return f"none of the keys {', '.join(unknown)}"
    return "one key for its type" if {"type", "rope_type"} <= scaling.keys() else ""


def _numbers(kind: str, base: float | None, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that a kind of scaling is computed from; an unknown kind has none."""
    return {"kind": kind, "base": base} | {key: _number(numbers.get(key)) for key in _NUMBERS.get(kind, ())}


def _number(value: Any) -> float | None:
    """Return a value as a number, None for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def _attention(block: Mapping[str, Any], mscale: float | None, mscale_all_dim: float | None) -> float | None:
    """Return the factor of cosines and sines in YaRN; None if a number is missing that it is computed from."""
    factor = _number(block.get("factor"))
    if factor is None or mscale is None or mscale_all_dim is None:
        return None
    slope = 0.1 * log(factor) if factor > 1 else 0.0
    return (1 + mscale * slope) / (1 + mscale_all_dim * slope)


def _shown(value: float | None) -> float | None:
    """Return a number that is computed differently on the two sides with six digits."""
    return None if value is None else float(f"{value:.6g}")


def _block(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object of a configuration without its null keys; empty if there is none."""
    block = config.get(key)
    return {name: value for name, value in block.items() if value is not None} if isinstance(block, dict) else {}

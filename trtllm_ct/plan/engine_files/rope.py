"""The rotary embedding of a model as config.json of an engine has it: `rotary_base` and `rotary_scaling`.

transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has both in `rope_parameters`. Engines read the
former only, in the keys of the table below: an engine is built with a table of cosines and sines that TensorRT-LLM
makes from them (`layers/attention.py: Attention.create_attention_const_params`, 34c6cd4, and `functional.py:
RopeEmbeddingUtils`, 8c2fa7f). Its converters are known to write linear and llama3.
What transformers computes is in `modeling_rope_utils.py` of 5.23.

Dynamic scaling is left out. Until a sequence is longer than `max_position_embeddings` it changes nothing, and
`trtllm-build` takes no longer ones then. Written as such, engines would be wrong or not be built: up to release 1.0 the
table is that of frequencies multiplied by `factor` (`functional.py`, dfaa638), and later ones stop at a key `alpha`
that such models don't have (8c2fa7f, pull request 5521). Decoding reads that table (`decoderMaskedMultiheadAttention
Utils.h: rotary_embedding_coefficient`, 9a037a6), whatever `update_rotary_base_n_scale` there computes before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, log
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_ct.base.json_values import is_finite_number
from trtllm_ct.config.json_object import shown

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector

__all__ = ["Rope", "rope_of"]


class _Kind(NamedTuple):
    """A kind of scaling: the keys that it must have, and further ones that are read, with what transformers takes."""

    required: tuple[str, ...]
    optional: tuple[tuple[str, float], ...] = ()
    derived: bool = False


_ORIGINAL = "original_max_position_embeddings"
_KINDS: Mapping[str, _Kind] = {
    "linear": _Kind(("factor",)),
    "llama3": _Kind(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)),
    "yarn": _Kind(("factor", _ORIGINAL), (("beta_fast", 32), ("beta_slow", 1)), derived=True),
    "dynamic": _Kind(("factor",)),
}
_TAKE_ORIGINAL = "Take config.json from the model that was quantized."
_MSCALES = ("mscale", "mscale_all_dim")
_POSITIVE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", *_MSCALES, "partial_rotary_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Base, number of positions and scaling of a rotary embedding.

    `derived` names a scaling that no converter is known to write; empty for others.
    `warning` says for which lengths an engine computes something else than the model; empty if for none. `limits` says
    that the builder takes longer sequences than the table has positions, unless an option limits them.
    """

    base: float
    length: int
    scaling: dict[str, Any] | None = None
    derived: str = ""
    warning: str = ""
    limits: bool = False


def rope_of(text: Mapping[str, Any], default_base: float, length: int, faults: FaultCollector) -> Rope:
    """Return the rotary embedding of a text model; adds a fault for one that engines don't compute.

    `text` is its configuration in either spelling. If it has both, they must agree. `length` is the number of positions
    that the model has.
    """
    blocks = _checked_blocks(text, faults)
    if blocks is None:
        return Rope(base=default_base, length=length)
    old, new = blocks
    stated = (text.get("rope_theta"), old.pop("rope_theta", None), new.pop("rope_theta", None))
    bases = {float(base) for base in stated if base is not None}
    scaled = [_with_kind(block) for block in (old, new) if _kind(block) != "default"]
    if len(bases) > 1 or (len(scaled) == 2 and scaled[0] != scaled[1]) or (new and old and len(scaled) == 1):
        faults.add(
            where="config.json: rope_parameters",
            expected="the same rotary embedding as in rope_theta and rope_scaling",
            found="another one",
            remedy="Keep the one that the model was trained with.",
        )
    base = next(iter(bases), default_base)
    if (text.get("partial_rotary_factor") or new.get("partial_rotary_factor") or 1) != 1:
        _refuse("partial_rotary_factor", "a rotary embedding of whole heads", "one of a part of each head", faults)
    return _scaled(scaled[0], base, text, length, faults) if scaled else Rope(base=base, length=length)


def _checked_blocks(text: Mapping[str, Any], faults: FaultCollector) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return `rope_scaling` and `rope_parameters`; adds faults and returns None for values that are no numbers."""
    before = len(faults.faults)
    old, new = (_given(text, key, faults) for key in ("rope_scaling", "rope_parameters"))
    numbers = (*_POSITIVE, *_NUMBERS)
    top = {key: text.get(key) for key in ("rope_theta", _ORIGINAL, "partial_rotary_factor")}
    for where, block in (("", top), ("rope_scaling.", old), ("rope_parameters.", new)):
        _check_numbers(where, block, faults)
    values = [(key, value) for block in (old, new) for key, value in block.items() if key not in numbers]
    nested = [key for key, value in values if isinstance(value, Mapping)]
    if nested:
        _refuse("rope_parameters", "one rotary embedding for all layers", f"one for {' and for '.join(nested)}", faults)
    return None if len(faults.faults) > before else (old, new)


def _scaled(block: dict[str, Any], base: float, text: Mapping[str, Any], length: int, faults: FaultCollector) -> Rope:
    """Return a scaled embedding; adds faults for a kind, a missing key or a value that engines don't compute."""
    name = str(block["rope_type"])
    kind = _KINDS.get(name)
    if kind is None:
        _refuse("rope_type", f"{', '.join(_KINDS)} or default", repr(name), faults)
        return Rope(base=base, length=length)
    if _ORIGINAL in kind.required:
        block = block | _original_length(block, text, None if name == "llama3" else length, faults)
    missing = [key for key in kind.required if key not in block]
    if missing:
        _refuse("rope_scaling", f"{' and '.join(missing)} for {name}", "no such key", faults)
        return Rope(base=base, length=length)
    if name == "dynamic":
        return _without_dynamic(block, base, length, faults)
    optional = {key: block.get(key) or usual for key, usual in kind.optional}
    changed = {key: value for key, value in optional.items() if value != dict(kind.optional)[key]}
    scaling = {"rope_type": name, **{key: block[key] for key in kind.required}, **changed}
    if name == "yarn":
        scaling |= _attention_of_yarn(block, faults)
    limits = name != "llama3" and scaling["factor"] > 1
    return Rope(
        base=base,
        length=length,
        scaling=scaling,
        derived=f"rotary_scaling of type {name}" if kind.derived else "",
        warning=_past_the_table(name, scaling["factor"], length) if limits else "",
        limits=limits,
    )


def _without_dynamic(block: Mapping[str, Any], base: float, length: int, faults: FaultCollector) -> Rope:
    """Return the embedding without dynamic scaling; adds a fault for `alpha`, by which some classes scale always."""
    if "alpha" in block:
        _refuse("rope_scaling", "dynamic scaling that starts with the length of the model", "alpha", faults)
    return Rope(
        base=base,
        length=length,
        warning=f"dynamic rope scaling is left out: an engine computes sequences of up to {length} tokens as the model "
        "does, and longer ones wrongly; trtllm-build takes those only if --max_seq_len asks for them",
    )


def _past_the_table(name: str, factor: float, length: int) -> str:
    """Return a warning: the builder's default length is larger than its table of the rotary embedding.

    Source: TensorRT-LLM `builder.py: _init_max_seq_len` (47cb03a); `create_attention_const_params` makes
    `max_position_embeddings` rows, and the kernel that decodes reads them without a check of bounds.
    """
    return (
        f"trtllm-build takes {factor:g} * {length} tokens as the longest sequence of {name} rope scaling, but makes a "
        f"rotary table for {length} positions: build with --max_seq_len {length} or less"
    )


def _original_length(
    block: Mapping[str, Any], text: Mapping[str, Any], default: int | None, faults: FaultCollector
) -> dict[str, Any]:
    """Return the original length of a scaling by its key; empty if there is none.

    transformers 5 takes that beside the block before that in it, and transformers 4 the other way round: they must be
    equal. Without one, YaRN takes the length that the model has (`default`); engines would take 4,096.
    """
    outside, inside = text.get(_ORIGINAL), block.get(_ORIGINAL)
    if outside is not None and inside is not None and outside != inside:
        expected = f"{inside}, which the scaling has"
        remedy = "Keep the one that the model was trained with."
        faults.add(where=f"config.json: {_ORIGINAL}", expected=expected, found=str(outside), remedy=remedy)
    length = inside or outside or default
    return {_ORIGINAL: length} if length else {}


def _attention_of_yarn(block: Mapping[str, Any], faults: FaultCollector) -> dict[str, float]:
    """Return the keys that give engines YaRN's factor of attention; adds a fault for bounds that are not truncated.

    transformers computes it from `attention_factor`, or from both of `mscale` and `mscale_all_dim`, or from `factor`.
    Engines compute (1 + a * mscale) / (1 + a * mscale_all_dim), a = ln(factor) / 10, with 1 and 0 by default.
    """
    if "truncate" in block and not block["truncate"]:
        _refuse("rope_scaling", "YaRN with truncated bounds", "truncate", faults)
    given, factor = block.get("attention_factor"), block["factor"]
    slope = 0.1 * log(factor) if factor > 1 else 0.0
    if given is None or isclose(given, 1 + slope, rel_tol=1e-6):
        both = {key: block[key] for key in _MSCALES if block.get(key)}
        return both if given is None and len(both) == len(_MSCALES) else {}
    if not slope:
        _refuse("rope_scaling", "a factor of attention of 1 for a factor of 1", f"attention_factor {given}", faults)
        return {}
    return {"mscale": (given - 1) / slope, "mscale_all_dim": 0.0}


def _given(text: Mapping[str, Any], key: str, faults: FaultCollector) -> dict[str, Any]:
    """Return a block of the configuration without keys that are null; adds a fault for what is no block."""
    block = text.get(key)
    if block is not None and not isinstance(block, Mapping):
        faults.add(where=f"config.json: {key}", expected="an object", found=shown(block), remedy=_TAKE_ORIGINAL)
    if not isinstance(block, Mapping):
        return {}
    return {name: value for name, value in block.items() if value is not None or name == "truncate"}


def _check_numbers(where: str, block: Mapping[str, Any], faults: FaultCollector) -> None:
    """Add a fault for each value that is no number, or not positive where it must be."""
    for key in (*_POSITIVE, *_NUMBERS):
        value = block.get(key)
        if value is None or (is_finite_number(value) and (key in _NUMBERS or value > 0)):
            continue
        expected = "a positive number" if key in _POSITIVE else "a finite number"
        faults.add(where=f"config.json: {where}{key}", expected=expected, found=shown(value), remedy=_TAKE_ORIGINAL)


def _kind(block: Mapping[str, Any]) -> str:
    """Return the type of a scaling under either of its names; `default` for none."""
    return str(block.get("rope_type") or block.get("type") or "default")


def _with_kind(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scaling with one name of its type."""
    return {
        "rope_type": _kind(block),
        **{key: value for key, value in block.items() if key not in {"type", "rope_type"}},
    }


def _refuse(key: str, expected: str, found: str, faults: FaultCollector) -> None:
    faults.add(
        where=f"config.json: {key}",
        expected=f"{expected}, which engines of the TensorRT backend compute",
        found=found,
        remedy="Convert with --to modelopt: the PyTorch backend reads config.json itself.",
    )

"""The rotary embedding of a model as config.json of an engine has it: `rotary_base` and `rotary_scaling`.

transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has both in `rope_parameters`. Engines read the
former only. The kinds of scaling are those of TensorRT-LLM `functional.py: RotaryScalingType`; its converters are known
to write linear and llama3. Dynamic scaling is refused: `RopeEmbeddingUtils` reads a key `alpha` that such models don't
have, or computes another table, by its release. YaRN without its original length is computed with 4,096 there, and the
factor of attention always follows from `factor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector

__all__ = ["Rope", "rope_of"]

_KINDS = ("linear", "llama3", "yarn")
_DERIVED = frozenset({"yarn"})
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Base and scaling of a rotary embedding; `derived` names a scaling that no converter is known to write."""

    base: float
    scaling: dict[str, Any] | None = None
    derived: str = ""


def rope_of(text: Mapping[str, Any], default_base: float, faults: FaultCollector) -> Rope:
    """Return the rotary embedding of a text model; adds a fault for one that engines don't compute.

    `text` is its configuration in either spelling. If it has both, they must agree.
    """
    parameters, scaling = text.get("rope_parameters"), text.get("rope_scaling")
    old = dict(scaling) if isinstance(scaling, dict) else {}
    new = dict(parameters) if isinstance(parameters, dict) else {}
    nested = [key for block in (old, new) for key, value in block.items() if isinstance(value, Mapping)]
    if nested:
        _refuse("rope_parameters", "one rotary embedding for all layers", f"one for {' and for '.join(nested)}", faults)
        return Rope(base=default_base)
    stated = (text.get("rope_theta"), old.pop("rope_theta", None), new.pop("rope_theta", None))
    bases = {float(base) for base in stated if base is not None}
    both = [_plain(block) for block in (old, new) if _kind(block) != "default"]
    if len(bases) > 1 or (len(both) == 2 and both[0] != both[1]) or (new and old and len(both) == 1):
        faults.add(
            where="config.json: rope_parameters",
            expected="the same rotary embedding as in rope_theta and rope_scaling",
            found="another one",
            remedy="Keep the one that the model was trained with.",
        )
    base = next(iter(bases), default_base)
    block = next((block for block in (old, new) if _kind(block) != "default"), None)
    if float(text.get("partial_rotary_factor") or (new.get("partial_rotary_factor") or 1)) != 1:
        _refuse("partial_rotary_factor", "a rotary embedding of whole heads", "one of a part of each head", faults)
    if block is None:
        return Rope(base=base)
    kind = _kind(block)
    if kind not in _KINDS:
        _refuse("rope_type", f"{', '.join(_KINDS)} or default", repr(kind), faults)
    missing = [key for key in _REQUIRED.get(kind, ()) if block.get(key) is None]
    if missing:
        _refuse("rope_scaling", f"{' and '.join(missing)} for {kind}", "no such key", faults)
    elif kind == "yarn":
        block = _yarn(block, text, faults)
    derived = f"rotary_scaling of type {kind}" if kind in _DERIVED else ""
    return Rope(base=base, scaling=block, derived=derived)


def _yarn(block: Mapping[str, Any], text: Mapping[str, Any], faults: FaultCollector) -> dict[str, Any]:
    """Return a YaRN scaling with its original length; adds a fault for what engines don't read of one.

    Without that key, transformers 5.23 (`modeling_rope_utils.py`) takes the length that the model has.
    """
    attention, usual = block.get("attention_factor"), 0.1 * log(float(block["factor"])) + 1
    unread = [key for key in ("mscale", "mscale_all_dim") if block.get(key) is not None]
    unread += ["attention_factor"] if attention is not None and not isclose(attention, usual, rel_tol=1e-6) else []
    unread += ["truncate"] if block.get("truncate") is False else []
    if unread:
        _refuse("rope_scaling", "YaRN by its factor and its bounds alone", " and ".join(unread), faults)
    lengths = (source.get("original_max_position_embeddings") for source in (block, text))
    length = next((length for length in lengths if length), text.get("max_position_embeddings"))
    if not length:
        _refuse("rope_scaling", "original_max_position_embeddings for yarn", "no such key", faults)
    return {**block, "original_max_position_embeddings": length}


def _kind(block: Mapping[str, Any]) -> str:
    """Return the type of a scaling under either of its names; `default` for none."""
    return str(block.get("rope_type") or block.get("type") or "default")


def _plain(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scaling with one name of its type, for comparisons."""
    return {**{key: value for key, value in block.items() if key not in {"type", "rope_type"}}, "type": _kind(block)}


def _refuse(key: str, expected: str, found: str, faults: FaultCollector) -> None:
    faults.add(
        where=f"config.json: {key}",
        expected=f"{expected}, which engines of the TensorRT backend compute",
        found=found,
        remedy="Convert with --to modelopt: the PyTorch backend reads config.json itself.",
    )

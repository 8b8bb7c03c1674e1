"""The rotary embedding of a model as config.json of an engine has it: `rotary_base` and `rotary_scaling`.

transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has both in `rope_parameters`. Engines read the
former only. The kinds of scaling are those of TensorRT-LLM `functional.py: RotaryScalingType`; its converters are known
to write linear and llama3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["Rope", "rope_of"]

_KINDS = ("linear", "dynamic", "llama3", "yarn")
_DERIVED = frozenset({"dynamic", "yarn"})
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
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
    bases = {float(base) for base in (text.get("rope_theta"), new.pop("rope_theta", None)) if base is not None}
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
    derived = f"rotary_scaling of type {kind}" if kind in _DERIVED else ""
    return Rope(base=base, scaling=block, derived=derived)


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

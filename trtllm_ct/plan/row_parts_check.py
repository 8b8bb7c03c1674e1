"""Refuse checkpoints whose layers lack a part of what the row of their class says that they have (`layer_parts.py`)."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.expert_spellings import PROJECTIONS
from trtllm_ct.plan.models.row_defaults import with_row_defaults
from trtllm_ct.plan.models.shared_attention import layers_of_queries_only, layers_without_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from trtllm_ct.plan.models.layer_parts import Part
    from trtllm_ct.plan.models.sites import Model

__all__ = ["lost_by_row"]

_NO_KEYS = frozenset({"self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight"})
_NO_VALUES = frozenset({"self_attn.v_proj.weight"})
_PROJECTION_OF = {0: "gate_proj", 1: "up_proj", 2: "down_proj"}


def lost_by_row(names: Iterable[str], model: Model, body: str) -> Iterator[tuple[str, str]]:
    """Yield what a checkpoint lacks by the row of its class: the name, and what was expected under it.

    `names` are those of all tensors, and `body` is the prefix of the text model. Layers without any tensor are left
    out.
    """
    config = with_row_defaults(model.text, model.name)
    layers, outside = _by_layer(names, body)
    for name in _missing(model.row.ends, outside, config):
        yield f"{body}{name}", f"a tensor that {model.name} has"
    no_keys = layers_of_queries_only(model.row, model.text, model.layers)
    no_values = layers_without_values(model.row, model.text)
    stored = {number: layers[number] for number in sorted(layers) if number < model.layers}
    for choice in (tuple(part for part in parts if not part.key or config.get(part.key)) for parts in model.row.layer):
        never = not any(
            _has(part, tensors, config, model.row.experts) for part in choice for tensors in stored.values()
        )
        for number, tensors in stored.items():
            absent = _NO_KEYS if number in no_keys else _NO_VALUES if number in no_values else frozenset()
            prefix = f"{body}layers.{number}."
            for name, expected in _lost(choice, tensors - absent, config, model.row.experts, never=never):
                if name not in absent:
                    yield f"{prefix}{name}", f"a tensor that {expected} of {model.name} have"


def _by_layer(names: Iterable[str], body: str) -> tuple[dict[int, set[str]], set[str]]:
    """Return the names of tensors inside of each layer, by its number, and those in the body outside of the layers."""
    layers: dict[int, set[str]] = {}
    outside: set[str] = set()
    start = f"{body}layers."
    for name in names:
        if name.startswith(start):
            number, _, local = name[len(start) :].partition(".")
            if number.isdecimal():
                layers.setdefault(int(number), set()).add(local)
        elif name.startswith(body):
            outside.add(name[len(body) :])
    return layers, outside


def _lost(
    choice: tuple[Part, ...], tensors: Collection[str], config: Mapping[str, object], experts: str, *, never: bool
) -> Iterator[tuple[str, str]]:
    """Yield what a layer lacks of the parts that it has, or of the first one if it must have one and has none."""
    present = [part for part in choice if _has(part, tensors, config, experts)]
    optional = any(not part.names(config) and not part.experts for part in choice)
    if choice and not present and (not optional or never):
        present = [choice[0]]
    for part in present:
        yield from ((name, "layers") for name in _missing(part, tensors, config))
        if part.experts:
            yield from _lost_projections(part, tensors, experts)


def _has(part: Part, tensors: Collection[str], config: Mapping[str, object], experts: str) -> bool:
    """Whether a layer has any tensor of a part."""
    if any(spelling in tensors for name in part.names(config) for spelling in name.split("|")):
        return True
    return bool(part.experts) and any(name.startswith(f"{experts}.") for name in tensors)


def _missing(part: Part, tensors: Collection[str], config: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of a part under which no tensor is stored, each by its first spelling."""
    for name in part.names(config):
        spellings = name.split("|")
        if not any(spelling in tensors for spelling in spellings):
            yield spellings[0]


def _lost_projections(part: Part, tensors: Collection[str], experts: str) -> Iterator[tuple[str, str]]:
    """Yield the projections that no routed expert of a layer has; of stacked experts none is yielded."""
    numbered = re.compile(rf"{re.escape(experts)}\.\d+\.(\w+)\.(\w+)")
    matches = (match for name in tensors if (match := numbered.fullmatch(name)) is not None)
    stored = {(PROJECTIONS.get(match[1]), match[2]) for match in matches}
    stacked = any(name.startswith(f"{experts}.") for name in tensors) and not stored
    for position, local in product(part.experts, part.expert_locals):
        if (position, local) not in stored and not stacked:
            yield f"{experts}.0.{_PROJECTION_OF[position]}.{local}", "routed experts"

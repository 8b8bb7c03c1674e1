"""Find what a checkpoint has lost, for models whose row lists no modules: layers and experts of one kind are alike.

A layer that has lost a tensor has other tensors than all other layers, and a tensor of another size gives it other
shapes. Layers differ for good reasons too: they are of several kinds, share keys and values, or have heads of several
sizes. So a layer is reported only if no other layer is exactly like it, and most layers of its kind agree. Of which
kind a layer is follows from config.json (`layer_kinds.py`), and from the tensors that only some layers have.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.expert_spellings import PROJECTIONS
from trtllm_ct.plan.models.part_layers import lost_part_layers
from trtllm_ct.plan.models.plain_tensors import EXPERT

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

    from trtllm_ct.plan.models.part_layers import PartLayers
    from trtllm_ct.plan.models.plain_tensors import PlainTensors, Shape

__all__ = ["LAYER", "Suspects", "suspects_of"]

LAYER = re.compile(r"((?:.*\.)?(?:layers|layer|h|blocks|block))\.(\d+)\.(.+)")
"""A tensor of a layer: the layers, the number and the name in the layer. Of nested layers the innermost one counts."""

# From fewer layers of one kind it can't be told what the others must have.
_FEWEST = 3
_MOST_NAMED = 1000

_Members = dict[int, "PlainTensors"]
"""The tensors of layers or experts by number, under their names inside of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """What some layers and experts lack, or have in another size than the others of their kind.

    `lost` are names of tensors. `misshapen` has the shape that a tensor should have by name. `lost_layers` are whole
    layers that config.json counts and no file has, and `surplus_layers` those after the last one that config.json
    counts, although they are like the ones before.
    """

    lost: tuple[str, ...] = ()
    misshapen: Mapping[str, Shape] = field(default_factory=dict)
    lost_layers: tuple[str, ...] = ()
    surplus_layers: tuple[str, ...] = ()


def suspects_of(
    tensors: PlainTensors, body: str, kinds: Sequence[Hashable], parts: Collection[PartLayers] = ()
) -> Suspects:
    """Compare the layers and the experts of a checkpoint with each other.

    `body` is the prefix of the text model's layers, and `kinds` is the kind of each of them by config.json; it is empty
    if config.json does not give their number. `parts` are the numbers of layers of the other parts of the model.
    """
    stacks, experts = _members_of(tensors)
    main = _main_stack(stacks, body)
    lost: dict[str, None] = {}
    misshapen: dict[str, Shape] = {}
    for owner, members in experts.items():
        lost |= dict.fromkeys(f"{owner}.{number}.{name}" for number, name in _lost_parts(members))
        misshapen |= {f"{owner}.{number}.{name}": shape for number, name, shape in _misshapen(members, marked=True)}
    for stack, layers in stacks.items():
        marks = kinds if stack == main or layers.keys() == set(range(len(kinds))) else ()
        for group in _groups(layers, marks):
            lost |= dict.fromkeys(f"{stack}.{number}.{name}" for number, name in _lost(group))
            wrong = _misshapen(group, marked=len(set(marks)) > 1)
            misshapen |= {f"{stack}.{number}.{name}": shape for number, name, shape in wrong}
    layers = stacks.get(main, {})
    lost_layers = [f"{main}.{number}" for number in _lost_layers(main, stacks, len(kinds))]
    return Suspects(
        lost=tuple(lost),
        misshapen=misshapen,
        lost_layers=tuple(dict.fromkeys([*lost_layers, *lost_part_layers(tensors, parts)])),
        surplus_layers=tuple(f"{main}.{number}" for number in _surplus(layers, len(kinds))),
    )


def _members_of(tensors: PlainTensors) -> tuple[dict[str, _Members], dict[str, _Members]]:
    """Return the layers by the name of their stack, and the experts by the name of the module of all of them."""
    stacks: dict[str, _Members] = {}
    experts: dict[str, _Members] = {}
    for name, shape in tensors.items():
        layer = LAYER.fullmatch(name)
        if layer is not None:
            stacks.setdefault(layer[1], {}).setdefault(int(layer[2]), {})[layer[3]] = shape
        expert = EXPERT.fullmatch(name)
        if expert is not None and expert[3] in PROJECTIONS:
            experts.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[f"{expert[3]}.{expert[4]}"] = shape
    return stacks, experts


def _main_stack(stacks: Mapping[str, _Members], body: str) -> str:
    """Return the stack with the most layers directly below a prefix; "" without any."""
    below = [stack for stack in stacks if f"{stack.rpartition('.')[0]}.".lstrip(".") == body]
    return max(below, key=lambda stack: len(stacks[stack]), default="")


def _lost_layers(main: str, stacks: Mapping[str, _Members], count: int) -> Iterator[int]:
    """Yield the layers among the first `count` that a stack lacks.

    Where another stack has all of them, it is the one that config.json counts. Two stacks with the same layers are
    run in turns, and config.json counts the runs (HRM).
    """
    layers = stacks.get(main, {})
    others = [other for stack, other in stacks.items() if stack != main]
    complete = any(other.keys() == set(range(count)) for other in stacks.values())
    in_turns = any(_names(other) == _names(layers) for other in others)
    if layers and not complete and not in_turns:
        yield from (number for number in range(count) if number not in layers)


def _names(layers: _Members) -> dict[int, frozenset[str]]:
    """Return the names in each layer."""
    return {number: frozenset(tensors) for number, tensors in layers.items()}


def _surplus(layers: _Members, count: int) -> Iterator[int]:
    """Yield the layers after the last one of `count` that are like one before it: draft layers have other tensors."""
    ordinary = {frozenset(tensors) for number, tensors in layers.items() if number < count}
    for number, tensors in layers.items():
        if count and number >= count and frozenset(tensors) in ordinary:
            yield number


def _groups(layers: _Members, kinds: Sequence[Hashable]) -> Iterator[_Members]:
    """Yield the layers of each kind; all others, whose kind is not known, are one group."""
    groups: dict[Hashable, _Members] = {}
    for number, tensors in layers.items():
        kind = kinds[number] if number < len(kinds) else "draft" if kinds else ""
        groups.setdefault(kind, {})[number] = tensors
    yield from groups.values()


def _lost(group: _Members) -> Iterator[tuple[int, str]]:
    """Yield what a layer lacks that is the only one with its tensors, of what most layers like it have.

    The first layer has no parameters for what it gets from the layer before, nor the last one for what comes after it:
    there only weights and biases are missed.
    """
    ends = {min(group), max(group)}
    sets = {number: frozenset(tensors) for number, tensors in group.items()}
    counts = Counter(sets.values())
    for number, names in sets.items():
        if counts[names] > 1:
            continue
        others = [other for key, other in sets.items() if key != number]
        special = names.difference(*[frozenset.intersection(*others)] if others else ())
        alike = Counter(other for other in others if special <= other)
        for usual, count in alike.most_common(1):
            if names < usual and count >= _FEWEST and 2 * count > alike.total():
                for name in sorted(usual - names):
                    if number not in ends or name.endswith((".weight", ".bias")):
                        yield number, name


def _misshapen(group: _Members, *, marked: bool) -> Iterator[tuple[int, str, Shape]]:
    """Yield the tensors of a layer or expert whose shape differs from that of most others with the same tensors.

    Where config.json tells no layers apart (not `marked`), a layer may be of a kind of its own: its sizes differ in
    several modules then, since the rows of one are the columns of another.
    """
    by_names: dict[frozenset[str], _Members] = {}
    for number, tensors in group.items():
        by_names.setdefault(frozenset(tensors), {})[number] = tensors
    for alike in by_names.values():
        names = sorted(next(iter(alike.values())))
        forms = {number: tuple(tensors[name] for name in names) for number, tensors in alike.items()}
        counts = Counter(forms.values())
        usual, count = counts.most_common(1)[0]
        if count < _FEWEST or 2 * count <= len(alike) or len(counts) == 1:
            continue
        for number, form in forms.items():
            wrong = {
                name: shape
                for name, stored, shape in zip(names, form, usual, strict=True)
                if stored is not None and shape is not None and stored != shape
            }
            if counts[form] == 1 and (marked or len({name.rpartition(".")[0] for name in wrong}) == 1):
                yield from ((number, name, shape) for name, shape in wrong.items())


def _lost_parts(parts: _Members) -> Iterator[tuple[int, str]]:
    """Yield what an expert lacks of what most experts of its layer have, and the experts that are missing."""
    usual, count = Counter(frozenset(names) for names in parts.values()).most_common(1)[0]
    if 2 * count <= len(parts):
        return
    numbers = range(max(parts) + 1)
    missing = ((number, name) for number in numbers for name in sorted(usual - parts.get(number, {}).keys()))
    yield from islice(missing, _MOST_NAMED)

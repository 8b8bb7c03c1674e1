"""`fold_names`: fold the names of repeated modules into one, such as `model.layers.{0..31}.mlp.down_proj`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["fold_names"]

_LONGEST_PERIOD = 16
_SHORTEST = 3

_Template = tuple[str | None, ...]
"""The components of a dotted name, with None in place of the number that is folded."""


def fold_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return dotted names, with names that differ only in one number folded into one entry.

    The result is in the order of first appearance. Numbers are written as in brace expansion of a shell: `{0..3,7}`,
    and `{3..59..4}` for every fourth one. A number is a component of a name that consists of digits. Names
    with several numbers (layer and expert) are folded over the last number first, and then over the number before it if
    the folded names are otherwise equal.
    """
    folded = tuple(names)
    # A name may be followed by text ("..., row 3, columns 0-127"). Its numbers are not folded: the spaces around them
    # make their component of the split name something else than digits.
    split = [name.split(".") for name in folded]
    positions = [[index for index, part in enumerate(parts) if part.isdecimal()] for parts in split]
    for nth in range(max(map(len, positions), default=0) - 1, -1, -1):
        templates = _fold_once(split, positions, nth)
        folded = tuple(_join(template, numbers) for template, numbers in templates.items())
        split = [name.split(".") for name in folded]
        positions = [[index for index, part in enumerate(parts) if part.isdecimal()] for parts in split]
    return folded


def _fold_once(
    split: Iterable[Sequence[str]], positions: Iterable[Sequence[int]], nth: int
) -> dict[_Template, list[int]]:
    """Return the `nth` numbers, counted from 0, of the names that are equal but for them, by what is equal.

    `split` are the components of the names, and `positions` those of their numbers.
    """
    groups: dict[_Template, list[int]] = {}
    for parts, at in zip(split, positions, strict=True):
        if nth < len(at):
            position = at[nth]
            groups.setdefault((*parts[:position], None, *parts[position + 1 :]), []).append(int(parts[position]))
        else:
            groups.setdefault(tuple(parts), [])
    return groups


def _join(template: _Template, numbers: Sequence[int]) -> str:
    return ".".join(_ranges(numbers) if part is None else part for part in template)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers in the form `{0..3,7}`; a single number has no braces."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    starts = [ordered[0]] + [after for before, after in pairwise(ordered) if after != before + 1]
    ends = [before for before, after in pairwise(ordered) if after != before + 1] + [ordered[-1]]
    runs = ",".join(str(start) if start == end else f"{start}..{end}" for start, end in zip(starts, ends, strict=True))
    shorter = min(_strides(ordered), key=len, default=runs) if len(starts) >= _SHORTEST else runs
    return "{" + min(runs, shorter, key=len) + "}"


def _strides(ordered: Sequence[int]) -> Iterator[str]:
    """Yield numbers as sequences with one step, such as `0..56..4,1..57..4`, for every step that covers them all.

    Layers of different kinds repeat with a period. Each sequence has three numbers at least.
    """
    for step in range(2, _LONGEST_PERIOD + 1):
        sequences = [[number for number in ordered if number % step == rest] for rest in range(step)]
        used = sorted((sequence for sequence in sequences if sequence), key=lambda sequence: sequence[0])
        if all(
            len(sequence) >= _SHORTEST and sequence[-1] - sequence[0] == step * (len(sequence) - 1) for sequence in used
        ):
            yield ",".join(f"{sequence[0]}..{sequence[-1]}..{step}" for sequence in used)

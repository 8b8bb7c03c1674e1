"""Names of repeated modules folded into one: `model.layers.{0..31}.mlp.down_proj`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["fold_names"]

_Template = tuple[str | None, ...]


def fold_names(names: Iterable[str]) -> tuple[str, ...]:
    """Dotted names, those that differ in one number only folded into one entry; order of first appearance.

    Numbers are path components of digits. Names with several numbers (layer and expert) fold over the last one first
    and then, where the folded rest is the same, over the one before.
    """
    folded = tuple(names)
    # Spaces end the dotted name: what follows is prose ("..., row 3, columns 0-127").
    most = max((sum(map(str.isdecimal, name.split("."))) for name in folded), default=0)
    for number in range(most - 1, -1, -1):
        folded = _fold_once(folded, number)
    return folded


def _fold_once(names: Sequence[str], number: int) -> tuple[str, ...]:
    """Fold over the component that is the `number`-th of digits in each name."""
    groups: dict[_Template, list[int]] = {}
    for name in names:
        parts = name.split(".")
        positions = [index for index, part in enumerate(parts) if part.isdecimal()]
        if number < len(positions):
            position = positions[number]
            groups.setdefault((*parts[:position], None, *parts[position + 1 :]), []).append(int(parts[position]))
        else:
            groups.setdefault(tuple(parts), [])
    return tuple(_join(template, numbers) for template, numbers in groups.items())


def _join(template: _Template, numbers: Sequence[int]) -> str:
    return ".".join(_ranges(numbers) if part is None else part for part in template)


def _ranges(numbers: Sequence[int]) -> str:
    """`{0..3,7}`; a single number stays bare."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    starts = [ordered[0]] + [after for before, after in pairwise(ordered) if after != before + 1]
    ends = [before for before, after in pairwise(ordered) if after != before + 1] + [ordered[-1]]
    runs = (str(start) if start == end else f"{start}..{end}" for start, end in zip(starts, ends, strict=True))
    return "{" + ",".join(runs) + "}"

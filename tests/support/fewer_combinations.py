"""Fewer combinations of a test's parameters, still with every pair of values, or with every value.

A test over classes, schemes, releases and sizes has hundreds of combinations. A fault nearly always depends on one or
two of them, so a choice in which every pair of two parameters' values occurs finds it too (pairwise testing). Where
parameters decide in different places of the code, each value once finds what all pairs would.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pytest

__all__ = ["covering", "left_out"]

MARKERS = {"pairs": 2, "values": 1}
"""How many parameters' values occur together in the choice that a marker asks for."""


def covering(cases: Sequence[Mapping[str, object]], together: int) -> list[int]:
    """Return the places of a small choice of `cases` that has every combination of `together` values in them.

    Greedy: the case with the most new combinations comes next, the first of equals. So the choice is the same in each
    run.
    """
    found_in = {place: set(combinations(sorted(_named(case)), together)) for place, case in enumerate(cases)}
    to_cover = set().union(*found_in.values())
    chosen = []
    while to_cover:
        best = max(found_in, key=lambda place: len(found_in[place] & to_cover))
        to_cover -= found_in.pop(best)
        chosen.append(best)
    return sorted(chosen)


def _named(case: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    return ((name, repr(value)) for name, value in case.items())


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return the tests that the markers `pairs` and `values` leave out.

    Raises ValueError for a marked test that has no combination to leave out, because it has too few parameters.
    """
    marked = defaultdict(list)
    for item in items:
        for marker in MARKERS:
            if item.get_closest_marker(marker):
                marked[item.nodeid.partition("[")[0], marker].append(item)
    return {item for (name, marker), group in marked.items() for item in _left_out(name, marker, group)}


def _left_out(name: str, marker: str, group: list[pytest.Item]) -> set[pytest.Item]:
    cases = [dict(item.callspec.params) for item in group]  # type: ignore[attr-defined]
    if len(cases[0]) <= MARKERS[marker]:
        raise ValueError(f"{name} is marked `{marker}` and has {len(cases[0])} parameters")
    chosen = set(covering(cases, MARKERS[marker]))
    return {item for place, item in enumerate(group) if place not in chosen}

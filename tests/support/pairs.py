"""Fewer combinations of a test's parameters, still with every pair of values.

A test over classes, schemes, releases and sizes has hundreds of combinations. A fault nearly always depends on one or
two of them, so a choice in which every pair of two parameters' values occurs finds it too (pairwise testing).
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pytest

__all__ = ["covering_pairs", "left_out"]

MARKER = "pairs"


def covering_pairs(cases: Sequence[Mapping[str, object]]) -> list[int]:
    """Return the places of a small choice of `cases` that has every pair of values that occurs in them.

    Greedy: the case with the most new pairs comes next, the first of equals. So the choice is the same in each run.
    """
    pairs_of = {place: set(combinations(sorted(_named(case)), 2)) for place, case in enumerate(cases)}
    to_cover = set().union(*pairs_of.values())
    chosen = []
    while to_cover:
        best = max(pairs_of, key=lambda place: len(pairs_of[place] & to_cover))
        to_cover -= pairs_of.pop(best)
        chosen.append(best)
    return sorted(chosen)


def _named(case: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    return ((name, repr(value)) for name, value in case.items())


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return the tests that the marker `pairs` leaves out.

    Raises ValueError for a marked test with fewer than three parameters: its pairs are all that it has.
    """
    marked = defaultdict(list)
    for item in items:
        if item.get_closest_marker(MARKER):
            marked[item.nodeid.partition("[")[0]].append(item)
    return {item for name, group in marked.items() for item in _left_out(name, group)}


def _left_out(name: str, group: list[pytest.Item]) -> set[pytest.Item]:
    cases = [dict(item.callspec.params) for item in group]  # type: ignore[attr-defined]
    if len(cases[0]) < 3:
        raise ValueError(f"{name} is marked `{MARKER}` and has fewer than three parameters")
    chosen = set(covering_pairs(cases))
    return {item for place, item in enumerate(group) if place not in chosen}

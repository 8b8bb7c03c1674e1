"""Tests marked `pairs` lose combinations of parameters, and no pair of values; those marked `values` no value."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
from fewer_combinations import MARKERS, covering, left_out
from hypothesis import given
from hypothesis import strategies as st

Cases = list[dict[str, int]]


def combined(cases: Cases, together: int) -> set[tuple[tuple[str, int], ...]]:
    return {found for case in cases for found in combinations(sorted(case.items()), together)}


@pytest.mark.parametrize("together", MARKERS.values())
@given(cases=st.lists(st.fixed_dictionaries({name: st.integers(0, 3) for name in "abc"}), max_size=40))
def test_every_value_and_every_pair_of_values_that_occurs_is_kept(together: int, cases: Cases) -> None:
    kept = covering(cases, together)

    assert combined([cases[place] for place in kept], together) == combined(cases, together)
    assert kept == sorted(set(kept))


def test_a_product_shrinks_to_its_longest_parameters() -> None:
    cases = [dict(zip("abc", values, strict=True)) for values in product(range(8), range(4), range(3))]

    assert 8 * 4 <= len(covering(cases, 2)) < len(cases) / 2
    assert len(covering(cases, 1)) == 8


@dataclass(frozen=True)
class Item:
    """What is read of a test that pytest has collected."""

    test: str
    values: tuple[int, ...]
    marker: str = "pairs"

    @property
    def nodeid(self) -> str:
        return f"tests/test_x.py::{self.test}[{'-'.join(map(str, self.values))}]"

    @property
    def callspec(self) -> Any:
        return SimpleNamespace(params=dict(zip("abc", self.values, strict=False)))

    def get_closest_marker(self, name: str) -> bool:
        return name == self.marker


def items(test: str, parameters: int, marker: str = "pairs") -> list[Any]:
    return [Item(test, values, marker) for values in product([0, 1], repeat=parameters)]


@pytest.mark.parametrize(("marker", "lost"), [("pairs", 4), ("values", 6)])
def test_only_marked_tests_lose_combinations(marker: str, lost: int) -> None:
    marked, plain = items("test_marked", 3, marker), items("test_plain", 3, "reference")

    without = left_out(marked + plain)

    assert len(without) == lost
    assert without < set(marked)


@pytest.mark.parametrize("marker", MARKERS)
def test_a_test_without_a_combination_to_leave_out_is_not_marked(marker: str) -> None:
    with pytest.raises(ValueError, match=rf"test_few.*`{marker}`.*{MARKERS[marker]} parameters"):
        left_out(items("test_few", MARKERS[marker], marker))

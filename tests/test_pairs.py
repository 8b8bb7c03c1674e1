"""Tests marked `pairs` lose combinations of parameters, and no pair of values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import covering_pairs, left_out

Cases = list[dict[str, int]]


def pairs(cases: Cases) -> set[tuple[tuple[str, int], ...]]:
    return {pair for case in cases for pair in combinations(sorted(case.items()), 2)}


@given(st.lists(st.fixed_dictionaries({name: st.integers(0, 3) for name in "abc"}), max_size=40))
def test_every_pair_of_values_that_occurs_is_kept(cases: Cases) -> None:
    kept = covering_pairs(cases)

    assert pairs([cases[place] for place in kept]) == pairs(cases)
    assert kept == sorted(set(kept))


def test_a_product_shrinks_to_the_two_longest_parameters() -> None:
    cases = [dict(zip("abc", values, strict=True)) for values in product(range(8), range(4), range(3))]

    assert 8 * 4 <= len(covering_pairs(cases)) < len(cases) / 2


@dataclass(frozen=True)
class Item:
    """What is read of a test that pytest has collected."""

    test: str
    values: tuple[int, ...]
    marked: bool = True

    @property
    def nodeid(self) -> str:
        return f"tests/test_x.py::{self.test}[{'-'.join(map(str, self.values))}]"

    @property
    def callspec(self) -> Any:
        return SimpleNamespace(params=dict(zip("abc", self.values, strict=False)))

    def get_closest_marker(self, name: str) -> bool:
        return self.marked and name == "pairs"


def items(test: str, parameters: int, **more: bool) -> list[Any]:
    return [Item(test, values, **more) for values in product([0, 1], repeat=parameters)]


def test_only_marked_tests_lose_combinations() -> None:
    marked, plain = items("test_marked", 3), items("test_plain", 3, marked=False)

    without = left_out(marked + plain)

    assert len(without) == 4
    assert without < set(marked)


def test_a_test_whose_pairs_are_all_that_it_has_is_not_marked() -> None:
    with pytest.raises(ValueError, match=r"test_two.*fewer than three parameters"):
        left_out(items("test_two", 2))

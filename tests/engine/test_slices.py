"""The slices that a mode holds: equal, whole multiples, with K/V heads and scales that engines repeat."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from trtllm_ct.engine.slices import Slices

EVERY_SIZE = tuple(range(1, 17))


def obstacle(slices: Slices, rows: int = 64, columns: int = 128, multiple: int = 1, **more: bool) -> str | None:
    return slices.obstacle("MODE", (rows, columns), multiple, **more)


def bounds(features: int, ranks: int) -> list[float]:
    """Where the slices of equal ranks begin, and where the last one ends."""
    return [rank * features / ranks for rank in range(ranks + 1)]


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, int]:
    """A tensor-parallel size, and an expert-parallel one that divides it."""
    expert = draw(st.integers(1, 4))
    return expert * draw(st.integers(1, 8)), expert


class TestRows:
    @settings(max_examples=300, deadline=None)
    @given(
        group=groups(),
        features=st.integers(0, 40).map(lambda count: 8 * count),
        multiple=st.sampled_from([1, 3, 8, 16, 64]),
        columns=st.booleans(),
    )
    def test_are_held_where_every_slice_begins_and_ends_at_a_multiple(
        self, group: tuple[int, int], features: int, multiple: int, columns: bool
    ) -> None:
        tensor, expert = group
        slices = Slices(columns=columns, tensor=tensor, expert=expert)
        # The axis that is not cut may have any length.
        shape = (7, features) if columns else (features, 7)

        held = slices.obstacle("MODE", shape, multiple) is None

        assert held is all(bound % multiple == 0 for bound in bounds(features, tensor // expert))

    @pytest.mark.parametrize(
        ("slices", "multiple", "words"),
        [
            (Slices(tensor=3), 1, "its 64 rows don't divide"),
            (Slices(tensor=4), 32, "each rank's 16 rows are no multiple of 32"),
            (Slices(tensor=3, columns=True), 1, "its 128 columns don't divide"),
            (Slices(tensor=4, columns=True), 64, "each rank's 32 columns are no multiple of 64"),
        ],
    )
    def test_the_obstacle_names_slices_and_size(self, slices: Slices, multiple: int, words: str) -> None:
        found = obstacle(slices, multiple=multiple)

        assert found is not None
        assert found.startswith(f"MODE at tensor parallel {slices.tensor}: {words}; ")

    def test_one_rank_needs_whole_multiples_too(self) -> None:
        assert obstacle(Slices(tensor=1), rows=64, multiple=64) is None
        assert "each rank's 64 rows are no multiple of 48" in (obstacle(Slices(tensor=1), multiple=48) or "")

    def test_a_weight_without_rows_has_empty_slices(self) -> None:
        assert obstacle(Slices(tensor=8), rows=0, multiple=16) is None


class TestExperts:
    @pytest.mark.parametrize(("expert", "slices"), [(1, 8), (2, 4), (4, 2), (8, 1)])
    def test_are_sliced_for_the_ranks_that_share_an_expert(self, expert: int, slices: int) -> None:
        of_experts = Slices(tensor=8, expert=expert)

        assert obstacle(of_experts, rows=16 * slices, multiple=16) is None
        assert obstacle(of_experts, rows=8 * slices, multiple=16) is not None

    def test_the_obstacle_says_how_many_have_other_experts(self) -> None:
        assert "MODE at tensor parallel 8, expert parallel 2: " in (obstacle(Slices(tensor=8, expert=2), rows=2) or "")


class TestParts:
    def test_each_part_is_sliced_for_itself(self) -> None:
        """128 rows are whole multiples for 4 ranks, but those of keys alone are not."""
        parts = Slices(tensor=4, parts=(64, 32, 32))

        assert obstacle(parts, rows=128, multiple=8) is None
        assert "each rank's 8 rows are no multiple of 16" in (obstacle(parts, rows=128, multiple=16) or "")

    @settings(max_examples=100, deadline=None)
    @given(
        parts=st.lists(st.integers(1, 32), min_size=1, max_size=3).map(tuple),
        tensor=st.integers(1, 6),
        multiple=st.integers(1, 4),
    )
    def test_parts_are_held_if_each_part_alone_is(self, parts: tuple[int, ...], tensor: int, multiple: int) -> None:
        joined = obstacle(Slices(tensor=tensor, parts=parts), rows=sum(parts), multiple=multiple)
        alone = [obstacle(Slices(tensor=tensor), rows=part, multiple=multiple) for part in parts]

        assert (joined is None) is all(each is None for each in alone)

    def test_columns_have_no_parts(self) -> None:
        assert obstacle(Slices(tensor=2, columns=True, parts=(3, 5)), columns=128) is None


class TestHeads:
    @pytest.mark.parametrize(("heads", "tensor"), [(8, 2), (8, 8), (2, 8), (1, 16), (1, 1)])
    def test_a_rank_has_whole_heads_at_least_one(self, heads: int, tensor: int) -> None:
        """If there are more ranks than heads, several ranks have the same head."""
        slices = Slices(tensor=tensor, heads=heads)

        assert obstacle(slices, rows=16 * heads, multiple=16) is None
        heads_per_rank = max(1, heads // tensor)
        assert f"each rank's {8 * heads_per_rank} rows are" in (
            obstacle(slices, rows=8 * heads, multiple=16 * heads_per_rank) or ""
        )

    @pytest.mark.parametrize("target_repeats", [True, False])
    @pytest.mark.parametrize("engine_repeats", [True, False])
    @pytest.mark.parametrize(("heads", "tensor"), [(2, 4), (1, 16)])
    def test_repeated_heads_need_repeated_scales(
        self, heads: int, tensor: int, target_repeats: bool, engine_repeats: bool
    ) -> None:
        slices = Slices(tensor=tensor, heads=heads, repeats_scales=target_repeats)

        found = obstacle(slices, scales_repeated=engine_repeats)

        assert (found is None) is (target_repeats or engine_repeats)
        words = f"engines repeat its {heads} K/V heads for ranks that outnumber them, but not their scales"
        assert found is None or words in found

    @pytest.mark.parametrize("heads", [4, 8, None])
    def test_nothing_is_repeated_if_there_are_enough_heads(self, heads: int | None) -> None:
        assert obstacle(Slices(tensor=4, heads=heads, repeats_scales=False), scales_repeated=False) is None


class TestSizes:
    """What the obstacle says about other sizes for the same model."""

    @pytest.mark.parametrize(
        ("sizes", "remedy"),
        [
            ((), "no size works"),
            ((5, 16), "no size works"),
            ((1, 5), "size 1 works"),
            ((1, 2, 4, 8), "sizes 1, 2, 4 work"),
        ],
    )
    def test_sizes_that_work_are_named(self, sizes: tuple[int, ...], remedy: str) -> None:
        found = obstacle(Slices(tensor=8, sizes=sizes), rows=64, multiple=16)

        assert found == f"MODE at tensor parallel 8: each rank's 8 rows are no multiple of 16; {remedy}"

    @settings(max_examples=200, deadline=None)
    @given(
        group=groups(),
        rows=st.integers(1, 40).map(lambda count: 4 * count),
        multiple=st.sampled_from([1, 4, 16]),
        heads=st.none() | st.integers(1, 4),
    )
    def test_exactly_the_sizes_that_work_are_named(
        self, group: tuple[int, int], rows: int, multiple: int, heads: int | None
    ) -> None:
        def at(tensor: int) -> str | None:
            own = Slices(tensor=tensor, expert=expert, heads=heads, repeats_scales=False, sizes=EVERY_SIZE)
            return obstacle(own, rows=rows, multiple=multiple, scales_repeated=False)

        tensor, expert = group
        found = at(tensor)
        assume(found is not None)

        remedy = (found or "").rpartition("; ")[2]
        named = remedy.removeprefix("sizes").removeprefix("size").removesuffix("works").removesuffix("work")
        said = [] if remedy == "no size works" else [int(size) for size in named.split(",")]
        assert said == [size for size in EVERY_SIZE if size % expert == 0 and at(size) is None]

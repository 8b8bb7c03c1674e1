"""Shards take never more than their room, each is fetched once if that is possible, and no unit waits for ever."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trtllm_ct.convert.stays import Need, Stay, plan_stays, room_for_once, smallest_room

FILES = "abcdefg"


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[list[Need], dict[str, int]]:
    """Sizes of shards, zero among them, and what the units need, which may be nothing."""
    sizes = {file: draw(st.integers(0, 9)) for file in FILES}
    sets = draw(st.lists(st.frozensets(st.sampled_from(FILES), max_size=4), max_size=12))
    return [Need(3 * number, files) for number, files in enumerate(sets)], sizes


class Run:
    """Units that begin in order, `workers` at a time, and end in any order, beside downloads that begin in order."""

    def __init__(self, needs: list[Need], stays: tuple[Stay, ...], workers: int) -> None:
        self.needs, self.stays, self.workers = needs, stays, workers
        self.waiting = [need.unit for need in needs]
        self.running: list[int] = []
        self.ended: set[int] = set()
        self.begun = 0
        self.most = 0

    def is_over(self, number: int) -> bool:
        return set(self.stays[number].units) <= self.ended

    def step(self, choice: int) -> bool:
        """Do one of the things that can happen now; False if nothing can."""
        while self.waiting and len(self.running) < self.workers:
            self.running.append(self.waiting.pop(0))
        able = [unit for unit in self.running if self.is_served(unit)]
        can_fetch = self.begun < len(self.stays) and all(map(self.is_over, self.stays[self.begun].after))
        if not able and not can_fetch:
            return False
        if can_fetch and (not able or choice % 2):
            self.begun += 1
        else:
            unit = able[choice % len(able)]
            self.running.remove(unit)
            self.ended.add(unit)
        here = [stay for number, stay in enumerate(self.stays[: self.begun]) if not self.is_over(number)]
        self.most = max(self.most, sum(stay.nbytes for stay in here))
        return True

    def is_served(self, unit: int) -> bool:
        """Whether all shards of a unit are here."""
        (files,) = (need.files for need in self.needs if need.unit == unit)
        return files == {stay.file for stay in self.stays[: self.begun] if unit in stay.units}


@given(checkpoint=checkpoints(), more=st.integers(0, 12), workers=st.integers(1, 4), choices=st.data())
def test_in_whatever_order_units_end_the_room_is_enough_and_nobody_waits_for_ever(
    checkpoint: tuple[list[Need], dict[str, int]], more: int, workers: int, choices: st.DataObject
) -> None:
    needs, sizes = checkpoint
    room = smallest_room(needs, sizes) + more
    run = Run(needs, plan_stays(needs, sizes, room), workers)

    while len(run.ended) < len(needs):
        assert run.step(choices.draw(st.integers(0, 7)))

    assert run.most <= room
    assert run.begun == len(run.stays)


@given(checkpoint=checkpoints(), more=st.integers(0, 12))
def test_each_shard_is_fetched_once_where_those_in_use_have_room(
    checkpoint: tuple[list[Need], dict[str, int]], more: int
) -> None:
    needs, sizes = checkpoint
    stays = plan_stays(needs, sizes, room_for_once(needs, sizes) + more)

    assert Counter(stay.file for stay in stays) == Counter(set().union(*(need.files for need in needs)))


@given(checkpoint=checkpoints())
def test_with_less_room_a_shard_is_fetched_again(checkpoint: tuple[list[Need], dict[str, int]]) -> None:
    needs, sizes = checkpoint
    less = room_for_once(needs, sizes) - 1
    assume(less >= smallest_room(needs, sizes))

    fetched = Counter(stay.file for stay in plan_stays(needs, sizes, less))

    assert max(fetched.values()) > 1


@given(sets=st.lists(st.frozensets(st.sampled_from("abcde"), max_size=3), max_size=8), more=st.integers(0, 2))
def test_with_shards_of_one_size_no_other_choice_fetches_fewer(sets: list[frozenset[str]], more: int) -> None:
    needs = [Need(number, files) for number, files in enumerate(sets)]
    sizes = dict.fromkeys("abcde", 1)
    room = smallest_room(needs, sizes) + more

    assert len(plan_stays(needs, sizes, room)) == fewest_downloads(sets, room)


def fewest_downloads(sets: list[frozenset[str]], room: int) -> int:
    """Try every choice of the shards that stay beside those that a unit needs."""
    fewest = {frozenset[str](): 0}
    for needed in sets:
        found: dict[frozenset[str], int] = {}
        for here, count in fewest.items():
            others = here - needed
            for number in range(min(len(others), room - len(needed)) + 1):
                for kept in map(frozenset, combinations(others, number)):
                    left = kept | needed
                    found[left] = min(found.get(left, 99), count + len(needed - here))
        fewest = found
    return min(fewest.values())


@given(checkpoint=checkpoints(), more=st.integers(0, 12))
def test_each_unit_is_served_each_of_its_shards_by_one_stay(
    checkpoint: tuple[list[Need], dict[str, int]], more: int
) -> None:
    needs, sizes = checkpoint
    stays = plan_stays(needs, sizes, smallest_room(needs, sizes) + more)

    served = Counter((unit, stay.file) for stay in stays for unit in stay.units)
    assert served == Counter((need.unit, file) for need in needs for file in need.files)
    assert all(number < place for place, stay in enumerate(stays) for number in stay.after)


def test_the_shard_that_is_needed_last_leaves_first() -> None:
    needs = [Need(number, frozenset(files)) for number, files in enumerate(["a", "b", "c", "a", "b"])]
    stays = plan_stays(needs, dict.fromkeys("abc", 1), 2)

    assert [(stay.file, stay.units, stay.after) for stay in stays] == [
        ("a", (0, 3), ()),
        ("b", (1,), ()),
        ("c", (2,), (1,)),
        ("b", (4,), (2,)),
    ]


@pytest.mark.parametrize(("files", "room"), [([], 0), (["", ""], 0), (["ab", "c"], 3), (["c"], 4)])
def test_the_smallest_room_is_that_of_the_unit_that_needs_most(files: list[str], room: int) -> None:
    needs = [Need(number, frozenset(names)) for number, names in enumerate(files)]

    assert smallest_room(needs, {"a": 1, "b": 2, "c": 3} if room < 4 else {"c": 4}) == room

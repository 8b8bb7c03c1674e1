"""Which shard of a checkpoint far away is on the disk when: decided before the first one is fetched, from sizes alone.

Units run in a known order, and each needs some shards. A shard stays from its download until the units that it serves
have ended. When the next one has no room, those leave first that no later unit needs, and then the one that is needed
last: with files of one size, no other choice fetches fewer bytes (Belady 1966, "A study of replacement algorithms for a
virtual-storage computer"). So a shard is fetched once if all those that are in use at a time have room.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = ["Need", "Stay", "plan_stays", "room_for_once", "smallest_room"]

_NEVER = 1 << 62
"""The position of the next use of a shard that no later unit needs: behind all others."""


@dataclass(frozen=True, slots=True)
class Need:
    """A unit, by its number, and the shards that it reads."""

    unit: int
    files: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """A shard of `nbytes` bytes from its download until all of `units` have ended.

    It may be fetched as soon as those before it in the sequence are being fetched, and those in `after`, by their
    places in the sequence, have ended.
    """

    file: str
    nbytes: int
    units: tuple[int, ...]
    after: tuple[int, ...]


def smallest_room(needs: Collection[Need], sizes: Mapping[str, int]) -> int:
    """Return the bytes of the unit that needs most."""
    return max((sum(sizes[file] for file in need.files) for need in needs), default=0)


def room_for_once(needs: Sequence[Need], sizes: Mapping[str, int]) -> int:
    """Return the smallest room with which each shard is fetched once: that of all shards in use at a time.

    A shard is in use from its first unit to its last one.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for position, need in enumerate(needs):
        for file in need.files:
            first.setdefault(file, position)
            last[file] = position
    changes: dict[int, int] = defaultdict(int)
    for file, position in first.items():
        changes[position] += sizes[file]
        changes[last[file] + 1] -= sizes[file]
    return max(accumulate(nbytes for _, nbytes in sorted(changes.items())), default=0)


def plan_stays(needs: Sequence[Need], sizes: Mapping[str, int], room: int) -> tuple[Stay, ...]:
    """Return the stays of shards, in the order in which they begin, for units that run in the order of `needs`.

    At no time, in whatever order units end, do they take more than `room` bytes together, which must be as many as
    `smallest_room`. Units that begin in order never wait for each other in a circle.
    """
    uses: dict[str, list[int]] = defaultdict(list)
    for position, need in enumerate(needs):
        for file in need.files:
            uses[file].append(position)
    planned = _Planned(uses, sizes, room)
    for position, need in enumerate(needs):
        for file in sorted(need.files):
            planned.bring(file, position, need.files)
        for file in need.files:
            planned.served[planned.here[file]].append(need.unit)
    return tuple(
        Stay(file=file, nbytes=sizes[file], units=tuple(units), after=after)
        for (file, after), units in zip(planned.begun, planned.served, strict=True)
    )


class _Planned:
    """The stays so far, and which shards are `here`, by the number of their stay."""

    def __init__(self, uses: Mapping[str, list[int]], sizes: Mapping[str, int], room: int) -> None:
        self._uses = uses
        self._sizes = sizes
        self._free = room
        self.here: dict[str, int] = {}
        self.begun: list[tuple[str, tuple[int, ...]]] = []
        self.served: list[list[int]] = []

    def bring(self, file: str, position: int, needed: frozenset[str]) -> None:
        """Let a shard begin a stay, unless it is here; those that are `needed` at this position don't leave."""
        if file in self.here:
            return
        after = []
        while self._free < self._sizes[file]:
            leaving = max(self.here.keys() - needed, key=lambda other: self._remoteness(other, position))
            self._free += self._sizes[leaving]
            after.append(self.here.pop(leaving))
        self._free -= self._sizes[file]
        self.here[file] = len(self.begun)
        self.begun.append((file, tuple(after)))
        self.served.append([])

    def _remoteness(self, file: str, position: int) -> tuple[int, int, str]:
        """Return what is largest for the shard that should leave: its next use, or how long ago its last one was."""
        uses = self._uses[file]
        later = bisect_right(uses, position)
        following = uses[later] if later < len(uses) else _NEVER
        return following, -uses[later - 1], file

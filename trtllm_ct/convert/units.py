"""Work units: modules that one worker converts together.

Units are small enough to keep many workers busy to the end, and large enough that handing them out costs nothing.
The parts of a joined Linear are never apart, since their scalars are compared with each other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.convert.direct import is_copied, is_direct
from trtllm_ct.pipeline.payload import looks_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.checkpoint.write_plan import WritePlan
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["Unit", "plan_units"]

UNIT_BYTES = 64 * 2**20
"""Delivered bytes after which a unit is closed."""

_LARGE = 2 * UNIT_BYTES
"""Bytes of a unit that has a turn of its own, before all others; it is one tensor, which is never taken apart."""

FILES_AT_ONCE = 8
"""Files of an output that are filled side by side: the kernel lets one thread at a time write into each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Modules by their positions in the plan, and what they deliver together.

    `needs_torch` says that some of it is neither copied nor converted by loops alone.
    """

    number: int
    modules: tuple[int, ...]
    nbytes: int
    needs_torch: bool


def plan_units(plan: Plan, write_plan: WritePlan, *, device: str = "cpu") -> tuple[Unit, ...]:
    """All modules of a plan that deliver anything, each in one unit; operations will run on `device`.

    Units that need no torch come first, and go on while it is imported, for which the second unit is one that does
    need it. Otherwise the order is that of the plan, dealt in turn to files of the output that are filled side by side.
    """
    groups: dict[str, list[int]] = {}
    for position, module in enumerate(plan.modules):
        groups.setdefault(module.fused_linear or module.name, []).append(position)
    without: list[tuple[int, ...]] = []
    with_torch: list[tuple[int, ...]] = []
    for group in groups.values():
        needs = any(_needs_torch(plan.modules[position], device) for position in group)
        (with_torch if needs else without).append(tuple(group))
    batches = [(modules, False) for modules in _in_turn(_batches(plan, without), plan, write_plan)]
    needing = [(modules, True) for modules in _in_turn(_batches(plan, with_torch), plan, write_plan)]
    batches[1:1] = needing[:1]
    batches += needing[1:]
    return tuple(
        Unit(number=number, modules=modules, nbytes=_nbytes(plan, modules), needs_torch=needs)
        for number, (modules, needs) in enumerate(batches)
    )


def _in_turn(batches: Iterable[tuple[int, ...]], plan: Plan, write_plan: WritePlan) -> list[tuple[int, ...]]:
    """Batches of `FILES_AT_ONCE` files by turns, so that all of them are full at about the same time; then the next.

    Batches of one large tensor come before all others.
    """
    number_of = {file.name: number for number, file in enumerate(write_plan.files)}
    by_file: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for batch in batches:
        first = plan.modules[batch[0]].deliveries[0].name
        by_file[number_of[write_plan.places[first].file]].append(batch)
    turns = sorted(
        (file // FILES_AT_ONCE, (place + 0.5) / len(own), file, batch)
        for file, own in by_file.items()
        for place, batch in enumerate(own)
    )
    # A large tensor that came last would keep one worker busy while all others have nothing left to do.
    return sorted((batch for _, _, _, batch in turns), key=lambda batch: -(_nbytes(plan, batch) // _LARGE))


def _needs_torch(module: ModulePlan, device: str) -> bool:
    """Whether operations of torch have a part in it."""
    if device == "cpu" and is_direct(module):
        return False
    return looks_at(module) or not all(is_copied(delivery, module) for delivery in module.deliveries)


def _batches(plan: Plan, groups: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Runs of groups of about `UNIT_BYTES`; what delivers nothing is left out."""
    batch: list[int] = []
    room = UNIT_BYTES
    for group in groups:
        delivering = [position for position in group if plan.modules[position].deliveries]
        batch += delivering
        room -= _nbytes(plan, delivering)
        if room <= 0:
            yield tuple(batch)
            batch, room = [], UNIT_BYTES
    if batch:
        yield tuple(batch)


def _nbytes(plan: Plan, modules: Iterable[int]) -> int:
    return sum(plan.modules[position].delivered_bytes for position in modules)

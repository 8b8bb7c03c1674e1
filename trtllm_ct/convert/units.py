"""Work units: modules that one worker converts together.

Units are small enough to keep many workers busy to the end, and large enough that the cost of submitting them does not
matter. The parts of a fused Linear are always in the same unit, because their scalars are compared with each other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.checkpoint.write_plan import WritePlan
    from trtllm_ct.plan.plan import Plan

__all__ = ["Unit", "plan_units"]

UNIT_BYTES = 64 * 2**20
"""Delivered bytes after which a unit is closed."""

_LARGE = 2 * UNIT_BYTES
"""Delivered bytes from which a unit is moved before all others; such a unit holds one large tensor."""

FILES_AT_ONCE = 8
"""Output files that are filled at the same time: the kernel lets only one thread at a time write into a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Modules, by their positions in the plan, and the number of bytes that they deliver together."""

    number: int
    modules: tuple[int, ...]
    nbytes: int


def plan_units(plan: Plan, write_plan: WritePlan, shard_of: Mapping[str, str] | None = None) -> tuple[Unit, ...]:
    """Group all modules of a plan that deliver anything into units.

    Each module is in exactly one unit. Units follow the order of the plan, interleaved over `FILES_AT_ONCE` output
    files that are filled at the same time. With `shard_of`, the source file of each stored tensor, they follow the
    source files instead, and all modules of a unit read the same ones.
    """
    groups: dict[str, list[int]] = {}
    for position, module in enumerate(plan.modules):
        groups.setdefault(module.fused_linear or module.name, []).append(position)
    if shard_of is None:
        batches = _interleave(_batches(plan, groups.values()), plan, write_plan)
    else:
        batches = _by_shards(groups.values(), plan, shard_of)
    return tuple(
        Unit(number=number, modules=modules, nbytes=_nbytes(plan, modules)) for number, modules in enumerate(batches)
    )


def _interleave(batches: Iterable[tuple[int, ...]], plan: Plan, write_plan: WritePlan) -> list[tuple[int, ...]]:
    """Order batches so that `FILES_AT_ONCE` output files fill up evenly, then the next `FILES_AT_ONCE`, and so on.

    Batches of at least `_LARGE` bytes come before all others, larger ones first.
    """
    file_numbers = {file.name: number for number, file in enumerate(write_plan.files)}
    batches_by_file: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for batch in batches:
        first_tensor = plan.modules[batch[0]].deliveries[0].name
        batches_by_file[file_numbers[write_plan.places[first_tensor].file]].append(batch)
    interleaved = sorted(
        (file // FILES_AT_ONCE, (position + 0.5) / len(file_batches), file, batch)
        for file, file_batches in batches_by_file.items()
        for position, batch in enumerate(file_batches)
    )
    # A large tensor at the end would keep one worker busy while all others have nothing left to do.
    return sorted((batch for _, _, _, batch in interleaved), key=lambda batch: -(_nbytes(plan, batch) // _LARGE))


def _by_shards(groups: Iterable[list[int]], plan: Plan, shard_of: Mapping[str, str]) -> list[tuple[int, ...]]:
    """Return batches of groups that read the same source files, in the order of these."""
    by_files: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for group in groups:
        read = {shard_of[name] for position in group for name in _read_for_delivery(plan, position)}
        by_files[tuple(sorted(read))].append(group)
    return [batch for files in sorted(by_files) for batch in _batches(plan, by_files[files])]


def _read_for_delivery(plan: Plan, position: int) -> tuple[str, ...]:
    module = plan.modules[position]
    return module.reads if module.deliveries else ()


def _batches(plan: Plan, groups: Iterable[Iterable[int]]) -> Iterator[tuple[int, ...]]:
    """Combine consecutive groups into batches of about `UNIT_BYTES`; modules that deliver nothing are left out."""
    batch: list[int] = []
    remaining = UNIT_BYTES
    for group in groups:
        delivering = [position for position in group if plan.modules[position].deliveries]
        batch += delivering
        remaining -= _nbytes(plan, delivering)
        if remaining <= 0:
            yield tuple(batch)
            batch, remaining = [], UNIT_BYTES
    if batch:
        yield tuple(batch)


def _nbytes(plan: Plan, modules: Iterable[int]) -> int:
    return sum(plan.modules[position].delivered_bytes for position in modules)

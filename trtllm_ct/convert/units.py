"""Work units: modules that one worker converts together.

Units are small enough to keep many workers busy to the end, and large enough that the cost of submitting them does not
matter. The parts of a fused Linear are always in the same unit, because their scalars are compared with each other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.convert.direct import is_copied, is_direct
from trtllm_ct.pipeline.payload import has_values_to_check

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.checkpoint.write_plan import WritePlan
    from trtllm_ct.plan.plan import ModulePlan, Plan

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


def plan_units(plan: Plan, write_plan: WritePlan, *, device: str = "cpu") -> tuple[Unit, ...]:
    """Group all modules of a plan that deliver anything into units; operations will run on `device`.

    Each module is in exactly one unit. A unit needs torch when some of its tensors are neither copied nor converted by
    compiled loops alone. Units that don't need torch come first, except that the second unit is one that needs torch:
    it starts the import, and the units without torch are converted in the meantime. Otherwise units follow the order of
    the plan, interleaved over `FILES_AT_ONCE` output files that are filled at the same time.
    """
    groups: dict[str, list[int]] = {}
    for position, module in enumerate(plan.modules):
        groups.setdefault(module.fused_linear or module.name, []).append(position)
    groups_without_torch: list[tuple[int, ...]] = []
    groups_with_torch: list[tuple[int, ...]] = []
    for group in groups.values():
        needs_torch = any(_needs_torch(plan.modules[position], device) for position in group)
        (groups_with_torch if needs_torch else groups_without_torch).append(tuple(group))
    batches = _interleave(_batches(plan, groups_without_torch), plan, write_plan)
    torch_batches = _interleave(_batches(plan, groups_with_torch), plan, write_plan)
    batches[1:1] = torch_batches[:1]
    batches += torch_batches[1:]
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


def _needs_torch(module: ModulePlan, device: str) -> bool:
    """Whether checking or converting a module runs torch operations."""
    if module.pieces:
        return any(_needs_torch(piece, device) for piece in module.pieces)
    if device == "cpu" and is_direct(module):
        return False
    return has_values_to_check(module) or not all(is_copied(delivery, module) for delivery in module.deliveries)


def _batches(plan: Plan, groups: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
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

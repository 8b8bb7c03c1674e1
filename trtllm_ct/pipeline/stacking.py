"""`stack_experts`: puts plain experts into the stacked tensors that the model's class reads, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.checkpoint.write_plan import StackPart

__all__ = ["stack_experts"]


def stack_experts(weights: dict[str, StoredArray], stacks: Mapping[str, StackPart]) -> None:
    """Replace the matrices and vectors of experts in `weights` by the stacked tensors that they belong to.

    `stacks` has the place of each matrix by name, see `Plan.stacks`; other tensors stay as they are. Matrices that are
    not in `weights` belong to experts of other ranks: their entries keep whatever the memory held, as no rank reads the
    entry of another one. A stack without any matrix in `weights` is left out.
    Memory: one stack at a time in addition to `weights`.
    """
    members: dict[str, list[str]] = {}
    for name, part in stacks.items():
        if name in weights:
            members.setdefault(part.stack, []).append(name)
    for stack, names in members.items():
        first = weights[names[0]]
        stacked = empty(stacks[names[0]].stack_spec(first.spec).shape, first.dtype)
        for name in names:
            place, rows = stacks[name], weights.pop(name).elements
            entry = stacked[place.entry]
            lines = entry.T if place.transposed else entry
            lines[place.lines_of(0, len(rows))] = rows
        weights[stack] = StoredArray(stacked, first.dtype)

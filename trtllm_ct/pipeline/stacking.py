"""`stack_experts`: puts plain experts into the stacked tensors that the model's class reads, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.checkpoint.write_plan import StackPart

__all__ = ["stack_experts"]


def stack_experts(weights: dict[str, Tensor], stacks: Mapping[str, StackPart]) -> None:
    """Replace the matrices [N, K] of experts in `weights` by the stacked tensors [experts, K, columns] they belong to.

    `stacks` has the place of each matrix by name, see `Plan.stacks`; other tensors stay as they are. Matrices that are
    not in `weights` belong to experts of other ranks: their entries keep whatever the memory held, as no rank reads the
    entry of another one. A stack without any matrix in `weights` is left out.
    Memory: one stack at a time in addition to `weights`.
    """
    import torch

    members: dict[str, list[str]] = {}
    for name, part in stacks.items():
        if name in weights:
            members.setdefault(part.stack, []).append(name)
    for stack, names in members.items():
        part, first = stacks[names[0]], weights[names[0]]
        stacked = torch.empty((part.entries, first.shape[1], part.columns), dtype=first.dtype)
        for name in names:
            place, matrix = stacks[name], weights.pop(name)
            stacked[place.entry, :, place.column : place.column + matrix.shape[0]] = matrix.T
        weights[stack] = stacked

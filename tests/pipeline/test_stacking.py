"""Matrices of experts become one tensor per layer and projection, with the columns of each in their place."""

from __future__ import annotations

import torch
from on_tensors import stack_experts

from trtllm_ct.checkpoint.write_plan import StackPart


def part(stack: str, entry: int, column: int = 0, columns: int = 3) -> StackPart:
    return StackPart(stack=stack, entry=entry, entries=2, line=column, lines=columns)


def test_each_matrix_is_transposed_into_its_entry_and_columns() -> None:
    gate, up, norm = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.ones(1)
    stacks = {
        f"{expert}.{name}": part("both", expert, at) for expert in (0, 1) for name, at in (("gate", 0), ("up", 1))
    }
    weights = {"0.gate": gate, "0.up": up, "1.gate": -gate, "1.up": -up, "norm": norm}

    stack_experts(weights, stacks)

    assert weights.keys() == {"both", "norm"}
    assert weights["norm"] is norm
    assert weights["both"][0].tolist() == [[1, 3, 5], [2, 4, 6]]
    assert torch.equal(weights["both"][1], -weights["both"][0])


def test_a_rank_gets_the_entries_of_its_own_experts_at_their_numbers() -> None:
    stacks = {f"{expert}.{layer}": part(layer, expert) for expert in (0, 1) for layer in ("here", "elsewhere")}
    weights = {"1.here": torch.full((3, 2), 7.0)}

    stack_experts(weights, stacks)

    assert weights.keys() == {"here"}
    assert tuple(weights["here"].shape) == (2, 2, 3)
    assert weights["here"][1].unique().tolist() == [7]


def test_without_stacks_nothing_changes() -> None:
    weights = {"a": torch.ones(2, 2)}

    stack_experts(weights, {})

    assert weights.keys() == {"a"}

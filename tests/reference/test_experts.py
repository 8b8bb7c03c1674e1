from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trtllm_ct.reference.experts import ReferenceExpert, ReferenceExperts, replaceable


class Stack(nn.Module):
    """An experts module with the flags that the decorator of transformers sets."""

    def __init__(self, **flags: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2, 6, 4))
        self.down_proj = nn.Parameter(torch.empty(2, 4, 3))
        default_flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
        for name, flag in (default_flags | flags).items():
            setattr(self, name, flag)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate + 10 * up


def expert(gate: float, up: float, down: float, dtype: torch.dtype = torch.float32) -> ReferenceExpert:
    """An expert of one channel whose Linears multiply by the given numbers."""
    linears = {}
    for name, factor in {"w1": gate, "w3": up, "w2": down}.items():
        linears[name] = nn.Linear(1, 1, bias=False, dtype=dtype)
        linears[name].weight = nn.Parameter(torch.full((1, 1), factor, dtype=dtype))
    return ReferenceExpert(linears)


def test_tokens_get_the_weighted_sum_of_their_experts() -> None:
    """An expert multiplies its input by (gate + 10 * up) * down: 42 and 66 here. The third expert is never chosen."""
    experts = ReferenceExperts([expert(1, 2, 2), expert(3, 3, 2), expert(9, 9, 9)], replaced=Stack())
    states, index = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0, 1], [1, 0]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0]])

    mixed = experts(states, index, weights)

    assert mixed.tolist() == [[42 * 0.5 + 66 * 0.25], [-2 * 66.0]]


def test_sums_are_as_wide_as_the_routing_weights() -> None:
    """257 is not a bfloat16 number: with rounding after each expert, the sum would stay at 256."""
    experts = ReferenceExperts([expert(1, 0, 1, torch.bfloat16) for _ in range(3)], replaced=Stack())
    states, index = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]])

    mixed = experts(states, index, torch.tensor([[256.0, 1.0, 1.0]]))

    assert (mixed.dtype, mixed.item()) == (torch.bfloat16, 258.0)


def test_names_of_the_checkpoint_stay() -> None:
    experts = ReferenceExperts([expert(1, 1, 1)], replaced=Stack())

    assert list(experts.state_dict()) == ["0.w1.weight", "0.w3.weight", "0.w2.weight"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, True),
        ({"has_post_expert_norm": False}, True),
        ({"has_gate": False}, False),
        ({"has_bias": True}, False),
        ({"is_transposed": True}, False),
        ({"is_concatenated": False}, False),
        ({"has_post_expert_norm": True}, False),
        ({"down_proj": None}, False),
        ({"down_proj": nn.Parameter(torch.empty(4, 3))}, False),
    ],
)
def test_only_experts_of_gate_up_and_down_are_replaced(flags: dict[str, Any], expected: bool) -> None:
    assert replaceable(Stack(**flags)) == expected

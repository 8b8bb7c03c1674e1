"""Routed experts that compute from the tensors of each expert, in place of transformers' one module for all of them.

transformers 5 stacks the weights of a layer's experts into two parameters of three axes; the engine is given every
expert's own tensors, quantized or not. Routing stays transformers' own, and so does what lies between the Linears of
an expert: only where the products come from changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["SPELLINGS", "ReferenceExpert", "ReferenceExperts", "is_stack_of_experts", "replaceable"]

SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints call the Linears of an expert: gate, up, down."""

# What transformers declares of an experts module (`integrations/moe.py`, `use_experts_implementation`), and what each
# must be for down(gated(gate, up)) to be the whole of an expert. An older release that lacks one has no such case.
_DECLARED = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts: a parameter of three axes that projects down."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def replaceable(module: nn.Module) -> bool:
    """Whether `ReferenceExperts` computes the same as this module of transformers."""
    declared = all(getattr(module, flag, wanted) is wanted for flag, wanted in _DECLARED.items())
    return is_stack_of_experts(module) and hasattr(module, "_apply_gate") and declared


class ReferenceExpert(nn.Module):
    """One expert: Linears for gate, up and down, in this order, under the names that the checkpoint gives them."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor, apply_gate: Callable[[Tensor], Tensor]) -> Tensor:
        """[tokens, H] -> [tokens, H]; `apply_gate` makes [tokens, I] of the two halves gate and up [tokens, 2 I]."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        output: Tensor = down(apply_gate(torch.cat((gate(x), up(x)), dim=-1)))
        return output


class ReferenceExperts(nn.ModuleList):
    """The experts of one layer, called as transformers calls its own; `replaced` is the module that they stand for."""

    def __init__(self, experts: Iterable[ReferenceExpert], *, replaced: nn.Module) -> None:
        super().__init__(experts)
        self._apply_gate = replaced._apply_gate  # noqa: SLF001 - what transformers hands to an implementation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix the outputs of the experts that were chosen for each token.

        `hidden_states` [tokens, H]; `top_k_index` and `top_k_weights` [tokens, k]. Sums are in the wider dtype of
        states and weights, the result is in that of the states.
        """
        wide = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        total = torch.zeros_like(hidden_states, dtype=wide)
        for index in torch.unique(top_k_index).tolist():
            tokens, choice = torch.where(top_k_index == index)
            output = self[index](hidden_states[tokens], self._apply_gate)
            total.index_add_(0, tokens, output * top_k_weights[tokens, choice, None])
        return total.to(hidden_states.dtype)

"""Routed experts that compute from the tensors of each single expert.

transformers 5 stacks the weights of a layer's experts into two 3-D parameters of one module. An engine is given the
tensors of each expert separately, quantized or not. `ReferenceExperts` replaces the module of transformers. Routing and
the gated activation between the Linears of an expert stay transformers' own code; only the Linears are replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["SPELLINGS", "ReferenceExpert", "ReferenceExperts", "is_stack_of_experts", "replaceable"]

SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The names that checkpoints give to the Linears of an expert, in the order gate, up, down."""

# The flags that transformers declares on an experts module (`integrations/moe.py`, `use_experts_implementation`), with
# the values for which an expert is exactly down(gated(gate, up)). An older release without one of these flags has no
# experts of another value.
_REQUIRED_FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of several experts: its `down_proj` is a 3-D parameter."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def replaceable(module: nn.Module) -> bool:
    """Whether `ReferenceExperts` can replace this module of transformers and compute the same."""
    has_required_flags = all(getattr(module, flag, value) is value for flag, value in _REQUIRED_FLAGS.items())
    return is_stack_of_experts(module) and hasattr(module, "_apply_gate") and has_required_flags


class ReferenceExpert(nn.Module):
    """One expert. `linears` are its gate, up and down Linears, in this order, by the names in the checkpoint."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor, apply_gate: Callable[[Tensor], Tensor]) -> Tensor:
        """[tokens, H] -> [tokens, H]; `apply_gate` maps gate and up, concatenated to [tokens, 2 I], to [tokens, I]."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        output: Tensor = down(apply_gate(torch.cat((gate(x), up(x)), dim=-1)))
        return output


class ReferenceExperts(nn.ModuleList):
    """The experts of one layer, with the call signature of transformers' experts module `replaced`."""

    def __init__(self, experts: Iterable[ReferenceExpert], *, replaced: nn.Module) -> None:
        super().__init__(experts)
        self._apply_gate = replaced._apply_gate  # noqa: SLF001 - transformers passes it to implementations too

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the outputs of the experts that were chosen for each token.

        `hidden_states` is [tokens, H]; `top_k_index` and `top_k_weights` are [tokens, k]. Sums are taken in the wider
        of the dtypes of states and weights; the result has the dtype of the states.
        """
        wide = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        total = torch.zeros_like(hidden_states, dtype=wide)
        for index in torch.unique(top_k_index).tolist():
            tokens, choice = torch.where(top_k_index == index)
            output = self[index](hidden_states[tokens], self._apply_gate)
            total.index_add_(0, tokens, output * top_k_weights[tokens, choice, None])
        return total.to(hidden_states.dtype)

"""Routed experts that compute from the tensors of each single expert.

An engine is given the tensors of each expert separately, quantized or not. transformers 5 stacks the weights of a
layer's experts into two 3-D parameters of one module; `ReferenceExperts` replaces this module. transformers 4 has a
list of experts with three Linears each, whose Linears are replaced one by one. Either is an `ExpertsShell`. Routing and
the gated activation between the Linears of an expert stay transformers' own code; only the Linears are replaced.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "SPELLINGS",
    "ExpertList",
    "ExpertStack",
    "ExpertsShell",
    "ReferenceExpert",
    "ReferenceExperts",
    "experts_shell",
    "is_stack_of_experts",
    "replaceable",
]

SPELLINGS: tuple[tuple[str, ...], ...] = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The names that checkpoints give to the Linears of an expert, in the order gate, up, down."""

_WITHOUT_GATE = (("up_proj", "down_proj"),)
_STACKS = ("gate_up_proj", "down_proj")

# The flags that transformers declares on an experts module (`integrations/moe.py`, `use_experts_implementation`), with
# the values for which an expert is exactly down(gated(gate, up)), or down(act(up)) without a gate. An older release
# without one of these flags has no experts of another value.
_REQUIRED_FLAGS = {
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


# Llama 4 gives its experts the tokens of each expert behind each other, and routes around them: transformers 5.23
# `modeling_llama4.py` (`Llama4TextMoe`). Its stacks are [E, in, out].
_GIVEN_THEIR_TOKENS = frozenset({"Llama4TextExperts"})


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of several experts: its `down_proj` is a 3-D parameter."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def replaceable(module: nn.Module) -> bool:
    """Whether `ReferenceExperts` can replace this module of transformers and compute the same."""
    has_required_flags = all(getattr(module, flag, value) is value for flag, value in _REQUIRED_FLAGS.items())
    activation = "_apply_gate" if _has_gate(module) else "act_fn"
    return is_stack_of_experts(module) and hasattr(module, activation) and has_required_flags


def _has_gate(module: nn.Module) -> bool:
    """Whether the experts of transformers' module have a gate."""
    return bool(getattr(module, "has_gate", True))


class ExpertsShell(Protocol):
    """The experts module of one layer in a model of transformers, without weights.

    `module` is the module, `count` the number of its experts. `down_shape` is the shape [H, I] of an expert's down
    projection. `spellings` are the names that the Linears of its experts may have, and `stacks` those of the parameters
    that hold them all.
    """

    module: nn.Module
    count: int
    down_shape: tuple[int, int]
    spellings: tuple[tuple[str, ...], ...] = SPELLINGS
    stacks: tuple[str, ...] = _STACKS

    def rebuilt(self, experts: Sequence[Mapping[str, nn.Module]]) -> nn.Module:
        """Return the module of experts with these Linears: gate, up and down, in this order, by delivered names."""


class ExpertStack:
    """Experts in two 3-D parameters, as in transformers 5."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        gated = _has_gate(module)
        self.spellings: tuple[tuple[str, ...], ...] = SPELLINGS if gated else _WITHOUT_GATE
        self.stacks: tuple[str, ...] = _STACKS if gated else _WITHOUT_GATE[0]
        self.count, *down = module.get_parameter("down_proj").shape
        self.down_shape = (down[0], down[1])

    def rebuilt(self, experts: Sequence[Mapping[str, nn.Module]]) -> nn.Module:
        """Return `ReferenceExperts` of these Linears."""
        return ReferenceExperts([ReferenceExpert(linears) for linears in experts], replaced=self.module)


class ExpertStackOfTokens(ExpertStack):
    """Experts in two 3-D parameters [E, in, out] that get their own tokens."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.down_shape = self.down_shape[::-1]

    def rebuilt(self, experts: Sequence[Mapping[str, nn.Module]]) -> nn.Module:
        """Return `ReferenceExpertsOfTokens` of these Linears."""
        return ReferenceExpertsOfTokens([ReferenceExpert(linears) for linears in experts], replaced=self.module)


class ExpertList:
    """A list of experts with three Linears each, as in transformers 4."""

    spellings: tuple[tuple[str, ...], ...] = SPELLINGS
    stacks: tuple[str, ...] = _STACKS

    def __init__(self, module: nn.ModuleList) -> None:
        self.module: nn.Module = module
        self.count = len(module)
        self._template = module[0]
        self._names = _linear_names(self._template)
        rows, columns = self._template.get_parameter(f"{self._names[-1]}.weight").shape
        self.down_shape = (rows, columns)

    def rebuilt(self, experts: Sequence[Mapping[str, nn.Module]]) -> nn.Module:
        """Return a list of transformers' experts with these Linears, called as the model calls them."""
        return nn.ModuleList(self._expert(tuple(linears.values())) for linears in experts)

    def _expert(self, linears: tuple[nn.Module, ...]) -> nn.Module:
        expert = copy.deepcopy(self._template)
        for name, linear in zip(self._names, linears, strict=True):
            expert.set_submodule(name, linear)
        return expert


def experts_shell(module: nn.Module) -> ExpertsShell | None:
    """Return the shell of an experts module; None for a module that is none, or that `rebuilt` can't replace."""
    if isinstance(module, nn.ModuleList) and len(module) and all(_linear_names(expert) for expert in module):
        return ExpertList(module)
    if type(module).__name__ in _GIVEN_THEIR_TOKENS:
        return ExpertStackOfTokens(module)
    return ExpertStack(module) if replaceable(module) else None


def _linear_names(expert: nn.Module) -> tuple[str, ...]:
    """The names of gate, up and down of an expert that has these Linears, without bias, and no other parameter."""
    linears = {name for name, child in expert.named_children() if type(child) is nn.Linear and child.bias is None}
    owners = {name.rpartition(".")[0] for name, _ in expert.named_parameters()}
    return next((spelling for spelling in SPELLINGS if owners == set(spelling) == linears), ())


class ReferenceExpert(nn.Module):
    """One expert. `linears` are its gate, up and down Linears, in this order, by the names in the checkpoint.

    The gate may be missing.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """[tokens, H] -> [tokens, H]; `activate` maps gate and up, concatenated to [tokens, 2 I], to [tokens, I].

        Without a gate it maps [tokens, I] to [tokens, I].
        """
        *inner, down = (self.get_submodule(name) for name in self._names)
        output: Tensor = down(activate(torch.cat([linear(x) for linear in inner], dim=-1)))
        return output


class ReferenceExperts(nn.ModuleList):
    """The experts of one layer, with the call signature of transformers' experts module `replaced`."""

    def __init__(self, experts: Iterable[ReferenceExpert], *, replaced: nn.Module) -> None:
        super().__init__(experts)
        # transformers passes it to implementations too.
        self._activate = replaced._apply_gate if _has_gate(replaced) else replaced.act_fn  # noqa: SLF001

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the outputs of the experts that were chosen for each token.

        `hidden_states` is [tokens, H]; `top_k_index` and `top_k_weights` are [tokens, k]. Sums are taken in the wider
        of the dtypes of states and weights; the result has the dtype of the states.
        """
        wide = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        total = torch.zeros_like(hidden_states, dtype=wide)
        for index in torch.unique(top_k_index).tolist():
            tokens, choice = torch.where(top_k_index == index)
            output = self[index](hidden_states[tokens], self._activate)
            total.index_add_(0, tokens, output * top_k_weights[tokens, choice, None])
        return total.to(hidden_states.dtype)


class ReferenceExpertsOfTokens(nn.Module):
    """The experts of one layer, each of which gets its own tokens; the call signature is that of `replaced`."""

    def __init__(self, experts: Iterable[ReferenceExpert], *, replaced: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.act_fn = replaced.get_submodule("act_fn")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[E * tokens, H] -> [E * tokens, H]: the same number of tokens for each expert, one expert behind another."""
        parts = hidden_states.chunk(len(self.experts))
        outputs = [expert(part, self._activate) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.cat(outputs)

    def _activate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: Tensor = up * self.act_fn(gate)
        return activated

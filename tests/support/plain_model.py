"""The truth that logits are held to: a plain transformers model in float32, or the golden answers of a checkpoint.

For tests marked `reference`: transformers is imported when `plain_logits` is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fused_experts import fuse_experts
from installed_transformers import has_newest_transformers, in_dtype, typed_config
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Golden", "deviation", "golden_of", "plain_logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """What `golden.npz` of a real checkpoint holds: logits [8, vocabulary] at the prompt's end, and greedy tokens."""

    prompt: list[int]
    logits: Tensor
    greedy: list[int]

    def error(self, logits: Tensor) -> float:
        """Of logits [tokens, vocabulary] for the prompt; see `deviation`."""
        return deviation(logits[-len(self.logits) :], self.logits)


def golden_of(directory: Path) -> Golden:
    """The golden answers of one of the real checkpoints."""
    import numpy as np

    with np.load(directory / "golden.npz") as file:
        return Golden(
            prompt=file["prompt"].tolist(), logits=torch.from_numpy(file["logits"]), greedy=file["greedy"].tolist()
        )


def deviation(found: Tensor, want: Tensor) -> float:
    """The largest difference, in standard deviations of what is wanted; NaN when there is one."""
    return float((found - want).abs().max() / want.std())


def plain_logits(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokens: Sequence[int],
    inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """Logits [tokens, vocabulary] of a model of config.json `config` with these weights, all in float32.

    Experts are given one by one, as files have them; transformers 5 has those of a layer in one tensor.
    `inputs` change what some modules, by full name, are given.
    """
    from transformers import AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    model: Any = AutoModelForCausalLM.from_config(typed_config(**settings), **in_dtype(torch.float32)).eval()
    loaded = {name: tensor.float() for name, tensor in weights.items()}
    if has_newest_transformers():
        fuse_experts(loaded)
    model.load_state_dict(loaded)
    for name, change in (inputs or {}).items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, change=change: (change(args[0]),))
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits

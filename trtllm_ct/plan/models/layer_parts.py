"""`Part`: what a layer of a class has together; the parts of each class are in its row.

Rows that don't list the modules of a layer with their sizes (`Leaves`) name its parts here. A layer may be of one of
several kinds, so a row gives the choice: attention or linear attention, an MLP or experts. Which one a layer is, its
own tensors tell.
Source of names: transformers 5.23 `models/*/modeling_*.py`, except where a row says otherwise; a test compares the
parts with the models that transformers builds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ATTENTION_BIASES",
    "DENSE_MLP",
    "FINAL_NORM",
    "HEAD_NORM_NAMES",
    "NOTHING",
    "QKVO",
    "TWO_NORMS",
    "Part",
    "biases",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors that a layer has together, by their names in the layer.

    `modules` have a weight, and `tensors` are any others. `when` are the tensors that it has if a key of config.json is
    set to anything but false, null or zero. `experts` are the projections that each routed expert has, as positions in
    (gate, up, down), and `expert_locals` what each of them has. With `key`, only models for which config.json sets that
    key have the part. A name may be several, divided by `|`, if writers have used each of them.
    """

    modules: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: tuple[int, ...] = ()
    expert_locals: tuple[str, ...] = ("weight",)
    key: str = ""

    def names(self, config: Mapping[str, object]) -> tuple[str, ...]:
        """Return the names of all tensors beside those of experts; `config` is that of the text model."""
        if self.key and not config.get(self.key):
            return ()
        stated = (name for key, names in self.when.items() if config.get(key) for name in names)
        return (*(f"{module}.weight" for module in self.modules), *self.tensors, *stated)


def biases(*modules: str) -> tuple[str, ...]:
    """Return the names of the biases of modules."""
    return tuple(f"{module}.bias" for module in modules)


NOTHING = Part()
"""In a choice: some layers have none of its parts."""

FINAL_NORM = Part(modules=("norm",))
"""What a body has after its layers in most classes."""

QKVO = tuple(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"))
"""The Linears of attention with separate queries, keys and values."""

ATTENTION_BIASES: Mapping[str, tuple[str, ...]] = {"attention_bias": biases(*QKVO)}
"""The biases of attention in most classes."""

HEAD_NORM_NAMES = ("self_attn.q_norm", "self_attn.k_norm")
"""The norms of single heads."""

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
"""The norms of the inputs of attention and MLP."""

DENSE_MLP = Part(modules=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
"""A gated MLP."""

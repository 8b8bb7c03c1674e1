"""`Site`: one module of a model, with all that planning must know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.engine.parallel import Cut

if TYPE_CHECKING:
    from trtllm_ct.plan.models.class_row import Limit

__all__ = ["Site"]


class Site(NamedTuple):
    """One module that a model has.

    `shape` is the shape of its weight, () if only the format of its codes shows it; `locals` are the local names of its
    parameters beside the weight.
    `mode_group` names the group whose members must get the same mode. `fused` says whether the engine fuses the group
    into one Linear, which then reads no `pre_quant_scale`. `shares` names the fused Linear, or the gate and up part of
    an expert, whose members must have equal scalars.
    Engines never read a `plain` module quantized. `expert` marks routed experts and `head` the head, which have fewer
    modes.
    `aliases` are other names under which writers have stored the module.
    `cut` says how ranks divide the weight. `heads` is the number of K/V heads if they divide it by heads. `parts` are
    the rows of each Linear if several are stored in one weight, each of which is divided for itself; with `class_cuts`
    the engine's model class divides them, and with `class_joins` it joins the group into one Linear, see `ClassRow`.
    `attention` marks modules of attention, which attention data parallelism does not divide. With `ranks_vary` the
    engine may give a rank another slice than the one that its number suggests. `limit` restricts the modes that the
    engine's model class can read the module in; None if it reads all. `early` is as in `ClassRow`.
    """

    module: str
    class_name: str
    shape: tuple[int, ...]
    mode_group: str | None = None
    fused: bool = False
    shares: str | None = None
    plain: bool = False
    expert: bool = False
    head: bool = False
    locals: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    cut: Cut = Cut.NONE
    heads: int | None = None
    parts: tuple[int, ...] = ()
    attention: bool = False
    ranks_vary: bool = False
    class_cuts: bool = False
    class_joins: bool = False
    limit: Limit | None = None
    early: bool = False

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The names that the module may have in the files.

        They are its name, its name with `base_layer` appended, which LoRA wrappers use, and its aliases.
        """
        return (self.module, f"{self.module}.base_layer", *self.aliases)

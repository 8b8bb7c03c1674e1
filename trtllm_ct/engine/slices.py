"""Which slice of a weight each rank of a tensor-parallel group gets, and whether a mode's kernel takes it.

Engines cut every Linear themselves. Where slices don't begin and end with whole groups, whole blocks and whole tiles of
the kernel, they assert, or shift scales against codes without a word. Releases differ as well: up to 2025 they cut by
ceiling division of each tensor, since 2026 at multiples of an alignment that the mode has. They agree on slices that
are equal and aligned, so nothing else counts as held.
Source: TensorRT-LLM `_torch/modules/linear.py` (`Linear.load_shard`, `load_weight_shard`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Slices"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """How the ranks of a tensor-parallel group share a weight [N, K].

    `columns` says that K is cut, and not N. `tensor` is the size of the group; each of its `expert` parts has other
    routed experts, which are cut into `tensor // expert`. `parts` are the rows of parts that lie in one weight and are
    cut one by one. `heads` are those of a K or V weight, which engines repeat for ranks that outnumber them, and
    `repeats_scales` says whether scales come repeated. `alone` says that newer releases cut at multiples of the mode's
    alignment: not so for experts and parts of a joined Linear. `sizes` are the tensor-parallel sizes that the model as
    a whole can be cut by.
    """

    columns: bool = False
    tensor: int
    expert: int = 1
    parts: tuple[int, ...] = ()
    heads: int | None = None
    repeats_scales: bool = True
    alone: bool = False
    sizes: tuple[int, ...] = (1,)

    def obstacle(self, algo: str, shape: tuple[int, int], multiple: int, *, scales_repeated: bool = True) -> str | None:
        """Why a mode doesn't hold the slices, and at which sizes it would; None when it does.

        Each rank's must be a multiple of `multiple`. `scales_repeated` says whether engines repeat the scales of the
        mode with K/V heads.
        """

        def found(tensor: int) -> str:
            return self._bad_rows(shape, multiple, tensor) or self._bad_repeats(tensor, scales_repeated=scales_repeated)

        why = found(self.tensor)
        if not why:
            return None
        within = f", expert parallel {self.expert}" if self.expert > 1 else ""
        work = [str(size) for size in self.sizes if size % self.expert == 0 and not found(size)]
        verb = "works" if len(work) == 1 else "work"
        remedy = f"size{'s' if len(work) > 1 else ''} {', '.join(work)} {verb}" if work else "no size works"
        return f"{algo} at tensor parallel {self.tensor}{within}: {why}; {remedy}"

    def _bad_rows(self, shape: tuple[int, int], multiple: int, tensor: int) -> str:
        """What is wrong with the slices in a group of that size; empty for nothing."""
        axis = "columns" if self.columns else "rows"
        ranks = tensor // self.expert
        if self.heads is not None:
            ranks = min(ranks, self.heads)
        for features in (shape[1],) if self.columns else self.parts or (shape[0],):
            if features % ranks:
                return f"its {features} {axis} don't divide"
            if features // ranks % multiple:
                return f"each rank's {features // ranks} {axis} are no multiple of {multiple}"
        return ""

    def _bad_repeats(self, tensor: int, *, scales_repeated: bool) -> str:
        """What is wrong with K/V heads in a group of that size; empty for nothing."""
        if self.heads is None or self.heads >= tensor or self.repeats_scales or scales_repeated:
            return ""
        return f"engines repeat its {self.heads} K/V heads for ranks that outnumber them, but not their scales"

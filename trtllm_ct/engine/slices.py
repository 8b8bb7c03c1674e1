"""Which slice of a weight each rank of a tensor-parallel group gets, and whether a mode's kernel accepts it.

Engines slice every Linear themselves. If a slice does not begin and end with whole groups, whole blocks and whole tiles
of the kernel, the engine asserts, or it silently shifts scales against codes. Releases differ too: until 2025 they
sliced each tensor by ceiling division, since 2026 they slice at multiples of an alignment that depends on the mode. All
releases agree on slices that are equal and aligned, so a mode holds only such slices.
Source: TensorRT-LLM `_torch/modules/linear.py` (`Linear.load_shard`, `load_weight_shard`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Slices"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """How the ranks of a tensor-parallel group divide a weight [N, K].

    `columns` says that K is divided instead of N. `tensor` is the size of the group. It consists of `expert` subgroups,
    each of which has other routed experts and slices them for `tensor // expert` ranks. `parts` are the numbers of rows
    of several Linears that are stored in one weight, each of which is sliced for itself.
    `heads` is the number of heads in a K or V weight. Engines repeat the heads if there are more ranks;
    `repeats_scales` says whether the scales are delivered repeated then.
    `alone` says that newer releases slice the weight at multiples of the mode's alignment, which they don't for experts
    and parts of a fused Linear. `sizes` are the tensor-parallel sizes by which the whole model can be divided.
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
        """Return why a mode doesn't hold the slices, and at which sizes it would; None if it holds them.

        Rows or columns of each rank must be a multiple of `multiple`. `scales_repeated` says whether engines repeat the
        mode's scales together with K/V heads.
        """

        def problem(tensor: int) -> str:
            return replace(self, tensor=tensor).problem(shape, multiple, scales_repeated=scales_repeated)

        reason = problem(self.tensor)
        if not reason:
            return None
        within = f", expert parallel {self.expert}" if self.expert > 1 else ""
        good_sizes = [str(size) for size in self.sizes if size % self.expert == 0 and not problem(size)]
        verb = "works" if len(good_sizes) == 1 else "work"
        plural = "s" if len(good_sizes) > 1 else ""
        remedy = f"size{plural} {', '.join(good_sizes)} {verb}" if good_sizes else "no size works"
        return f"{algo} at tensor parallel {self.tensor}{within}: {reason}; {remedy}"

    def problem(self, shape: tuple[int, int], multiple: int, *, scales_repeated: bool = True) -> str:
        """Return what is wrong with the slices at this size, see `obstacle`; empty if nothing is."""
        return self._bad_rows(shape, multiple) or self._bad_repeats(scales_repeated=scales_repeated)

    def _bad_rows(self, shape: tuple[int, int], multiple: int) -> str:
        """Return what is wrong with the rows or columns of a slice; empty if nothing is."""
        axis = "columns" if self.columns else "rows"
        ranks = self.tensor // self.expert
        if self.heads is not None:
            ranks = min(ranks, self.heads)
        for features in (shape[1],) if self.columns else self.parts or (shape[0],):
            if features % ranks:
                return f"its {features} {axis} don't divide"
            if features // ranks % multiple:
                return f"each rank's {features // ranks} {axis} are no multiple of {multiple}"
        return ""

    def _bad_repeats(self, *, scales_repeated: bool) -> str:
        """Return what is wrong with repeated K/V heads; empty if nothing is."""
        if self.heads is None or self.heads >= self.tensor or self.repeats_scales or scales_repeated:
            return ""
        return f"engines repeat its {self.heads} K/V heads for ranks that outnumber them, but not their scales"

"""What a plan knows about the machines that will run the engine: its release, and the SM of their GPUs.

An SM is the compute capability of a GPU without its point: 89 is Ada, 90 Hopper, 100 data-center Blackwell and 120
other Blackwell GPUs. Kernels differ by SM in which modes they have and which sizes they accept; the facts are in
`engine/modes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.engine.releases import Release

__all__ = ["SMS", "Platform", "sm_of_capability", "sms_in_words"]

SMS = (89, 90, 100, 120)
"""The SMs that a plan can be made for. Those of one family have the same kernels: 103 counts as 100, 121 as 120."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """A release of the engine and the SM of its GPUs, one of `SMS`.

    `sm` is None if it is not known: a plan then counts on what the kernels of all SMs have in common, and on modes that
    only some SMs have where no other mode holds a weight.
    """

    release: Release
    sm: int | None = None


def sm_of_capability(major: int, minor: int) -> int | None:
    """Return the SM that a GPU of this compute capability counts as; None if it is none of `SMS`."""
    return {(8, 9): 89, (9, 0): 90}.get((major, minor), {10: 100, 12: 120}.get(major))


def sms_in_words(sms: tuple[int, ...] | list[int], word: str = "and") -> str:
    """Return SMs in words, such as `SM89, SM90 and SM100`."""
    names = [f"SM{sm}" for sm in sms]
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

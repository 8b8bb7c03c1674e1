"""`served_gpus`: on which GPUs a release has a kernel for every mode of a plan.

A plan for a known SM has modes of that SM only. Without one, a mode that some GPUs lack is planned if no other holds
the weight (NVFP4, int4 in groups), so what a plan runs on follows from all of its modes together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.errors import Fault
from trtllm_ct.engine.kernels import missing_kernel
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.platform import SMS, Platform, sms_in_words

if TYPE_CHECKING:
    from collections.abc import Collection

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.releases import Release

__all__ = ["ServedGpus", "no_gpu_problems", "served_gpus", "sms_of_modes"]


class ServedGpus(NamedTuple):
    """The SMs on which every mode of a plan has a kernel, and for each mode that some SM lacks, which ones."""

    sms: tuple[int, ...]
    lacking: tuple[str, ...]

    def __str__(self) -> str:
        """The SMs in words, and why no others."""
        reasons = f" ({'; '.join(self.lacking)})" if self.lacking else ""
        return f"{sms_in_words(self.sms) if self.sms else 'none'}{reasons}"


def served_gpus(modes: Collection[tuple[QuantAlgo, bool]], release: Release | None) -> ServedGpus | None:
    """Return on which GPUs a release has these modes, of routed experts where True; None without a release."""
    if release is None:
        return None
    lacking = []
    for algo, expert in sorted(modes):
        without = [sm for sm in SMS if not _runs(algo, sm, release, expert=expert)]
        if without:
            lacking.append(f"no exact {algo} {'experts' if expert else 'Linear'} on {sms_in_words(without)}")
    return ServedGpus(sms_of_modes(modes, release), tuple(lacking))


def sms_of_modes(modes: Collection[tuple[QuantAlgo, bool]], release: Release) -> tuple[int, ...]:
    """Return the SMs on which a release has a kernel for each of these modes, of routed experts where True."""
    return tuple(sm for sm in SMS if all(_runs(algo, sm, release, expert=expert) for algo, expert in modes))


def _runs(algo: QuantAlgo, sm: int, release: Release, *, expert: bool) -> bool:
    return missing_kernel(MODES_BY_ALGO[algo], Platform(release=release, sm=sm), expert=expert) is None


def no_gpu_problems(gpus: ServedGpus | None) -> tuple[Fault, ...]:
    """Return the fault of a plan whose modes no GPU has all of."""
    if gpus is None or gpus.sms:
        return ()
    fault = Fault(
        where="modes",
        expected="a GPU for which the release has a kernel for each mode",
        found=f"none: {'; '.join(gpus.lacking)}",
        remedy="Name the GPUs with --sm: what they lack is dequantized then.",
    )
    return (fault,)

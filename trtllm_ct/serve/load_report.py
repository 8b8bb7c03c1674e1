"""LoadReport: what was loaded for one rank, with bytes, seconds and memory."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_form import fields_form

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.engine.parallel import Rank
    from trtllm_ct.plan.plan import Plan

__all__ = ["LoadReport", "peak_memory", "report_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was loaded for one rank.

    - `source`: the checkpoint directory. `rank`: the number of the rank in the engine's world.
    - `modes`: the number of quantized modules per mode. `dequantized`: the number of dequantized modules per reason.
    - `modules`, `tensors`: how many of them were loaded.
    - `bytes_read`: the payload read from files. `bytes_delivered`: the payload of the tensors passed to the engine.
    - `seconds`: the time until all tensors were ready. Some are views of memory-mapped files, whose pages are read only
      when the engine copies them, after this time.
    - `peak_memory`: the peak resident memory of the whole process so far, in bytes, memory-mapped files included.
    - `unread`: the names of loaded KV-cache scales that the engine doesn't read, see `completeness.prove_complete`.
    - `warnings`: the warnings of the plan.
    """

    source: str
    rank: int
    modes: Mapping[str, int]
    dequantized: Mapping[str, int]
    modules: int
    tensors: int
    bytes_read: int
    bytes_delivered: int
    seconds: float
    peak_memory: int
    unread: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """The payload read from files per second, in 10^9 bytes; 0 when no time was measured."""
        return self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name and `gigabytes_per_second`, for JSON output."""
        return fields_form(self) | {"gigabytes_per_second": self.gigabytes_per_second}

    def __str__(self) -> str:
        modes = ", ".join(f"{count} x {mode}" for mode, count in self.modes.items()) or "no quantized modules"
        plain = sum(self.dequantized.values())
        return (
            f"{self.source}: {modes}{f', {plain} dequantized' if plain else ''}; {self.tensors} tensors of "
            f"{self.modules} modules, {self.bytes_read / 1e9:.3f} GB read in {self.seconds:.2f} s "
            f"({self.gigabytes_per_second:.2f} GB/s), peak memory {self.peak_memory / 1e9:.2f} GB"
        )


def report_of(
    plan: Plan, rank: Rank, *, source: Path, bytes_read: int, seconds: float, unread: tuple[str, ...]
) -> LoadReport:
    """Return the report of a rank for which everything in `plan` was loaded."""
    quantized = [module for module in plan.modules if module.weight is not None]
    return LoadReport(
        source=str(source),
        rank=rank.pipeline * rank.parallel.tensor + rank.tensor,
        modes=dict(Counter(module.delivered_mode for module in quantized if module.layer is not None)),
        dequantized=dict(Counter(module.reason for module in quantized if module.layer is None)),
        modules=len(plan.modules),
        tensors=sum(len(module.deliveries) for module in plan.modules),
        bytes_read=bytes_read,
        bytes_delivered=plan.delivered_bytes,
        seconds=seconds,
        peak_memory=peak_memory(),
        unread=unread,
        warnings=plan.warnings,
    )


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes; 0 on systems without the `resource` module."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024

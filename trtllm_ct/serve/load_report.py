"""LoadReport: what one rank was given and what that took."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.engine.parallel import Rank
    from trtllm_ct.plan.plan import Plan

__all__ = ["LoadReport", "peak_memory", "report_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was loaded for one rank.

    `modes` counts the quantized modules by the mode that they are delivered in, `dequantized` those that became plain
    by the reason why. `bytes_read` is payload asked of files, `bytes_delivered` that of the tensors handed to the
    engine, which may be views of files that the engine alone will read to the end: `seconds` is the time until all of
    them were ready to be read. `peak_memory` is that of the whole process so far, in bytes, mapped files included.
    `unread` names delivered tensors that the engine's Linears don't ask for.
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
        """Payload asked of files a second, in 10^9 bytes."""
        return self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the fields by name, and the rate."""
        entry = asdict(self)
        return entry | {
            "unread": list(self.unread),
            "warnings": list(self.warnings),
            "gigabytes_per_second": self.gigabytes_per_second,
        }

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
    """The report of a rank whose plan was delivered in full."""
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
    """The most memory that this process has had resident, in bytes; 0 where that can't be told."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024

"""Time against size as SVG: points that were measured, and the straight line through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.results import Series

__all__ = ["draw", "require_matplotlib"]

_BYTES = 1e9, "GB"
_COUNT = 1e3, "thousand tensors"


def require_matplotlib() -> Any:
    """The `Figure` of matplotlib, which needs no display. Raises `MissingDependencyError`."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            Fault(
                where="--write-docs",
                expected="matplotlib, for plots",
                found="no such package",
                remedy="Run: pip install matplotlib",
            )
        ) from None
    # Equal numbers make equal files: elements are not named at random.
    mpl.rcParams["svg.hashsalt"] = "trtllm-ct"
    return Figure


def draw(series: Sequence[Series], path: Path, *, counts_tensors: bool) -> None:
    """One plot of all series; a line's label says what a unit of size costs."""
    figure = require_matplotlib()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    unit, name = _COUNT if counts_tensors else _BYTES
    for number, each in enumerate(series):
        start, slope = each.line
        sizes = [point.size for point in each.points]
        colour = f"C{number}"
        axes.plot([size / unit for size in sizes], [point.seconds for point in each.points], "o", color=colour)
        label = f"{each.label}: {start:.3g} s + {slope * unit:.3g} s per {name}"
        axes.plot([size / unit for size in sizes], [start + slope * size for size in sizes], color=colour, label=label)
    axes.set_xlabel(name)
    axes.set_ylabel("seconds")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})

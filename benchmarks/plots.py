"""Plot time against size as SVG: the measured points and the least-squares line through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.results import Series

__all__ = ["draw", "require_matplotlib"]

_UNIT_OF_BYTES = 1e9, "GB"
_UNIT_OF_TENSORS = 1e3, "thousand tensors"


def require_matplotlib() -> Any:
    """Return matplotlib's class `Figure`, which needs no display; raises `MissingDependencyError` if it is missing."""
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
    # A fixed salt makes the ids of SVG elements reproducible, so that the same numbers give the same file.
    mpl.rcParams["svg.hashsalt"] = "trtllm-ct"
    return Figure


def draw(series: Sequence[Series], path: Path, *, counts_tensors: bool) -> None:
    """Draw one plot of all series to `path`; the label of a line gives the seconds per unit of size.

    The unit is a thousand tensors if `counts_tensors`, otherwise a GB.
    """
    figure = require_matplotlib()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    unit, name = _UNIT_OF_TENSORS if counts_tensors else _UNIT_OF_BYTES
    for number, one_series in enumerate(series):
        start, slope = one_series.line
        sizes = [point.size for point in one_series.points]
        colour = f"C{number}"
        axes.plot([size / unit for size in sizes], [point.seconds for point in one_series.points], "o", color=colour)
        label = f"{one_series.label}: {start:.3g} s + {slope * unit:.3g} s per {name}"
        axes.plot([size / unit for size in sizes], [start + slope * size for size in sizes], color=colour, label=label)
    axes.set_xlabel(name)
    axes.set_ylabel("seconds")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})

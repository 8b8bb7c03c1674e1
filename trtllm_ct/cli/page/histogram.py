"""How many requantized weights have which relative error, as a table with bars."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from trtllm_ct.cli.page.markup import bars, count_of, table, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["histogram"]

_STEPS = 20
"""The number of bins from 0 to the largest error; those below the smallest error are left out."""


def histogram(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return the histogram of the relative errors among the checks of a verification, in the form of `--json`.

    Empty without requantized weights. An error on the border of two bins counts in the upper one, the largest error in
    the last one; errors that are no finite number have a row of their own.
    """
    errors = [check["relative_error"] for check in checks if check["kind"] == "requantized"]
    finite = [error for error in errors if not isinstance(error, str)]
    step = max(finite, default=0.0) / _STEPS
    counts = Counter(min(int(error / step), _STEPS - 1) if step else 0 for error in finite)
    most = max(counts.values(), default=1)
    rows = [
        (f"{at * step:.2%} to {(at + 1) * step:.2%}", bars(100 * counts[at] / most), count_of(counts[at]))
        for at in range(min(counts, default=0), max(counts, default=-1) + 1)
    ]
    others = Counter(error for error in errors if isinstance(error, str))
    rows += [(text(error), bars(100 * count / most), count_of(count)) for error, count in others.items()]
    return (
        table("Requantized weights by relative error", ("relative error", "share", "weights"), rows, numbers=1)
        if rows
        else ""
    )

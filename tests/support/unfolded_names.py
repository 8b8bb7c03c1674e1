"""The names that a folded name of a report stands for."""

from __future__ import annotations

__all__ = ["unfold"]


def unfold(name: str) -> list[str]:
    """Return all names that a folded name stands for."""
    if "{" not in name:
        return [name]
    before, _, rest = name.partition("{")
    inside, _, after = rest.partition("}")
    numbers: list[int] = []
    for run in inside.split(","):
        start, *rest_of_run = map(int, run.split(".."))
        end, step = (*rest_of_run, start, 1)[:2] if len(rest_of_run) != 1 else (rest_of_run[0], 1)
        numbers += range(start, end + 1, step)
    return [unfolded for number in numbers for unfolded in unfold(f"{before}{number}{after}")]

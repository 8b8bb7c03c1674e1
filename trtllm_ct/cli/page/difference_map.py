"""The map of layers and modules of two directories, coloured by how far they are apart, and the table of schemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.page.markup import bytes_of, count_of, table, text
from trtllm_ct.cli.page.state_map import Entry, State, StateMap, error_rank, error_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DifferenceMap"]

_ROUNDING = 2.0**-8
"""The largest error, relative to a value, of rounding it once to bfloat16."""


@dataclass(slots=True)
class DifferenceMap(StateMap):
    """The modules of a comparison; `compared` says whether their values were compared."""

    states = {  # noqa: RUF012 (a ClassVar of the base class)
        "alike": State("=", "e0", "stored alike"),
        "same": State("=", "e1", "the same values"),
        "otherwise": State("≈", "e2", "stored in another way"),
        "near": State("≈", "e2", "differs by at most 1/256 of the largest value of a row, as by rounding to bfloat16"),
        "far": State("≠", "e3", "differs by more than 1/256 of the largest value of a row"),
        "unknown": State("?", "e3", "can't be compared"),
        "first": State("−", "e4", "in the first directory only"),  # noqa: RUF001 (as wide as the other signs)
        "second": State("+", "e4", "in the second directory only"),
    }
    shown = "differences"
    kind = "module"

    compared: bool

    def state(self, entry: Entry) -> str:
        """Return the name of a module's state."""
        if entry["second"] is None:
            return "first"
        if entry["first"] is None:
            return "second"
        if not self.compared:
            return "alike" if entry["first"] == entry["second"] else "otherwise"
        error = entry["error"]
        if error is None:
            return "unknown"
        if error_rank(entry) > _ROUNDING:
            return "far"
        return "near" if error else "same"

    def about(self, worst: Entry, entries: Sequence[Entry]) -> list[tuple[str, str]]:
        """Return the schemes of the worst module of a cell, and the bytes of all."""
        return [
            ("worst", worst["name"]),
            ("first", worst["first"] or "-"),
            ("second", worst["second"] or "-"),
            ("error", error_text(worst)),
            ("bytes", " and ".join(f"{nbytes:,}" for nbytes in _sizes(entries))),
        ]

    def schemes(self) -> str:
        """Return a table of modules by their schemes in both directories, with names folded over layers and experts."""
        groups: dict[tuple[str, str], list[Entry]] = {}
        for module in self.entries:
            groups.setdefault((module["first"] or "-", module["second"] or "-"), []).append(module)
        rows = [
            (
                "<br>".join(map(text, fold_names(module["name"] for module in modules))),
                text(first),
                text(second),
                count_of(len(modules)),
                *map(bytes_of, _sizes(modules)),
                error_text(max(modules, key=error_rank)),
            )
            for (first, second), modules in sorted(groups.items())
        ]
        headers = ("modules", "first", "second", "number", "first bytes", "second bytes", "largest error")
        return table("Modules by scheme", headers, rows, numbers=4) if rows else ""


def _sizes(modules: Sequence[Entry]) -> tuple[int, int]:
    """Return the bytes of modules in the first directory and in the second."""
    first, second = (sum(module[key] or 0 for module in modules) for key in ("first_bytes", "second_bytes"))
    return first, second

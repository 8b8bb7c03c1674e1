"""The map of layers and modules of two directories, coloured by how far they are apart, and the table of schemes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.page.grid import grids_of, table_of
from trtllm_ct.cli.page.markup import bytes_of, count_of, table, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DifferenceMap"]

Module = dict[str, Any]

_ROUNDING = 2.0**-8
"""The largest error, relative to a value, of rounding it once to bfloat16."""

# The state of a module: its sign, the class of its colour, and what it means. The last one of a cell's modules counts.
_STATES: Mapping[str, tuple[str, str, str]] = {
    "alike": ("=", "e0", "stored alike"),
    "same": ("=", "e1", "the same values"),
    "otherwise": ("≈", "e2", "stored in another way"),
    "near": ("≈", "e2", "differs by at most 1/256 of the largest value of a row, as by rounding to bfloat16"),
    "far": ("≠", "e3", "differs by more than 1/256 of the largest value of a row"),
    "unknown": ("?", "e3", "can't be compared"),
    "first": ("−", "e4", "in the first directory only"),  # noqa: RUF001 (as wide as the other signs)
    "second": ("+", "e4", "in the second directory only"),
}
_ORDER = [*_STATES]


@dataclass(slots=True)
class DifferenceMap:
    """The modules of a comparison, in the form of `--json`; `compared` says whether their values were compared.

    `details` are those of `ModuleMap`, for each cell.
    """

    modules: Sequence[Module]
    compared: bool
    details: list[list[tuple[str, str]]] = field(init=False, default_factory=list)

    def html(self) -> str:
        """Return the legend, the map of each stack of layers, and a table of the modules that are in no layer."""
        grids, others = grids_of((module["name"], module) for module in self.modules)
        maps = "".join(table_of(grid, self._cell, "differences") for grid in grids)
        counts = Counter(map(self._state, self.modules))
        legend = "".join(
            f"<li><span class='key {colour}'>{sign}</span> {text(meaning)}: {counts[name]:,} modules</li>"
            for name, (sign, colour, meaning) in _STATES.items()
            if counts[name]
        )
        rows = [(text(name), text(_STATES[self._state(module)][2]), _error(module)) for name, module in others]
        rest = table("Outside of layers", ("module", "result", "error"), rows, numbers=1) if rows else ""
        return f"<ul class=legend>{legend}</ul>{maps}{rest}" if self.modules else ""

    def schemes(self) -> str:
        """Return a table of modules by their schemes in both directories, with names folded over layers and experts."""
        groups: dict[tuple[str, str], list[Module]] = {}
        for module in self.modules:
            groups.setdefault((module["first"] or "-", module["second"] or "-"), []).append(module)
        rows = [
            (
                "<br>".join(map(text, fold_names(module["name"] for module in modules))),
                text(first),
                text(second),
                count_of(len(modules)),
                *(bytes_of(sum(module[key] or 0 for module in modules)) for key in ("first_bytes", "second_bytes")),
                _error(max(modules, key=_rank)),
            )
            for (first, second), modules in sorted(groups.items())
        ]
        headers = ("modules", "first", "second", "number", "first bytes", "second bytes", "largest error")
        return table("Modules by scheme", headers, rows, numbers=4) if rows else ""

    def _cell(self, modules: list[Module]) -> str:
        """Return the attributes and the text of a cell with these modules."""
        worst = max(modules, key=lambda module: (_ORDER.index(self._state(module)), _rank(module)))
        sign, colour, meaning = _STATES[self._state(worst)]
        sizes = (sum(module[key] or 0 for module in modules) for key in ("first_bytes", "second_bytes"))
        self.details.append(
            [
                ("result", meaning),
                ("modules", f"{len(modules):,}"),
                ("worst", worst["name"]),
                ("first", worst["first"] or "-"),
                ("second", worst["second"] or "-"),
                ("error", _error(worst)),
                ("bytes", " and ".join(f"{nbytes:,}" for nbytes in sizes)),
            ]
        )
        return f'class={colour} data-k="{len(self.details) - 1}:1" aria-label="{text(meaning)}">{sign}'

    def _state(self, module: Module) -> str:
        if module["second"] is None:
            return "first"
        if module["first"] is None:
            return "second"
        if not self.compared:
            return "alike" if module["first"] == module["second"] else "otherwise"
        error = module["error"]
        if error is None:
            return "unknown"
        if isinstance(error, str) or error > _ROUNDING:  # no number is a text in JSON
            return "far"
        return "near" if error else "same"


def _rank(module: Module) -> float:
    """Return a number by which the module with the largest error is found."""
    error = module["error"]
    return float("inf") if isinstance(error, str) else -1.0 if error is None else float(error)


def _error(module: Module) -> str:
    error = module["error"]
    return "" if error is None else text(error) if isinstance(error, str) else f"{error:.6g}"

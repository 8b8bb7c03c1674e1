"""The map of layers and modules, coloured by the error that `verify` found: a strip for each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_ct.cli.page.grid import grids_of, table_of
from trtllm_ct.cli.page.markup import table, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ErrorMap"]

# The state of a tensor: its sign, the class of its colour, and what it means. The last one of a cell's tensors counts.
_STATES: Mapping[str, tuple[str, str, str]] = {
    "plain": ("=", "e0", "not quantized in the source: equal"),
    "native": ("=", "e1", "quantized on both sides: equal"),
    "dequantized": ("≈", "e2", "dequantized: the exact value, rounded once"),
    "requantized": ("≈", "e3", "rounded to codes on request: each code is the nearest one"),
    "rounded": ("~", "e3", "differs by no more than the rounding of a number to float32"),
    "wrong": ("✗", "e4", "wrong"),
}
_ORDER = [*_STATES]

Check = dict[str, Any]


@dataclass(slots=True)
class ErrorMap:
    """The checks of a verification, in the form of `--json`. `details` are those of `ModuleMap`, for each cell."""

    checks: Sequence[Check]
    details: list[list[tuple[str, str]]] = field(init=False, default_factory=list)

    def html(self) -> str:
        """Return the legend, the map of each stack of layers, and a table of the tensors that are in no layer."""
        grids, others = grids_of((check["name"].rpartition(".")[0], check) for check in self.checks)
        maps = "".join(table_of(grid, self._cell, "errors") for grid in grids)
        counts = {name: sum(_state(check) == name for check in self.checks) for name in _STATES}
        legend = "".join(
            f"<li><span class='key {colour}'>{sign}</span> {text(meaning)}: {counts[name]:,} tensors</li>"
            for name, (sign, colour, meaning) in _STATES.items()
            if counts[name]
        )
        rows = [(text(check["name"]), text(_STATES[_state(check)][2]), _number(check["error"])) for _, check in others]
        rest = table("Outside of layers", ("tensor", "result", "error"), rows, numbers=1) if rows else ""
        return f"<ul class=legend>{legend}</ul>{maps}{rest}" if self.checks else ""

    def worst(self) -> str:
        """Return a table of the worst tensor of each kind; empty without checks."""
        rows = []
        for kind in ("native", "requantized", "dequantized", "plain"):
            found = [check for check in self.checks if check["kind"] == kind]
            if found:
                worst = max(found, key=_error)
                place = f"{worst['name']} {worst['position']}"
                values = f"{_number(worst['got'])}, source {_number(worst['want'])}"
                rows.append((kind, f"{len(found):,}", text(place), values, _number(worst["error"])))
        headers = ("kind", "tensors", "worst element", "value", "error, relative to the largest value of its row")
        return table("Worst of each kind", headers, rows, numbers=1) if rows else ""

    def _cell(self, checks: list[Check]) -> str:
        """Return the attributes and the text of a cell with these checks."""
        worst = max(checks, key=lambda check: (_ORDER.index(_state(check)), _error(check)))
        sign, colour, meaning = _STATES[_state(worst)]
        self.details.append(
            [
                ("result", meaning),
                ("tensors", f"{len(checks):,}"),
                ("worst", f"{worst['name']} {worst['position']}"),
                ("error", _number(worst["error"])),
                ("value", f"{_number(worst['got'])}, source {_number(worst['want'])}"),
            ]
        )
        return f'class={colour} data-k="{len(self.details) - 1}:1" aria-label="{text(meaning)}">{sign}'


def _state(check: Check) -> str:
    if not check["good"]:
        return "wrong"
    if check["kind"] == "requantized":
        return "requantized"
    return "rounded" if check["error"] else str(check["kind"])


def _error(check: Check) -> float:
    return float(check["error"])


def _number(value: float | str) -> str:
    return text(value) if isinstance(value, str) else f"{value:.6g}"

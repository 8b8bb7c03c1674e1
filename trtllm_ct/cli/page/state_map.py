"""`StateMap`: a map of layers and modules whose cells have the state of their worst entry, with legend and details."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from trtllm_ct.cli.page.grid import grids_of, table_of
from trtllm_ct.cli.page.markup import table, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Entry", "State", "StateMap", "error_rank", "error_text", "number_text"]

Entry = dict[str, Any]
"""A module or a tensor in the form of `--json`, which has `name` and `error`."""


class State(NamedTuple):
    """What a cell may show: its sign, the class of its colour, and what it means."""

    sign: str
    colour: str
    meaning: str


@dataclass(slots=True)
class StateMap(ABC):
    """The entries of a document, each in one of `states`, of which later ones count more in a cell.

    `shown` says in a word what the cells show, and `kind` what an entry is. `details` are those of `ModuleMap`, for
    each cell.
    """

    states: ClassVar[Mapping[str, State]]
    shown: ClassVar[str]
    kind: ClassVar[str]

    entries: Sequence[Entry]
    details: list[list[tuple[str, str]]] = field(init=False, default_factory=list)

    @abstractmethod
    def state(self, entry: Entry) -> str:
        """Return the name of an entry's state."""

    @abstractmethod
    def about(self, worst: Entry, entries: Sequence[Entry]) -> list[tuple[str, str]]:
        """Return labels and texts about a cell beside the meaning of its state, that of its entry `worst`."""

    def module(self, entry: Entry) -> str:
        """Return the name of the module that an entry belongs to."""
        return str(entry["name"])

    def html(self) -> str:
        """Return the legend, the map of each stack of layers, and a table of the entries that are in no layer."""
        if not self.entries:
            return ""
        grids, others = grids_of((self.module(entry), entry) for entry in self.entries)
        maps = "".join(table_of(grid, self._cell, self.shown) for grid in grids)
        rows = [
            (text(entry["name"]), text(self.states[self.state(entry)].meaning), error_text(entry))
            for _, entry in others
        ]
        rest = table("Outside of layers", (self.kind, "result", "error"), rows, numbers=1) if rows else ""
        return f"{self._legend()}{maps}{rest}"

    def _legend(self) -> str:
        counts = Counter(map(self.state, self.entries))
        items = "".join(
            f"<li><span class='key {colour}'>{sign}</span> {text(meaning)}: {counts[name]:,} {self.kind}s</li>"
            for name, (sign, colour, meaning) in self.states.items()
            if counts[name]
        )
        return f"<ul class=legend>{items}</ul>"

    def _cell(self, entries: list[Entry]) -> str:
        """Return the attributes and the text of a cell with these entries."""
        order = [*self.states]
        worst = max(entries, key=lambda entry: (order.index(self.state(entry)), error_rank(entry)))
        sign, colour, meaning = self.states[self.state(worst)]
        self.details.append([("result", meaning), (f"{self.kind}s", f"{len(entries):,}"), *self.about(worst, entries)])
        return f'class={colour} data-k="{len(self.details) - 1}:1" aria-label="{text(meaning)}">{sign}'


def error_rank(entry: Entry) -> float:
    """Return a number by which the entry with the largest error is found; in JSON, one that is no number is a text."""
    error = entry["error"]
    return float("inf") if isinstance(error, str) else -1.0 if error is None else float(error)


def error_text(entry: Entry) -> str:
    """Return the error of an entry as a text; empty if it is not known."""
    return number_text(entry["error"])


def number_text(value: float | str | None) -> str:
    """Return a number of a JSON document as a text; one that is not finite is a text there already."""
    return "" if value is None else text(value) if isinstance(value, str) else f"{value:.6g}"

"""The map of layers and modules, coloured by the error that `verify` found: a strip for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.cli.page.markup import table, text
from trtllm_ct.cli.page.state_map import Entry, State, StateMap, error_rank, error_text, number_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ErrorMap"]


@dataclass(slots=True)
class ErrorMap(StateMap):
    """The checks of a verification, one for each tensor."""

    states = {  # noqa: RUF012 (a ClassVar of the base class)
        "plain": State("=", "e0", "not quantized in the source: equal"),
        "native": State("=", "e1", "quantized on both sides: equal"),
        "dequantized": State("≈", "e2", "dequantized: the exact value, rounded once"),
        "requantized": State("≈", "e3", "rounded to codes on request: each code is the nearest one"),
        "rounded": State("~", "e3", "differs by no more than the rounding of a number to float32"),
        "wrong": State("✗", "e4", "wrong"),
    }
    shown = "errors"
    kind = "tensor"

    def state(self, entry: Entry) -> str:
        """Return the name of a check's state."""
        if not entry["good"]:
            return "wrong"
        if entry["kind"] == "requantized":
            return "requantized"
        return "rounded" if entry["error"] else str(entry["kind"])

    def module(self, entry: Entry) -> str:
        """Return the name of the module that a tensor belongs to."""
        return str(entry["name"].rpartition(".")[0])

    def about(self, worst: Entry, entries: Sequence[Entry]) -> list[tuple[str, str]]:  # noqa: ARG002 (nothing is summed)
        """Return the worst element of a cell."""
        return [("worst", _place(worst)), ("error", error_text(worst)), ("value", _values(worst))]

    def worst(self) -> str:
        """Return a table of the worst tensor of each kind; empty without checks."""
        rows = []
        for kind in ("native", "requantized", "dequantized", "plain"):
            found = [check for check in self.entries if check["kind"] == kind]
            if found:
                worst = max(found, key=error_rank)
                rows.append((kind, f"{len(found):,}", text(_place(worst)), _values(worst), error_text(worst)))
        headers = ("kind", "tensors", "worst element", "value", "error, relative to the largest value of its row")
        return table("Worst of each kind", headers, rows, numbers=1) if rows else ""


def _place(check: Entry) -> str:
    return f"{check['name']} {check['position']}"


def _values(check: Entry) -> str:
    return f"{number_text(check['got'])}, source {number_text(check['want'])}"

"""The map of layers and modules, coloured by mode, with what a reader may want to know of each module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.texts import format_bytes
from trtllm_ct.cli.page.grid import grids_of, table_of
from trtllm_ct.cli.page.markup import bytes_of, table, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["ModuleMap"]

_COLOURS = 8
"""Modes beyond so many share colours; their signs differ."""
_SIGNS = {"dequantized": "!", "plain": "·"}


@dataclass(slots=True)
class ModuleMap:
    """The kinds of the modules of a plan: modules of one kind differ only in their names.

    `details` are pairs of a label and a text for each kind, which the page shows for the cell that has the focus.
    """

    modules: Sequence[ModulePlan]
    details: list[list[tuple[str, str]]] = field(init=False, default_factory=list)
    _kind_of: list[int] = field(init=False, default_factory=list)
    _first: list[ModulePlan] = field(init=False, default_factory=list)
    _signs: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[tuple[Any, ...], int] = {}
        for module in self.modules:
            # The plans of modules that are alike share these objects.
            made = [(name.rpartition(".")[2], id(operation)) for name, operation, _ in module.deliveries]
            parts = (module.weight, module.scheme, module.layer, module.reason, module.note)
            key = (module.class_name, module.stored_bytes, *map(id, parts), *made)
            if key not in known:
                known[key] = len(self._first)
                self._first.append(module)
                self.details.append(_details(module))
            self._kind_of.append(known[key])
        modes: Counter[str] = Counter()
        for module in self._first:
            modes[module.delivered_mode] += 0
        native = sorted(modes.keys() - _SIGNS.keys())
        self._signs = {mode: str(at + 1) for at, mode in enumerate(native)} | _SIGNS

    def html(self) -> str:
        """Return the legend, the map of each stack of layers, and a table of the modules that are in no layer."""
        entries = [(module.name, kind) for module, kind in zip(self.modules, self._kind_of, strict=True)]
        grids, others = grids_of(entries)
        maps = "".join(table_of(grid, self._cell, "modes") for grid in grids)
        return self._legend() + maps + self._others(others)

    def _legend(self) -> str:
        """Return the signs and colours of the modes, with the number and the bytes of their modules."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for module, kind in zip(self.modules, self._kind_of, strict=True):
            mode = self._first[kind].delivered_mode
            counts[mode] += 1
            sizes[mode] += module.delivered_bytes
        items = "".join(
            f"<li>{self._key(mode)} {text(mode)}: {counts[mode]:,} modules, {format_bytes(sizes[mode])}</li>"
            for mode in self._signs
            if counts[mode]
        )
        star = "<li><span class=key>*</span> computed otherwise than its scheme asks for</li>"
        return f"<ul class=legend>{items}{star if any(module.note for module in self._first) else ''}</ul>"

    def _cell(self, kinds: list[int]) -> str:
        """Return the attributes and the text of a cell with modules of these kinds."""
        counts = Counter(kinds)
        modes: Counter[str] = Counter()
        for kind, count in counts.items():
            modes[self._first[kind].delivered_mode] += count
        sign = "".join(self._signs[mode] for mode in modes)
        noted = "*" * any(self._first[kind].note for kind in counts)
        label = ", ".join(mode if len(modes) == 1 else f"{count} {mode}" for mode, count in modes.items())
        data = " ".join(f"{kind}:{count}" for kind, count in counts.items())
        said = f'data-k="{data}" aria-label="{text(label)}"'
        if len(modes) == 1:
            return f"class={self._colour(next(iter(modes)))} {said}>{sign}{noted}"
        # Signs would be hard to read on stripes of several colours.
        return f'style="{self._stripes(modes)}" {said}><span>{sign}{noted}</span>'

    def _key(self, mode: str) -> str:
        """Return the sign of a mode in its colour."""
        return f"<span class='key {self._colour(mode)}'>{self._signs[mode]}</span>"

    def _colour(self, mode: str) -> str:
        """Return the class of the style that has the colour of a mode."""
        sign = self._signs[mode]
        return f"m{(int(sign) - 1) % _COLOURS}" if sign.isdecimal() else {"!": "dq", "·": "pl"}[sign]

    def _stripes(self, modes: Counter[str]) -> str:
        """Return the style of a cell whose modules have several modes, each as wide as its share."""
        total, end, stops = sum(modes.values()), 0, []
        for mode, count in modes.items():
            begin, end = end, end + count
            stops.append(f"var(--{self._colour(mode)}) {100 * begin // total}% {100 * end // total}%")
        return f"background:linear-gradient(90deg,{','.join(stops)})"

    def _others(self, entries: Sequence[tuple[str, int]]) -> str:
        """Return a table of the modules that are in no layer; empty without any."""
        rows = [
            (
                text(name),
                f"{self._key(first.delivered_mode)} {text(first.delivered_mode)}",
                text(first.stored_scheme or "plain"),
                bytes_of(first.stored_bytes),
                bytes_of(first.delivered_bytes),
            )
            for name, first in ((name, self._first[kind]) for name, kind in entries)
        ]
        headers = ("module", "mode", "stored", "on disk", "in the engine")
        return table("Outside of layers", headers, rows, numbers=2) if rows else ""


def _details(module: ModulePlan) -> list[tuple[str, str]]:
    """Return what the page says of modules of one kind, beside their names and number."""
    tensors = ", ".join(f"{delivery.name.rpartition('.')[2]} {delivery.spec}" for delivery in module.deliveries)
    entries = (
        ("mode", module.delivered_mode),
        ("stored", module.stored_scheme or "plain"),
        ("shape", " x ".join(map(str, module.weight.shape)) if module.weight else ""),
        ("delivered", tensors),
        ("bytes", f"{module.stored_bytes:,} on disk, {module.delivered_bytes:,} in the engine"),
        ("reason", module.reason),
        ("computed otherwise", module.note),
    )
    return [(label, value) for label, value in entries if value]

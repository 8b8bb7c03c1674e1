"""Lines of reports: texts of strangers shown harmlessly, faults folded by layer, deviations and warnings."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich import markup
from rich.console import Group, RenderableType
from rich.text import Text

from trtllm_ct.base.texts import printable
from trtllm_ct.cli.folding import fold_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from trtllm_ct.base.errors import Fault, TrtllmCtError
    from trtllm_ct.plan.plan import Plan

__all__ = ["deviations", "escape", "failure", "faults", "joined", "line", "problems", "warnings"]


def escape(text: str) -> str:
    """Return a text of a checkpoint for a cell of a table: markup and control characters are shown, not obeyed."""
    return markup.escape(printable(text))


def line(text: str, style: str = "") -> Text:
    """Return one line of a report; line breaks in names that it quotes don't break it."""
    return Text(printable(text), style=style)


def joined(*parts: str | tuple[str, str]) -> Text:
    """Return one line of a report, of texts with and without a style; see `line`."""
    return Text.assemble(
        *(printable(part) if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts)
    )


def faults(all_faults: Iterable[Fault], named: Iterable[Path | str | None] = ()) -> RenderableType:
    """Format faults; faults with the same text are shown once, with the names that they apply to folded.

    Files in the directories `named`, whose paths the report has shown before, are shown without their paths.
    """
    names_by_text: dict[tuple[str, str, str], list[str]] = {}
    known = [str(directory) for directory in named if directory is not None]
    for fault in all_faults:
        where = _inside(fault.where, known)
        names_by_text.setdefault((fault.expected, fault.found, fault.remedy), []).append(where)
    lines = []
    for (expected, found, remedy), names in names_by_text.items():
        where = "\n".join(fold_names(names))
        lines.append(
            Text.assemble((where, "bold red"), f"\n  expected {expected}\n  found    {found}\n  ", (remedy, "italic"))
        )
    return Group(*lines)


def _inside(where: str, directories: Iterable[str]) -> str:
    """Return the place of a fault, relative to the first of these directories that it is in."""
    prefixes = (f"{directory}{os.sep}" for directory in directories)
    return next((where[len(prefix) :] for prefix in prefixes if where.startswith(prefix)), where)


def failure(error: TrtllmCtError) -> RenderableType:
    """Format an error: its warnings, if it has any, and its faults.

    The path of a directory with several faulty files is shown once, above them.
    """
    parts: list[RenderableType] = [warnings(error.warnings)] if error.warnings else []
    places = (fault.where for fault in error.faults if fault.where.startswith(os.sep))
    folders = Counter(place.rpartition(os.sep)[0] for place in places)
    shared = [Path(folder) for folder, count in folders.items() if folder and count > 1]
    parts += (line(f"In {folder}:", style="bold red") for folder in shared)
    return Group(*parts, faults(error.faults, shared))


def problems(found: Sequence[Fault], named: Iterable[Path | str] = ()) -> RenderableType:
    """Format problems under a title with their number; `named` is that of `faults`."""
    return Group(line(f"Problems ({len(found)}):", style="bold red"), faults(found, named))


def deviations(plan: Plan) -> Iterator[RenderableType]:
    """Yield where the engine will compute differently from the schemes of the checkpoint; nothing if nowhere."""
    if plan.deviations:
        yield Text("Deviations from the schemes:", style="bold yellow")
        yield from (line(f"  {deviation}", style="yellow") for deviation in plan.deviations)


def warnings(texts: Iterable[str]) -> RenderableType:
    """Format warnings under a title, or one line that says that there are none."""
    lines = [line(f"  {text}", style="yellow") for text in texts]
    return Group(Text("Warnings:", style="bold yellow"), *lines) if lines else Text("Warnings: none")

"""Formats what `compare` prints: the verdict, then modules that are alike, folded over layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from trtllm_ct.base.texts import format_bytes, printable
from trtllm_ct.cli import lines
from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.tables import fitted_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtllm_ct.verify.compare import ComparedModule, DirectoryComparison

__all__ = ["comparison"]


def comparison(found: DirectoryComparison) -> RenderableType:
    """Format a comparison: the verdict, and a row for modules with the same schemes in both directories."""
    groups: dict[tuple[str, str, bool], list[ComparedModule]] = {}
    for module in found.modules:
        key = (module.first or "", module.second or "", not module.error)
        groups.setdefault(key, []).append(module)
    table = fitted_table("modules", "first", "second", "first bytes", "second bytes", "largest error")
    for (first, second, _), modules in sorted(groups.items(), key=lambda group: (group[0][2], group[0])):
        names = "\n".join(map(lines.escape, fold_names(module.name for module in modules)))
        table.add_row(names, first or "-", second or "-", *_bytes(modules), _error(modules, compared=found.compared))
    parts: list[RenderableType] = [
        Text(printable(f"{found.first} and {found.second}")),
        Text(f"  {found.verdict}", style="bold"),
        table,
    ]
    if found.faults:
        parts.append(lines.problems(found.faults, [found.first, found.second]))
    return Group(*parts)


def _bytes(modules: Sequence[ComparedModule]) -> tuple[str, str]:
    first = sum(module.first_bytes or 0 for module in modules)
    second = sum(module.second_bytes or 0 for module in modules)
    return format_bytes(first), format_bytes(second)


def _error(modules: Sequence[ComparedModule], *, compared: bool) -> str:
    """Return the largest error of modules, relative to the largest value of a row."""
    errors = [module.error for module in modules if module.error is not None]
    if not compared:
        return ""
    return f"{max(errors):.3g}" if errors else "not comparable"

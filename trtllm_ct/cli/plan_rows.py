"""The rows of a plan's two tables: tensors that differ only in their numbers of layers and experts share a row."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.cli.folding import fold_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.plan.plan import Delivery, StoredFate

__all__ = ["PlanRow", "delivered_rows", "stored_rows"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class PlanRow(NamedTuple):
    """Tensors that are alike: their folded names, and the texts of the other cells."""

    names: tuple[str, ...]
    cells: tuple[str, ...]


def stored_rows(fates: Iterable[StoredFate], *, unfold: bool) -> Iterator[PlanRow]:
    """Yield the rows of stored tensors: dtype and shape, fate, and what they are delivered as or why they are not.

    `unfold` gives each tensor a row of its own.
    """
    groups: dict[object, list[StoredFate]] = defaultdict(list)
    for fate in fates:
        alike = (_template(fate.name), fate.spec, fate.fate, tuple(map(_template, fate.by)), fate.reason)
        groups[fate.name if unfold else alike].append(fate)
    for members in groups.values():
        first = members[0]
        by = dict.fromkeys(name for fate in members for name in fate.by)
        cells = (str(first.spec), str(first.fate), ", ".join(fold_names(by)) or first.reason)
        yield PlanRow(fold_names(fate.name for fate in members), cells)


def delivered_rows(deliveries: Iterable[Delivery], *, unfold: bool) -> Iterator[PlanRow]:
    """Yield the rows of delivered tensors: dtype and shape, and operation; see `stored_rows`."""
    groups: dict[object, list[Delivery]] = defaultdict(list)
    for delivery in deliveries:
        alike = (_template(delivery.name), delivery.spec, delivery.operation.label)
        groups[delivery.name if unfold else alike].append(delivery)
    for members in groups.values():
        first = members[0]
        yield PlanRow(fold_names(delivery.name for delivery in members), (str(first.spec), first.operation.label))


def _template(name: str) -> str:
    """Return a dotted name with a star in place of each number."""
    return _NUMBER.sub("*", name)

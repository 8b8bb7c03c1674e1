"""Entries of stacked tensors: matrices that are written into one entry, transposed, or with their rows alternating.

A row of a matrix may be a column of its entry, so that it has no range of its own in the file. The rows are collected
until all lines of the entry are there; the entry is one range of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.checkpoint.write_plan import WritePlan

__all__ = ["StackEntries"]


class StackEntries:
    """The entries that are not complete yet; memory: these entries."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], tuple[NDArray[np.unsignedinteger], int]] = {}

    def add(self, plan: WritePlan, name: str, data: memoryview, begin: int) -> memoryview | None:
        """Add rows of a matrix or vector to its entry; return the bytes of the entry if that completes it, or None.

        `data` are whole rows, `begin` bytes after the first one; raises `ValueError` for other bytes.
        """
        import numpy as np

        part, spec = plan.stacks[name], plan.places[name].spec
        row_bytes = spec.nbytes // spec.shape[0]
        first, rest = divmod(begin, row_bytes)
        if rest or len(data) % row_bytes:
            raise ValueError(f"{name} is a part of {part.stack} and can be written in whole rows only")
        rows = np.frombuffer(data, f"u{spec.dtype.itemsize}").reshape(-1, row_bytes // spec.dtype.itemsize)
        key = part.stack, part.entry
        if key not in self._open:
            order = (rows.shape[1], part.lines) if part.transposed else (part.lines, rows.shape[1])
            self._open[key] = np.empty(order, rows.dtype), part.lines
        entry, missing = self._open.pop(key)
        lines = entry.T if part.transposed else entry
        lines[part.lines_of(first, len(rows))] = rows
        if missing == len(rows):
            return entry.reshape(-1).view(np.uint8).data
        self._open[key] = entry, missing - len(rows)
        return None

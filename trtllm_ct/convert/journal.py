"""The journal of a conversion: what is done, for the run that goes on after this one was killed.

A text file of one JSON object a line. The first names the conversion by its digest; each other one names a unit, the
runs of bytes that were written for it with their checksums, and what was seen in its values. A line is added when
the unit is complete. Nothing is trusted blindly: a later run reads the bytes and compares the sums.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from trtllm_ct.checkpoint.writer import Piece

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["JOURNAL", "Journal", "UnitRecord"]

JOURNAL = ".trtllm_ct.journal"
"""Its name in the working place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord:
    """What is known of a finished unit; `seen` are pairs of a module and what its values warn of."""

    unit: int
    pieces: tuple[Piece, ...]
    seen: tuple[tuple[str, str], ...] = ()

    def to_line(self) -> str:
        """The record as a line of the journal."""
        pieces = [[piece.file, piece.offset, piece.nbytes, piece.checksum] for piece in self.pieces]
        return json.dumps({"unit": self.unit, "pieces": pieces, "seen": self.seen}, separators=(",", ":"))

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """The record of a line's object; raises `KeyError`, `TypeError` or `ValueError` for one that is none."""
        return cls(
            unit=entry["unit"],
            pieces=tuple(
                Piece(file=file, offset=offset, nbytes=nbytes, checksum=checksum)
                for file, offset, nbytes, checksum in entry["pieces"]
            ),
            seen=tuple((module, warning) for module, warning in entry["seen"]),
        )


_SECONDS_IN_MEMORY = 2.0
"""For which nothing is written: a run that is killed sooner has little to lose.

The file is deleted at the end, which waits for the disk where the kernel has begun to write it there; of a short run,
that would be a tenth.
"""


class Journal:
    """The journal at `path`; `records` are the units of an earlier run, by number, that it names. Call `close`."""

    def __init__(self, path: Path, digest: str) -> None:
        self.records = _read(path, digest)
        self._waiting: list[str] = []
        self._begun = time.monotonic()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if not self.records:
            # Closing a file that was ever cut down to nothing waits for the disk on ext4, so one that is new is left.
            if os.fstat(self._descriptor).st_size:
                os.ftruncate(self._descriptor, 0)
            self._add(json.dumps({"conversion": digest}))
        else:
            # The last line may be cut short; a line break makes it a line of its own, which means nothing.
            self._add("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        try:
            self._write()
        finally:
            os.close(self._descriptor)

    def add(self, record: UnitRecord) -> None:
        """Note that a unit is complete."""
        self._add(record.to_line())

    def _add(self, line: str) -> None:
        self._waiting.append(f"{line}\n")
        if time.monotonic() - self._begun >= _SECONDS_IN_MEMORY:
            self._write()

    def _write(self) -> None:
        os.write(self._descriptor, "".join(self._waiting).encode())
        self._waiting.clear()


def _read(path: Path, digest: str) -> dict[int, UnitRecord]:
    """The records of an earlier run of the same conversion; none of another one's."""
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != {"conversion": digest}:
            return {}
    except (OSError, ValueError):
        return {}
    records = (_record(line) for line in lines)
    return {record.unit: record for record in records if record is not None}


def _record(line: str) -> UnitRecord | None:
    """The record of a line; None for one that was cut short."""
    try:
        return UnitRecord.from_entry(json.loads(line))
    except (KeyError, TypeError, ValueError):
        return None

"""The journal of a conversion: it records the finished units, so that a run can resume after an earlier one was killed.

The journal is a text file with one JSON object per line. The first line identifies the conversion by its digest, the
second lists all files that it writes: they are in the journal before they are made, and no other file in the directory
is ever removed. Each following line names a unit, the byte ranges that were written for it with their checksums, and
the warnings about its values. A line is added when the unit is complete. A later run verifies the records: it reads the
bytes and compares their checksums.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.manifest import MANIFEST
from trtllm_ct.checkpoint.output_files import Piece
from trtllm_ct.checkpoint.work_folder import JOURNAL, JOURNAL_BYTES, files_line, known_files, require_no_other_files

if TYPE_CHECKING:
    from collections.abc import Collection

    from typing_extensions import Self

    from trtllm_ct.checkpoint.folder import Folder

__all__ = ["Journal", "UnitRecord"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord:
    """The record of a finished unit: its number, the pieces of files that it wrote, and its warnings.

    `sample` is the `sample_hash` of what it was made from. `seen` holds pairs of a module name and a warning about the
    values of this module.
    """

    unit: int
    pieces: tuple[Piece, ...]
    sample: str = ""
    seen: tuple[tuple[str, str], ...] = ()

    def to_line(self) -> str:
        """Return the record as a line of the journal, without a line break."""
        pieces = [[piece.file, piece.offset, piece.nbytes, piece.checksum] for piece in self.pieces]
        entry = {"unit": self.unit, "pieces": pieces, "sample": self.sample, "seen": self.seen}
        return json.dumps(entry, separators=(",", ":"))

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """Return the record of the JSON object in a line.

        Raises `KeyError`, `TypeError` or `ValueError` when the object is not a record.
        """
        return cls(
            unit=entry["unit"],
            pieces=tuple(
                Piece(file=file, offset=offset, nbytes=nbytes, checksum=checksum)
                for file, offset, nbytes, checksum in entry["pieces"]
            ),
            sample=entry["sample"],
            seen=tuple((module, warning) for module, warning in entry["seen"]),
        )


_SECONDS_IN_MEMORY = 2.0
"""Time from the start of a run during which lines are only kept in memory.

A run that is killed within this time loses little work. A short run is faster without writes: the journal is deleted at
the end of a run, and the deletion waits for the disk if the kernel has begun to write the file back. That wait would be
a tenth of a short run.
"""


class Journal:
    """The journal in `folder`, opened for appending; use it as a context manager or call `close`.

    `files` are the names of all files that the conversion will write, and `kept` those of them that finished units are
    in. Everything else that an earlier run left is removed, and `kept` too if the journal is of another conversion.
    `records` holds the units of an earlier run of the same conversion, by number. With `at_once`, no line waits in
    memory: what the units were made from is removed when they are recorded. A journal of another conversion is
    discarded, and `discarded` is true then. Raises `UsageError`, and changes nothing, when the folder holds a file that
    neither this conversion nor the earlier one writes.
    """

    def __init__(
        self,
        folder: Folder,
        digest: str,
        files: Collection[str] = (),
        kept: Collection[str] = (),
        *,
        at_once: bool = False,
    ) -> None:
        known = known_files(folder) | frozenset(files)
        require_no_other_files(folder, known)
        text = _read(folder)
        records = _records(text, digest)
        self.records = records or {}
        self.discarded = bool(text) and records is None
        folder.remove_files((known | {MANIFEST}) - frozenset(() if records is None else kept) - {JOURNAL})
        self._unwritten_lines: list[str] = []
        self._at_once = at_once
        self._start_time = time.monotonic()
        self._descriptor = file_calls.open_file(JOURNAL, folder.descriptor, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if records is None:
            # On ext4, closing a file that was ever truncated to zero waits for the disk: don't truncate an empty file.
            if file_calls.status(self._descriptor).st_size:
                file_calls.truncate(self._descriptor, 0)
            self._add(json.dumps({"conversion": digest}))  # It begins with `CONVERSION_MARK`.
        else:
            # The last line may be cut short. A line break ends it, so that it is skipped when the journal is read.
            self._add("")
        if not known_files(folder) >= set(files):  # A full disk has no room for what is there already.
            self._add(files_line(files).decode().rstrip())
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self.close()
        else:
            with suppress(OSError):  # The first error is the one to report.
                self.close()

    def close(self) -> None:
        """Write the lines that are still in memory, and close the file."""
        try:
            self._write()
        finally:
            file_calls.close(self._descriptor)

    def add(self, record: UnitRecord) -> None:
        """Record that a unit is complete."""
        self._add(record.to_line())

    def _add(self, line: str) -> None:
        self._unwritten_lines.append(f"{line}\n")
        if self._at_once or time.monotonic() - self._start_time >= _SECONDS_IN_MEMORY:
            self._write()

    def _write(self) -> None:
        data = "".join(self._unwritten_lines).encode()
        self._unwritten_lines.clear()
        while data:
            data = data[file_calls.write(self._descriptor, data) :]


def _read(folder: Folder) -> str:
    """Return the text of a journal; empty if there is none, or if it can't be read."""
    try:
        return folder.read(JOURNAL, JOURNAL_BYTES).decode()
    except (OSError, ValueError):
        return ""


def _records(text: str, digest: str) -> dict[int, UnitRecord] | None:
    """Return the records of an earlier run by unit; None if the journal is of another conversion."""
    header, *lines = text.splitlines() or [""]
    try:
        if json.loads(header) != {"conversion": digest}:
            return None
    except ValueError:
        return None
    records = (_parse_record(line) for line in lines)
    return {record.unit: record for record in records if record is not None}


def _parse_record(line: str) -> UnitRecord | None:
    """Return the record of a line, or None if the line was cut short."""
    try:
        return UnitRecord.from_entry(json.loads(line))
    except (KeyError, TypeError, ValueError):
        return None

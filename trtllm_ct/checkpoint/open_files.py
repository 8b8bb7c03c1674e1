"""OpenFiles: descriptors of the weight files of a checkpoint, a few at a time.

A checkpoint may have thousands of shards, and a process may have as few as 64 files open.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from trtllm_ct.base.regular_files import regular_descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Self

__all__ = ["OpenFiles"]

_MAX_UNUSED = 8


@dataclass(slots=True)
class _OpenFile:
    """A file that is open, and how many use it."""

    descriptor: int
    users: int = 0


class OpenFiles:
    """Opens files of a directory for reading, and keeps the last `_MAX_UNUSED` open; may be used by several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; no thread may be reading."""
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    @contextmanager
    def descriptor(self, name: str) -> Iterator[int]:
        """Yield the descriptor of a regular file. Raises `OSError` when it can't be opened."""
        with self._lock:
            if name not in self._files:
                self._files[name] = _OpenFile(regular_descriptor(self._directory / name))
            file = self._files[name]
            self._files.move_to_end(name)
            file.users += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1
                self._close_unused()

    def _close_unused(self) -> None:
        unused = [name for name, file in self._files.items() if not file.users]
        for name in unused[: max(0, len(unused) - _MAX_UNUSED)]:
            os.close(self._files.pop(name).descriptor)

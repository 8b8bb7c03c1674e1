"""Open files that strangers wrote: only regular files, and only up to a size that fits their kind.

A directory may hold anything under the name of config.json: a named pipe, which would block, a device, which never
ends, or a sparse file of 100 GB. So a path is examined before it is opened, and what was opened is examined again,
before the first byte is read. What can't be used is an `OSError` whose text says what was found.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "CODE_BYTES",
    "CONFIGURATION_BYTES",
    "INDEX_BYTES",
    "RECIPE_BYTES",
    "SIDE_FILE_BYTES",
    "is_present",
    "open_beneath",
    "open_regular",
    "read_at",
    "read_bounded",
    "read_descriptor",
    "regular_descriptor",
]

_MB = 10**6
CONFIGURATION_BYTES = 32 * _MB
"""Largest JSON file of a configuration that is read. One that lists all experts of Kimi-K2 has 8 MB."""

INDEX_BYTES = 150 * _MB
"""Largest index that is read; one of 10^6 tensors has 100 MB."""

RECIPE_BYTES = 4 * _MB
"""Largest recipe.yaml that is read."""

CODE_BYTES = 4 * _MB
"""Largest Python file that is searched for its imports."""

SIDE_FILE_BYTES = 1000 * _MB
"""Largest side file that is copied; tokenizers have up to 40 MB."""

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_KINDS = (
    (stat.S_ISDIR, "is a directory"),
    (stat.S_ISFIFO, "a named pipe, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
)


def is_present(path: Path) -> bool:
    """Whether a directory has an entry of this name, of whatever kind; a link that leads nowhere counts.

    Raises `OSError` where that can't be told: a disk that fails is no reason to take a file for missing.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def open_regular(path: Path, limit: int | None = None) -> Iterator[int]:
    """Yield the descriptor of a regular file, and close it afterwards; see `regular_descriptor`."""
    descriptor = regular_descriptor(path, limit)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def regular_descriptor(path: Path, limit: int | None = None) -> int:
    """Return the descriptor of a regular file, opened for reading; links are followed.

    Raises `OSError` for anything else than a regular file, for one of more than `limit` bytes, and for one that can't
    be opened.
    """
    # Opening a device can have an effect, so what is known to be one is not opened.
    _require_regular(path.stat(), path, limit)
    return _examined(os.open(path, _FLAGS), path, limit)


@contextmanager
def open_beneath(root: Path, path: Path, limit: int | None = None) -> Iterator[int]:
    """Yield the descriptor of a regular file, following no link on the way from `root` to it.

    `path` is in or below `root`, and neither has links, as after `Path.resolve`: where somebody has put a link in the
    meantime, this raises `OSError`, as `open_regular` does.
    """
    *folders, name = path.relative_to(root).parts
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        _require_regular(os.stat(name, dir_fd=folder, follow_symlinks=False), path, limit)
        descriptor = os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
    _examined(descriptor, path, limit)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; raises `OSError`, see `open_regular`."""
    with open_regular(path, limit) as descriptor:
        return read_descriptor(descriptor, limit)


def read_descriptor(descriptor: int, limit: int) -> bytes:
    """Return what an open file holds from its position on, at most `limit` bytes.

    A read may return less than it was asked for, on network disks too.
    """
    pieces = []
    while limit > 0 and (piece := os.read(descriptor, limit)):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def read_at(descriptor: int, nbytes: int, offset: int) -> bytes:
    """Return what an open file holds from a byte on, less than `nbytes` only at its end; see `read_descriptor`."""
    pieces = []
    while nbytes > 0 and (piece := os.pread(descriptor, nbytes, offset)):
        pieces.append(piece)
        nbytes -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _examined(descriptor: int, path: Path, limit: int | None) -> int:
    """Return the descriptor of a regular file; close any other and raise `OSError`."""
    try:
        _require_regular(os.fstat(descriptor), path, limit)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(status: os.stat_result, path: Path, limit: int | None) -> None:
    found = next((words for is_kind, words in _KINDS if is_kind(status.st_mode)), None)
    if found is not None:
        raise OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, found, str(path))
    if limit is not None and status.st_size > limit:
        found = f"{status.st_size} bytes, where at most {limit} are read"
        raise OSError(errno.EFBIG, found, str(path))

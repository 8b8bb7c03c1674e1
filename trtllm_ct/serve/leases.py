"""Who uses a directory: locks that processes hold on one file in it, so that nobody deletes it behind a server's back.

A lease is a shared `flock` that the kernel drops when the process ends, however it ends, so none is ever stale.
File systems without locks give none; there nobody can prove that a directory is unused, and it counts as used.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["hold", "unused"]

_held: dict[Path, int] = {}
"""Descriptors by file, open as long as this process lives."""


def hold(file: Path, *, named: Path | None = None) -> bool:
    """Take a lease on a file's directory until this process ends; False when the file isn't there any more.

    `named` is what the file will be called, when its directory is about to get its name. Needs no permission to write.
    Taking a lease twice is taking it once.
    """
    named = named or file
    if named in _held and _is_called(_held[named], named):
        return True
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    _lock(descriptor, exclusive=False)
    # Whoever deletes a directory has the exclusive lock while it moves it away: after ours it is away, or stays.
    if not _is_called(descriptor, file):
        os.close(descriptor)
        return False
    if named in _held:
        os.close(_held.pop(named))
    _held[named] = descriptor
    return True


@contextmanager
def unused(file: Path) -> Iterator[bool]:
    """Whether no process, this one included, holds a lease; while the block runs none gets one.

    False as well for a file that this user can't write, and where nobody can tell.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, exclusive=True)
    finally:
        os.close(descriptor)


def _is_called(descriptor: int, file: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lock(descriptor: int, *, exclusive: bool) -> bool:
    """Lock an open file; a shared lock is waited for, an exclusive one is had at once or not at all."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except OSError:  # held by somebody, or a file system without locks
        return False
    return True

"""Leases: file locks that mark a directory as in use, so that it is not deleted while a server needs it.

A lease is a shared `flock` on one file of the directory. The kernel releases it when the process ends for any reason,
so there are no stale leases. On a file system without locks nobody can prove that a directory is unused, so a directory
there always counts as in use.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["hold", "unused"]

_PATIENCE_SECONDS = 1.0
"""How long a lease waits for a lock that another process holds."""

_held: dict[Path, int] = {}
"""The open file descriptors that hold this process's leases, by file; they stay open until the process ends."""


def hold(file: Path, *, named: Path | None = None) -> bool:
    """Take a lease on the directory of `file` until this process ends; return False when the file does not exist.

    `named` is the future path of the file, for a directory that is about to be renamed. Read permission is enough.
    A second call for the same file changes nothing. Raises `OSError` when another process keeps the file locked.
    """
    named = named or file
    if named in _held and _is_same_file(_held[named], named):
        return True
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not _lock(descriptor, exclusive=False):
        os.close(descriptor)
        raise OSError(errno.EWOULDBLOCK, "another process, maybe of another user, keeps it locked", str(file))
    # A process that deletes the directory holds the exclusive lock while it renames it. So once the shared lock is
    # granted, the directory has either been renamed, which the next line detects, or it stays.
    if not _is_same_file(descriptor, file):
        os.close(descriptor)
        return False
    if named in _held:
        os.close(_held.pop(named))
    _held[named] = descriptor
    return True


@contextmanager
def unused(file: Path) -> Iterator[bool]:
    """Yield whether no process holds a lease on the directory of `file`; this process counts too.

    If it yields True, no process can take a lease until the block ends. It also yields False when this user can't write
    the file, and on a file system without locks.
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


def _is_same_file(descriptor: int, file: Path) -> bool:
    """Whether the path `file` still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lock(descriptor: int, *, exclusive: bool) -> bool:
    """Lock an open file and return whether it worked.

    An exclusive lock is not waited for, and a shared one for a second: a process that deletes a directory holds the
    file for milliseconds. A file system without locks grants all shared ones and no exclusive one.
    """
    import fcntl

    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    deadline = time.monotonic() + (0 if exclusive else _PATIENCE_SECONDS)
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        except OSError:
            return not exclusive
        else:
            return True

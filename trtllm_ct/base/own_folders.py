"""Folders into which only this user can write: what they hold may be trusted as one's own.

Machine code is executed and prepared directories are served, so a folder for them must be safe from other users: owned
by this user, and reached through folders that no other user can write to. A folder that anybody can write to may be on
the way if it has the sticky bit, as /tmp has: nobody can rename or remove what this user owns there. Folders of root
are trusted, as the program itself is root's.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_own", "open_own_folder", "require_own"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@contextmanager
def open_own_folder(path: Path, *, create: bool, private: bool = False) -> Iterator[int]:
    """Yield the descriptor of a folder that is this user's own.

    With `create`, missing folders on the way are created with mode 0700; with `private`, a folder that exists gets this
    mode too. Links are resolved first; the folders
    that they lead to are examined. Raises `OSError` whose text says which folder other users own or can write to, and
    for folders that are missing or can't be created.
    """
    parts = Path(os.path.realpath(path)).parts
    place = Path(parts[0])
    folder = os.open(place, _FOLDER)
    try:
        _require_safe_way(os.fstat(folder), place)
        for part in parts[1:]:
            place /= part
            inner = _open_inner(folder, part, create=create)
            os.close(folder)
            folder = inner
            _require_safe_way(os.fstat(folder), place)
        require_own(os.fstat(folder), place)
        if private and stat.S_IMODE(os.fstat(folder).st_mode) != stat.S_IRWXU:
            os.fchmod(folder, stat.S_IRWXU)
        yield folder
    finally:
        os.close(folder)


def is_own(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and no other user can write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE


def require_own(status: os.stat_result, path: Path) -> None:
    """Raise `OSError` unless a file or folder belongs to this user, and no other user can write to it."""
    if status.st_uid != os.geteuid():
        raise OSError(errno.EPERM, f"user {status.st_uid} owns it, not user {os.geteuid()}", str(path))
    if status.st_mode & _OTHERS_WRITE:
        found = f"other users can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
        raise OSError(errno.EPERM, found, str(path))


def _open_inner(folder: int, name: str, *, create: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):  # another process made it; whose it is will be examined
        os.mkdir(name, stat.S_IRWXU, dir_fd=folder)
    return os.open(name, _FOLDER, dir_fd=folder)


def _require_safe_way(status: os.stat_result, place: Path) -> None:
    """Raise `OSError` for a folder that lets another user replace what is below it."""
    if status.st_uid not in {0, os.geteuid()}:
        raise OSError(errno.EPERM, f"user {status.st_uid} owns it, not user {os.geteuid()}", str(place))
    if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
        found = f"other users can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
        raise OSError(errno.EPERM, found, str(place))

"""`open_work_folder`: make the working directory of a conversion, or open the one that an earlier run left.

Its name can be guessed, and others may be able to write to the folder above. So a directory that already has the name
is used only if it belongs to this user and nobody else can write to it, and it is closed to others while it is used.
"""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.folder import Folder

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

__all__ = ["is_ours", "is_private", "open_work_folder"]

logger = logging.getLogger("trtllm_ct")

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ATTEMPTS = 10


class WorkFolder(Folder):
    """A working directory; a process that unpickles it opens it by its path and checks it again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path,)


def _reopened(path: Path) -> WorkFolder:
    """Open the working directory of another process of the same user; raises `UsageError` if it is not private."""
    work = WorkFolder(path, file_calls.open_directory(str(path)))
    status = file_calls.status(work.descriptor)
    if not (is_ours(status, path.parent) and is_private(status, path.parent)):
        work.close()
        raise _refused(path, "a directory in which others can write", "Choose an output in a folder of your own.")
    return work


def open_work_folder(parent: Folder, path: Path) -> Folder:
    """Make or open the directory `path` in `parent`, with mode 0700, and lock it until it is closed.

    A directory of this user in which others can write is emptied: what it holds may be theirs. Raises `UsageError` for
    anything else that has the name, which is neither entered nor changed, and when another process holds the lock.
    On file systems without locks, none is taken.
    """
    for _ in range(_ATTEMPTS):
        try:
            file_calls.make_directory(path.name, parent.descriptor, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            remedy = "Choose an output directory in a place that you can write to."
            raise _refused(path, f"{error.strerror or error}".lower(), remedy) from None
        work = _opened(parent, path)
        if work is not None:
            return work
    raise _refused(path, "a directory that others keep replacing", "Choose a place of your own.")


def _opened(parent: Folder, path: Path) -> Folder | None:
    """Open, check and lock the directory; None if it vanished or was removed, so that it has to be made again."""
    status = parent.status(path.name)
    if status is None:
        return None
    if not stat.S_ISDIR(status.st_mode):
        found = "a link of that name" if stat.S_ISLNK(status.st_mode) else "a file of that name"
        raise _refused(path, found, "Move it away, or choose another output.")
    if not is_ours(status, parent.path):
        found = f"a directory of another user, with the number {status.st_uid}"
        raise _refused(path, found, "Ask that user to remove it, or choose an output in a folder of your own.")
    work = WorkFolder(path, file_calls.open_directory(path.name, parent.descriptor))
    try:
        if not is_ours(file_calls.status(work.descriptor), parent.path):
            work.close()
            return None
        _lock(work)
        if not parent.is_at(path.name, work):  # The process that held the lock has finished, or removed it.
            work.close()
            return None
        if not is_private(file_calls.status(work.descriptor), parent.path):
            file_calls.set_mode(work.descriptor, 0o700)
            logger.warning("%s: emptied, others could write to it; starting anew", path)
            work.clear()
        file_calls.set_mode(work.descriptor, 0o700)
    except BaseException:
        work.close()
        raise
    return work


def _lock(work: Folder) -> None:
    try:
        file_calls.lock(work.descriptor)
    except BlockingIOError:
        remedy = "Wait until it is done, or choose another output."
        raise _refused(work.path, "another process that writes there", remedy) from None
    except OSError:
        return  # A file system without locks.


def is_ours(status: os.stat_result, parent: Path) -> bool:
    """Whether a directory in `parent` belongs to this user.

    Some file systems show another owner for all that this process makes: those that turn root into nobody, and those
    without owners. A directory with a name that nobody can guess shows which.
    """
    return status.st_uid == os.geteuid() or status.st_uid == _as_made(parent)[0]


def is_private(status: os.stat_result, parent: Path) -> bool:
    """Whether nobody else can write to a directory of this user in `parent`, or the file system has no modes."""
    return not status.st_mode & _OTHERS_WRITE or bool(_as_made(parent)[1] & _OTHERS_WRITE)


def _as_made(parent: Path) -> tuple[int, int]:
    """Return owner and mode that the file system shows for a directory which this process makes with mode 0700."""
    try:
        probe = mkdtemp(prefix=".trtllm_ct-", dir=parent)
    except OSError:
        return os.geteuid(), 0o700
    try:
        status = os.lstat(probe)
    finally:
        with suppress(OSError):
            file_calls.remove_directory(probe)
    return status.st_uid, status.st_mode


def _refused(path: Path, found: str, remedy: str) -> UsageError:
    return UsageError(Fault(where=str(path), expected="a place for a new directory", found=found, remedy=remedy))

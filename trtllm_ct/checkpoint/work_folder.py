"""`open_work_folder`: make the working directory of a conversion, or open the one that an earlier run left.

Its name can be guessed, and others may be able to write to the folder above. So a directory that already has the name
is used only if it belongs to this user and nobody else can write to it, and it is closed to others while it is used.
A user may have such a directory too, so it must also hold proof that a conversion made it: see `Mark`.
Nor is every file in it one of a conversion. The journal lists those that are, before they are written, and no other is
removed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import stat
from contextlib import suppress
from enum import Enum, auto
from typing import TYPE_CHECKING

from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.checkpoint.manifest import MANIFEST, listed_in_manifest, reason_to_keep
from trtllm_ct.checkpoint.output_errors import unusable

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path
    from typing import Any

__all__ = [
    "CONVERSION_MARK",
    "DOWNLOADS",
    "JOURNAL",
    "JOURNAL_BYTES",
    "Mark",
    "WorkFolder",
    "files_line",
    "is_ours",
    "is_private",
    "journal_files",
    "known_files",
    "mark_of",
    "open_work_folder",
    "other_files",
    "remove_files_and_mark",
    "remove_marked",
    "require_no_other_files",
    "require_own_directory",
]

logger = logging.getLogger("trtllm_ct")

JOURNAL = ".trtllm_ct.journal"
"""The name of the journal in a working directory, see `convert/journal.py`. It also says whose the directory is."""

CONVERSION_MARK = b'{"conversion": "'
"""How the journal of a conversion begins; it is empty until the first line is written."""

REPLACED_MARK = b'{"replaced": true}\n'
"""The journal that an old output gets before it is removed; the list of its files follows."""

DOWNLOADS = ".download"
"""The folder in a working directory for files of a source that is far away."""

JOURNAL_BYTES = 2**30
"""Size of the longest journal that is read; one of 1 TB of output has a hundredth of this."""

_FILES_MARK = b'{"files": ['

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
    with Folder(path.parent) as parent:
        usable = is_ours(status, parent) and is_private(status, parent)
    if not usable:
        work.close()
        raise unusable(path, "a directory in which others can write", "Choose an output in a folder of your own.")
    return work


def open_work_folder(parent: Folder, path: Path) -> Folder:
    """Make or open the directory `path` in `parent`, with mode 0700, and lock it until it is closed.

    A working directory of this user in which others can write is emptied: what it holds may be theirs. What is left of
    an old output is removed. Raises `UsageError` for anything else that has the name, which is not changed, and when
    another process holds the lock.
    On file systems without locks, none is taken.
    """
    for _ in range(_ATTEMPTS):
        try:
            file_calls.make_directory(path.name, parent.descriptor, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            remedy = "Choose an output directory in a place that you can write to."
            raise unusable(path, f"{error.strerror or error}".lower(), remedy) from None
        work = _opened(parent, path)
        if work is not None:
            return work
    raise unusable(path, "a directory that others keep replacing", "Choose a place of your own.")


def _opened(parent: Folder, path: Path) -> Folder | None:
    """Open, check and lock the directory; None if it vanished or was removed, so that it has to be made again."""
    status = parent.status(path.name)
    if status is None:
        return None
    require_own_directory(status, parent, path)
    work = WorkFolder(path, file_calls.open_directory(path.name, parent.descriptor))
    try:
        if not is_ours(file_calls.status(work.descriptor), parent):
            work.close()
            return None
        _lock(work)
        if not parent.is_at(path.name, work):  # The process that held the lock has finished, or removed it.
            work.close()
            return None
        _take_over(work, parent)
    except BaseException:
        work.close()
        raise
    return work


def require_own_directory(status: os.stat_result, parent: Folder, path: Path) -> None:
    """Raise `UsageError` unless what is at `path` in `parent`, with this status, is a directory of this user."""
    if not stat.S_ISDIR(status.st_mode):
        found = "a link of that name" if stat.S_ISLNK(status.st_mode) else "a file of that name"
        raise unusable(path, found, "Move it away, or choose another output.")
    if not is_ours(status, parent):
        found = f"a directory of another user, with the number {status.st_uid}"
        raise unusable(path, found, "Ask that user to remove it, or choose an output in a folder of your own.")


def _take_over(work: Folder, parent: Folder) -> None:
    """Close the directory to others, and let it hold nothing but a journal and the work that belongs to it.

    Raises `UsageError` if no conversion made it, or not all that it would have to be emptied of; it is left as it is
    then.
    """
    mark = mark_of(work, parent)
    if mark is Mark.NONE:
        remedy = "Move it away if you need it, otherwise delete it; or choose another output."
        raise unusable(work.path, "a directory that no conversion has left there", remedy)
    private = is_private(file_calls.status(work.descriptor), parent)
    known = known_files(work)
    if not private or mark in {Mark.REPLACED, Mark.LISTED}:
        require_no_other_files(work, known)
    file_calls.set_mode(work.descriptor, 0o700)
    if not private:
        logger.warning("%s: emptied, others could write to it; starting anew", work.path)
    elif mark in {Mark.REPLACED, Mark.LISTED}:
        logger.warning("%s: emptied, it held an output of an earlier run that was stopped at its end", work.path)
    elif mark is Mark.WORK:
        return
    if mark is Mark.LISTED:
        work.write(JOURNAL, REPLACED_MARK + files_line(known))
    work.remove_files(known)
    work.write(JOURNAL, b"")


def _lock(work: Folder) -> None:
    try:
        file_calls.lock(work.descriptor)
    except BlockingIOError:
        remedy = "Wait until it is done, or choose another output."
        raise unusable(work.path, "another process that writes there", remedy) from None
    except OSError:
        return  # A file system without locks.


class Mark(Enum):
    """What a directory says about who made it."""

    NONE = auto()
    """Nothing: it is somebody else's."""
    EMPTY = auto()
    WORK = auto()
    """It has the journal of a conversion, which is the first file that is written there and the last that goes."""
    REPLACED = auto()
    """It is an old output that was being removed."""
    LISTED = auto()
    """It is a whole output in which nothing was added or changed."""


def mark_of(folder: Folder, parent: Folder) -> Mark:
    """Return what a directory in `parent` says about who made it; only a file of this user counts."""
    if not folder.names():
        return Mark.EMPTY
    status = folder.status(JOURNAL)
    if status is not None:
        if not stat.S_ISREG(status.st_mode) or not is_ours(status, parent):
            return Mark.NONE
        start = folder.read_start(JOURNAL, len(CONVERSION_MARK))
        if start == REPLACED_MARK[: len(CONVERSION_MARK)]:
            return Mark.REPLACED
        # A kill may cut the first line short, and a power cut leave zeros.
        return Mark.WORK if CONVERSION_MARK.startswith(start) or not start.strip(b"\0") else Mark.NONE
    try:
        return Mark.NONE if reason_to_keep(folder, force=False) is not None else Mark.LISTED
    except OSError:
        return Mark.NONE


def remove_marked(parent: Folder, name: str, folder: Folder) -> None:
    """Remove an old output, which is `name` in `parent`, so that a later run may go on with it after any stop.

    A file that is put there meanwhile, or was put there before that later run, stays, and so does the directory: then
    this raises `OSError`.
    """
    if folder.status(JOURNAL) is None:
        files = frozenset(folder.files())
        with suppress(OSError):  # A full disk has no room for the mark, and then the list of an output goes last.
            folder.write(JOURNAL, REPLACED_MARK + files_line(files))
    else:
        files = known_files(folder)
    remove_files_and_mark(parent, name, folder, files)


def remove_files_and_mark(parent: Folder, name: str, folder: Folder, files: Collection[str]) -> None:
    """Remove the named files of a directory, which is `name` in `parent`, then its journal and itself.

    Where another file is in it, journal and directory stay, and this raises `OSError`.
    """
    folder.remove_files(set(files) - {MANIFEST, JOURNAL})
    if others := other_files(folder, ()):
        raise OSError(errno.ENOTEMPTY, f"files of somebody else are in it: {format_names(map(ascii, others))}")
    folder.remove(MANIFEST)
    folder.remove(JOURNAL)
    file_calls.remove_directory(name, parent.descriptor)


def files_line(files: Collection[str]) -> bytes:
    """Return the line of a journal that lists files; names are those of `Folder.files`."""
    return (json.dumps({"files": sorted(files)}) + "\n").encode()


def journal_files(folder: Folder) -> frozenset[str] | None:
    """Return the files that the journal of a directory lists, None if it lists none; a damaged line counts for none.

    The names are only compared with those in the directory; no path is made of them. Raises `OSError`.
    """
    if folder.status(JOURNAL) is None:
        return None
    lists = []
    for line in folder.read(JOURNAL, JOURNAL_BYTES).splitlines():
        if line.startswith(_FILES_MARK):
            with suppress(ValueError, RecursionError):
                lists.append(json.loads(line)["files"])
    return frozenset(name for names in lists for name in names if isinstance(name, str)) if lists else None


def known_files(folder: Folder) -> frozenset[str]:
    """Return the files that a conversion wrote, or was going to write, by the journal and the list in a directory."""
    return (journal_files(folder) or frozenset()) | listed_in_manifest(folder)


def other_files(folder: Folder, known: Collection[str]) -> list[str]:
    """Return the files in a directory that are none of `known`, and not journal or list of an output either."""
    return [name for name in folder.files() if name not in known and name not in {JOURNAL, MANIFEST}]


def require_no_other_files(work: Folder, known: Collection[str]) -> None:
    """Raise `UsageError` if a working directory holds files that are none of `known`, which nobody may remove."""
    if others := other_files(work, known):
        found = f"files that no conversion wrote: {format_names(map(ascii, others))}"
        raise unusable(work.path, found, "Move these files away, and run the same command again.")


def is_ours(status: os.stat_result, parent: Folder) -> bool:
    """Whether a file or directory in or below `parent` belongs to this user.

    Some file systems show another owner for all that this process makes: those that turn root into nobody, and those
    without owners. A directory with a name that nobody can guess shows which.
    """
    return status.st_uid == os.geteuid() or status.st_uid == _as_made(parent)[0]


def is_private(status: os.stat_result, parent: Folder) -> bool:
    """Whether nobody else can write to a directory of this user in `parent`, or the file system has no modes."""
    return not status.st_mode & _OTHERS_WRITE or bool(_as_made(parent)[1] & _OTHERS_WRITE)


def _as_made(parent: Folder) -> tuple[int, int]:
    """Return owner and mode that the file system shows for a directory which this process makes with mode 0700."""
    name = f".trtllm_ct-{secrets.token_hex(8)}"
    try:
        file_calls.make_directory(name, parent.descriptor, 0o700)
    except OSError:
        return os.geteuid(), 0o700
    try:
        status = file_calls.status_of(name, parent.descriptor)
    finally:
        with suppress(OSError):
            file_calls.remove_directory(name, parent.descriptor)
    return status.st_uid, status.st_mode

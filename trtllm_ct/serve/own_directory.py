"""Whether a prepared directory is what this user made: who owns it, and what its files hold.

An engine reads configuration, tokenizer and code from such a directory, so another user who can write there decides
what it runs. Its folder and files belong to this user, nobody else can write to them, and they have the content that
was written.
"""

from __future__ import annotations

import errno
import os
import stat
from hashlib import sha256
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, SidecarError
from trtllm_ct.base.own_folders import open_own_folder, require_own
from trtllm_ct.base.regular_files import CONFIGURATION_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["contents_of", "is_written_here", "make_private", "require_contents", "require_own_directory"]

_MAX_DEPTH = 32
"""The most folders in each other; prepared directories have two."""

_CONFIGURATION_FILES = frozenset({"config.json", "hf_quant_config.json", "quant_cfg.json", "trtllm_ct.json"})

_REMEDY = (
    "Call trtllm_ct.prepare again as the user who runs the engine, with TRTLLM_CT_CACHE set to a directory that no "
    "other user can write to."
)


def require_own_directory(directory: Path) -> None:
    """Raise `SidecarError` unless a directory and its files belong to this user, and no other user can write to them.

    Links in it must belong to this user too; what they lead to is the source, which is not examined.
    """
    try:
        with open_own_folder(directory, create=False):
            pass
        for path in _entries(directory):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):  # the mode of a link says nothing
                status = os.stat_result((status.st_mode & ~0o777, *status[1:]))
            require_own(status, path)
    except OSError as error:
        found = error.strerror or str(error)
        expected = "a prepared directory of this user, to which no other user can write"
        raise SidecarError(
            Fault(where=str(error.filename or directory), expected=expected, found=found, remedy=_REMEDY)
        ) from None


def make_private(directory: Path) -> None:
    """Let only this user write the files and folders of a directory, whatever the umask was."""
    for path in (directory, *_entries(directory)):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o077)


def contents_of(directory: Path, *, without: str) -> dict[str, str]:
    """Return what each file of a directory is, by its relative name: the hash of its content, or where its link leads.

    `without` is the name of the file that records it.
    """
    contents = {}
    for path in _entries(directory):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            contents[name] = f"link {path.readlink()}"
        elif name != without and not path.is_dir():
            contents[name] = sha256(read_bounded(path, CONFIGURATION_BYTES)).hexdigest()
    return contents


def require_contents(directory: Path, recorded: Mapping[str, str], *, without: str) -> None:
    """Raise `SidecarError` unless a directory has the files that are recorded, with the same content, and no others."""
    try:
        found = contents_of(directory, without=without)
    except OSError as error:
        found = {str(error.filename): ""}
    changed = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    if changed:
        raise SidecarError(
            Fault(
                where=str(directory),
                expected="the files that trtllm_ct.prepare wrote, unchanged",
                found=f"other content of {', '.join(changed[:5])}",
                remedy="Delete the directory and call trtllm_ct.prepare again.",
            )
        )


def is_written_here(directory: Path) -> bool:
    """Whether a directory belongs to this user and holds nothing but what `prepare` writes: links and configurations.

    A damaged or half-written one counts too.
    """
    try:
        if directory.is_symlink() or not directory.is_dir():
            return False
        require_own_directory(directory)
        return all(
            path.is_symlink() or path.is_dir() or path.relative_to(directory).as_posix() in _CONFIGURATION_FILES
            for path in _entries(directory)
        )
    except (OSError, SidecarError):
        return False


def _entries(directory: Path) -> Iterator[Path]:
    """Yield everything in and below a directory; links are not followed. Raises `OSError` for folders too deep."""
    pending = [(directory, 0)]
    while pending:
        folder, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"more than {_MAX_DEPTH} folders in each other", str(folder))
        with os.scandir(folder) as entries:
            for entry in entries:
                yield folder / entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append((folder / entry.name, depth + 1))

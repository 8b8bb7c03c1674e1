"""The directory of sidecars: new sidecars appear in it atomically, and unused ones can be deleted."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, SidecarError
from trtllm_ct.base.own_folders import open_own_folder, require_own
from trtllm_ct.config.detect import SIDECAR_FILE
from trtllm_ct.serve.leases import hold, unused
from trtllm_ct.serve.own_directory import is_written_here, require_own_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CACHE", "ClearedSidecars", "cache_root", "cached_sidecars", "clear_sidecars", "new_sidecar_directory"]

CACHE = "TRTLLM_CT_CACHE"
"""Environment variable: the directory of sidecars."""

_STALE_SECONDS = 3600
"""The age at which a temporary directory counts as left behind by a killed process.

Writing a sidecar takes milliseconds.
"""


_SIDECAR_NAME = re.compile(r"[0-9a-f]{32}")
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{8}\.partial")
"""The names that `sidecar.py` and `_temporary_path` give, which nobody gives by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearedSidecars:
    """What `clear_sidecars` did.

    `removed` are the directories that it deleted, `in_use` those it kept because they are in use or not writable, and
    `others` those it kept because they are not what `prepare` writes: another user's, or with files of somebody else.
    """

    removed: tuple[Path, ...]
    in_use: tuple[Path, ...]
    others: tuple[Path, ...] = ()


def cache_root() -> Path:
    """Return the directory of sidecars: `TRTLLM_CT_CACHE`, or `trtllm-ct` in the user's cache directory."""
    configured = os.environ.get(CACHE) or os.environ.get("XDG_CACHE_HOME")
    if configured:
        return Path(configured) if os.environ.get(CACHE) else Path(configured) / "trtllm-ct"
    home = os.path.expanduser("~")  # noqa: PTH111 (that of pathlib is an error where there is none)
    if not home.startswith("/"):
        remedy = f"Set HOME, or {CACHE} to a directory that this user alone can write to."
        fault = Fault(where="HOME", expected="the home directory of this user", found="none", remedy=remedy)
        raise SidecarError(fault)
    return Path(home) / ".cache" / "trtllm-ct"


def cached_sidecars(root: Path | None = None) -> tuple[Path, ...]:
    """Return the sidecar directories in `root`, intact or damaged, sorted by name. `root` defaults to `cache_root()`.

    Raises `SidecarError` if `root` can't be looked at.
    """
    root = root or cache_root()
    names = (name for name in _names(root) if not name.startswith("."))
    return tuple(root / name for name in names if os.path.lexists(root / name / SIDECAR_FILE))


def clear_sidecars(root: Path | None = None) -> ClearedSidecars:
    """Delete the sidecars in `root` that no running process made or loaded. `root` defaults to `cache_root()`.

    A directory is deleted only if it has a name and a record as `make_sidecar` writes them, and nothing else is in it.
    Temporary directories that killed processes left behind are deleted too.
    Raises `SidecarError` if `root` belongs to another user, or if others can write to it.
    """
    root = root or cache_root()
    cleared: dict[str, list[Path]] = {"removed": [], "in_use": [], "others": []}
    names = _names(root)
    if names:
        _require_own_root(root)
    for directory in cached_sidecars(root):
        cleared[_clear(directory)].append(directory)
    for leftover in (root / name for name in names if _TEMPORARY_NAME.fullmatch(name)):
        with suppress(OSError):
            if time.time() - leftover.lstat().st_mtime > _STALE_SECONDS and is_written_here(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
    return ClearedSidecars(**{kind: tuple(paths) for kind, paths in cleared.items()})


def _clear(directory: Path) -> str:
    """Delete a sidecar; return the field of `ClearedSidecars` that it belongs to."""
    if not _SIDECAR_NAME.fullmatch(directory.name) or not is_written_here(directory):
        return "others"
    with unused(directory / SIDECAR_FILE) as free:
        if not free:
            return "in_use"
        # Renaming is atomic, so no process ever sees a partly deleted sidecar.
        trash = _temporary_path(directory)
        try:
            directory.rename(trash)
        except OSError:
            return "in_use"
        shutil.rmtree(trash, ignore_errors=True)
    return "removed"


def _names(root: Path) -> list[str]:
    """Return the names in the directory of sidecars; raises `SidecarError` if it can't be listed."""
    try:
        return sorted(path.name for path in root.iterdir())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SidecarError(_unusable(root, getattr(error, "strerror", None) or str(error))) from None


def _require_own_root(root: Path) -> None:
    """Raise `SidecarError` if others may have put something into the directory of sidecars, or may exchange it."""
    try:
        with open_own_folder(root, create=False):
            pass
    except OSError as error:
        raise SidecarError(_unusable(Path(str(error.filename or root)), error.strerror or str(error))) from None


def _unusable(root: Path, found: str) -> Fault:
    return Fault(
        where=str(root),
        expected="a directory of prepared directories, of this user",
        found=found.lower(),
        remedy=f"Set {CACHE} to the directory that trtllm_ct.prepare wrote to, and clear it as the user who ran that.",
    )


@contextmanager
def new_sidecar_directory(directory: Path) -> Iterator[Path | None]:
    """Yield an empty temporary directory to write a sidecar in, and rename it to `directory` afterwards.

    Yields None when `directory` is a sidecar already. Several processes may write the same sidecar at once: the first
    one to rename wins, and the others use what it wrote. In every case this process holds a lease on `directory`
    afterwards (`leases.hold`). Raises `SidecarError` when the directory can't be written, and when another user owns it
    or can write to it.
    """
    temporary = _temporary_path(directory)
    try:
        with open_own_folder(directory.parent, create=True):
            pass
        if hold(directory / SIDECAR_FILE):
            require_own_directory(directory)
            yield None
            return
        temporary.mkdir(mode=0o700)
        yield temporary
        hold(temporary / SIDECAR_FILE, named=directory / SIDECAR_FILE)
        _rename_or_adopt(temporary, directory)
    except OSError as error:
        raise SidecarError(_unwritable(directory.parent, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_or_adopt(temporary: Path, directory: Path) -> None:
    """Rename a finished sidecar to `directory`, or take a lease on the sidecar that another process put there first."""
    while True:
        try:
            temporary.rename(directory)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
        else:
            return
        if hold(directory / SIDECAR_FILE):
            return
        if not (directory / SIDECAR_FILE).exists():
            # The directory is the rest of a sidecar that somebody deleted by hand: remove it and try again.
            # If another process cleared the sidecar in the meantime, the directory doesn't exist any more.
            with suppress(FileNotFoundError):
                require_own(directory.lstat(), directory)
                directory.rename(trash := _temporary_path(directory))
                shutil.rmtree(trash, ignore_errors=True)


def _temporary_path(directory: Path) -> Path:
    """Return a unique hidden path in the same folder, for a directory that is being written or deleted."""
    return directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")


def _unwritable(root: Path, error: OSError) -> Fault:
    return Fault(
        where=str(error.filename or root),
        expected="a place for a directory of a few small files",
        found=f"{error.strerror or error}".lower(),
        remedy=f"Set {CACHE} to a directory that this user alone can write to and that every node has.",
    )

"""The directory of sidecars: new sidecars appear in it atomically, and unused ones can be deleted."""

from __future__ import annotations

import errno
import os
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
from trtllm_ct.serve.own_directory import require_own_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CACHE", "ClearedSidecars", "cache_root", "cached_sidecars", "clear_sidecars", "new_sidecar_directory"]

CACHE = "TRTLLM_CT_CACHE"
"""Environment variable: the directory of sidecars."""

_STALE_SECONDS = 3600
"""The age at which a temporary directory counts as left behind by a killed process.

Writing a sidecar takes milliseconds.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearedSidecars:
    """The directories that `clear_sidecars` deleted, and those it kept because they are in use or not writable."""

    removed: tuple[Path, ...]
    in_use: tuple[Path, ...]


def cache_root() -> Path:
    """Return the directory of sidecars: `TRTLLM_CT_CACHE`, or `trtllm-ct` in the user's cache directory."""
    configured = os.environ.get(CACHE)
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-ct"


def cached_sidecars(root: Path | None = None) -> tuple[Path, ...]:
    """Return the sidecar directories in `root`, sorted by name. `root` defaults to `cache_root()`."""
    return tuple(sorted(path.parent for path in (root or cache_root()).glob(f"[!.]*/{SIDECAR_FILE}")))


def clear_sidecars(root: Path | None = None) -> ClearedSidecars:
    """Delete the sidecars in `root` that no running process made or loaded. `root` defaults to `cache_root()`.

    Also deletes temporary directories that killed processes left behind.
    """
    root = root or cache_root()
    removed: list[Path] = []
    in_use: list[Path] = []
    for directory in cached_sidecars(root):
        with unused(directory / SIDECAR_FILE) as free:
            if free:
                # Renaming is atomic, so no process ever sees a partly deleted sidecar.
                trash = _temporary_path(directory)
                directory.rename(trash)
                shutil.rmtree(trash, ignore_errors=True)
            (removed if free else in_use).append(directory)
    for leftover in root.glob(".*.partial"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    return ClearedSidecars(removed=tuple(removed), in_use=tuple(in_use))


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

"""The directory of sidecars: how one gets its place whole, and how unused ones are cleared away."""

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
from trtllm_ct.config.detect import SIDECAR_FILE
from trtllm_ct.serve.leases import hold, unused

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CACHE", "ClearedSidecars", "cache_root", "cached_sidecars", "clear_sidecars", "place_of"]

CACHE = "TRTLLM_CT_CACHE"
"""Environment variable: the directory of sidecars."""

_SECONDS_OF_WORK = 3600
"""After which a working place was left behind by a process that was killed; writing a sidecar takes milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearedSidecars:
    """What `clear_sidecars` deleted, and what it left because it is in use or belongs to another user."""

    removed: tuple[Path, ...]
    in_use: tuple[Path, ...]


def cache_root() -> Path:
    """Where sidecars lie: `TRTLLM_CT_CACHE`, else `trtllm-ct` in the user's cache directory."""
    own = os.environ.get(CACHE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-ct"


def cached_sidecars(root: Path | None = None) -> tuple[Path, ...]:
    """The sidecar directories in `root`, `cache_root()` when None, by name."""
    return tuple(sorted(path.parent for path in (root or cache_root()).glob(f"[!.]*/{SIDECAR_FILE}")))


def clear_sidecars(root: Path | None = None) -> ClearedSidecars:
    """Delete the sidecars in `root`, `cache_root()` when None, that no living process made or loaded from."""
    root = root or cache_root()
    removed: list[Path] = []
    in_use: list[Path] = []
    for directory in cached_sidecars(root):
        with unused(directory / SIDECAR_FILE) as free:
            if free:
                # Away first, in one step: nobody ever finds half a sidecar.
                away = _beside(directory)
                directory.rename(away)
                shutil.rmtree(away, ignore_errors=True)
            (removed if free else in_use).append(directory)
    for left in root.glob(".*.partial"):
        if time.time() - left.stat().st_mtime > _SECONDS_OF_WORK:
            shutil.rmtree(left, ignore_errors=True)
    return ClearedSidecars(removed=tuple(removed), in_use=tuple(in_use))


@contextmanager
def place_of(directory: Path) -> Iterator[Path | None]:
    """Give an empty directory to write a sidecar in, which then becomes `directory`; None when that is there already.

    Several processes may do so at once: one of them wins, the others use what it wrote. In any case this process has
    a lease on it afterwards. Raises `SidecarError` when nothing can be written there.
    """
    if hold(directory / SIDECAR_FILE):
        yield None
        return
    place = _beside(directory)
    try:
        place.mkdir(parents=True)
        yield place
        hold(place / SIDECAR_FILE, named=directory / SIDECAR_FILE)
        _install(place, directory)
    except OSError as error:
        raise SidecarError(_unwritable(directory.parent, error)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _install(place: Path, directory: Path) -> None:
    """Give a finished sidecar its name, or take a lease on the one that was quicker."""
    while True:
        try:
            place.rename(directory)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
        else:
            return
        if hold(directory / SIDECAR_FILE):
            return
        if not (directory / SIDECAR_FILE).exists():
            # What is left of one that somebody deleted by hand; where it was cleared meanwhile, nothing is there.
            with suppress(FileNotFoundError):
                directory.rename(away := _beside(directory))
                shutil.rmtree(away, ignore_errors=True)


def _beside(directory: Path) -> Path:
    """A name in the same folder that nobody else has."""
    return directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")


def _unwritable(root: Path, error: OSError) -> Fault:
    return Fault(
        where=str(error.filename or root),
        expected="a place for a directory of a few small files",
        found=f"{error.strerror or error}".lower(),
        remedy=f"Set {CACHE} to a directory that this user can write to and that every node has.",
    )

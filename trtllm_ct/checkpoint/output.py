"""An output directory that appears complete or not at all.

Work happens in `.OUT.partial` beside OUT, which is renamed to OUT at the end. So nobody can load half a checkpoint, and
a run that fails leaves an existing OUT unchanged. When a run is killed or interrupted, its work so far stays in
`.OUT.partial`.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["check_output_place", "clear", "replacing_directory"]


def check_output_place(source: Path, out: Path) -> None:
    """Raise `UsageError` when the directories are the same or one is inside the other; links are followed."""
    source, out = source.resolve(), out.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise UsageError(
            Fault(
                where=str(out),
                expected="an output directory apart from the source",
                found="the source itself" if source == out else f"one inside the other, the source being {source}",
                remedy="Choose an output directory beside the source.",
            )
        )


@contextmanager
def replacing_directory(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a working directory, which becomes `out` when the block ends without an error.

    The directory holds what an earlier run left there when it was killed or interrupted: the caller may resume that
    work, or call `clear`. On an error, the working directory is deleted and everything is left as it was before. On an
    interrupt, which is not an `Exception`, the working directory stays for the next run. With `overwrite`, an existing
    `out` is replaced at the very end; without it, an existing `out` is refused. Missing parent folders are created.
    Raises `UsageError` before yielding when `out` can't be written, or when another process works there.
    """
    out = out.resolve()
    _require_free(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.partial")
    created_folders = [folder for folder in partial.parents if not folder.exists()]
    try:
        if partial.is_symlink() or not partial.is_dir():
            _remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Choose an output directory in a place that you can write to."
        raise _unusable(partial, f"{error.strerror or error}".lower(), remedy) from None
    with _locked(partial):
        try:
            yield partial
            _require_free(out, overwrite=overwrite)
            _install(partial, out)
        except Exception:
            _remove(partial)
            # Innermost folder first; rmdir fails for a folder in which somebody else put something.
            with suppress(OSError):
                for folder in created_folders:
                    folder.rmdir()
            raise


def clear(directory: Path, *, keep: Collection[str] = ()) -> None:
    """Delete everything in a directory except the entries named in `keep`; links are deleted but not followed."""
    for path in directory.iterdir():
        if path.name not in keep:
            _remove(path)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold a lock on the working directory; raises `UsageError` when another process holds it.

    The kernel releases the lock however this process ends. On file systems without locks, none is taken.
    """
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            _lock(descriptor, partial)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, partial: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "Wait until it is done, or choose another output."
        raise _unusable(partial, "another process that writes there", remedy) from None


def _require_free(out: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` unless a new directory may be put at `out`."""
    remedy = "Choose another place for the output."
    if not out.name:
        found = "the root of the file system"
    elif out.exists() and not out.is_dir():
        found = "a file of that name"
    elif out.exists() and not overwrite:
        found, remedy = "a directory of that name", "Choose another name, or replace it with --overwrite."
    elif out.exists() and any(place == out or out in place.parents for place in (Path.cwd(), Path.home())):
        # Replacing deletes the old content, and nobody names these two directories on purpose.
        found = "a directory that holds the current or the home directory"
    else:
        return
    raise _unusable(out, found, remedy)


def _unusable(out: Path, found: str, remedy: str) -> UsageError:
    return UsageError(Fault(where=str(out), expected="a place for a new directory", found=found, remedy=remedy))


def _install(partial: Path, out: Path) -> None:
    """Rename the finished directory to `out`; an existing `out` is deleted only after that."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.replaced")
    _remove(old)
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    # The new directory is in place, so leftovers of the old one are no reason to fail.
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a directory, a file or a link, whichever `path` is; a link is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

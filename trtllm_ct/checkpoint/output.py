"""An output directory that appears complete or not at all.

Work happens in `.OUT.partial` beside OUT, which becomes OUT at the end. So nobody can load half a checkpoint, and a run
that fails leaves an existing OUT unchanged. When a run is killed or interrupted, its work so far stays in
`.OUT.partial`.

The end has an order that a power cut can't change. All files and folders are synced, then the names are exchanged in
one step, then the parent is synced, and only then the old OUT is removed. Where the file system can't exchange names,
the old OUT is moved to `.OUT.replaced-by-trtllm-ct` first, and moved back by the next run if there was no second step.
"""

from __future__ import annotations

import logging
import os
import stat
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, OutputError, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.manifest import MANIFEST, reason_to_keep, write_manifest
from trtllm_ct.checkpoint.output_errors import output_errors
from trtllm_ct.checkpoint.work_folder import is_ours, open_work_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_output_place", "replacing_directory"]

logger = logging.getLogger("trtllm_ct")

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


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
def replacing_directory(
    out: Path, *, overwrite: bool, force: bool = False, sync: bool = True, journal: str = ""
) -> Iterator[Folder]:
    """Yield a working directory, which becomes `out` when the block ends without an error.

    The directory holds what an earlier run left there when it was killed or interrupted: the caller may resume that
    work, or clear it. The file `journal` in it is removed at the very end. On an error, the working directory is
    deleted and everything is left as it was before. After an error of the file system (`OutputError`) and on an
    interrupt, which is not an `Exception`, the working directory stays for the next run. Missing parent folders are
    created.
    With `overwrite`, an existing `out` is replaced at the very end if this function wrote it and everything in it; with
    `force` as well, any model directory is replaced. With `sync`, the new directory survives a power cut as soon as
    this function returns, and until then the old one does.
    Raises `UsageError` before yielding when `out` can't be written, or when another process works there.
    """
    place = _Place(out.resolve(), overwrite, force)
    with output_errors(place.partial):
        place.require_free()
    created = [folder for folder in place.out.parents if not folder.exists()]
    with (
        output_errors(place.partial),
        _parent(place, created) as parent,
        _removing_on_error(parent, place, created),
        open_work_folder(parent, place.partial) as work,
        _removing_on_error(parent, place, created, work),
    ):
        _recover(parent, place)
        place.require_free(parent)
        yield work
        _install(parent, work, place, sync=sync, journal=journal)


@contextmanager
def _removing_on_error(
    parent: Folder, place: _Place, created: list[Path], work: Folder | None = None
) -> Iterator[None]:
    """Remove the working directory, and the folders that were created for it, after an error of the caller."""
    try:
        yield
    except (OSError, OutputError):
        raise
    except Exception:
        with suppress(OSError):
            if work is not None and parent.is_at(place.partial.name, work):
                parent.remove(place.partial.name)
            _remove_folders(created)
        raise


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an output goes, and what may be replaced there."""

    out: Path
    overwrite: bool
    force: bool

    @property
    def partial(self) -> Path:
        """The working directory."""
        return self.out.parent / f".{self.out.name}.partial"

    @property
    def replaced(self) -> Path:
        """Where the old output is for a moment, on file systems that can't exchange two names."""
        return self.out.with_name(f".{self.out.name}.replaced-by-trtllm-ct")

    def require_free(self, parent: Folder | None = None) -> None:
        """Raise `UsageError` unless a new directory may be put at `out`; `parent` is the folder that holds it."""
        out, remedy = self.out, "Choose another place for the output."
        if not out.name:
            raise _unusable(out, "the root of the file system", remedy)
        try:
            status = out.lstat() if parent is None else parent.status(out.name)
        except OSError:  # No such name, or no such parent; a parent that can't be used is found when it is opened.
            return
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode):
            found = "a file of that name"
        elif not self.overwrite:
            found, remedy = "a directory of that name", "Choose another name, or replace it with --overwrite."
        elif any(place == out or out in place.parents for place in (Path.cwd(), Path.home())):
            # Replacing deletes the old content, and nobody names these two directories on purpose.
            found = "a directory that holds the current or the home directory"
        else:
            self._require_replaceable(status, parent)
            return
        raise _unusable(out, found, remedy)

    def _require_replaceable(self, status: os.stat_result, parent: Folder | None) -> None:
        """Raise `UsageError` if the old directory is somebody else's, or holds what no conversion wrote."""
        if os.geteuid() != 0 and not is_ours(status, self.out.parent):
            raise _unusable(self.out, "a directory of another user", "Choose another place for the output.")
        with Folder(self.out) if parent is None else parent.folder(self.out.name) as old:
            found = reason_to_keep(old, force=self.force)
        if found is not None:
            remedy = "Move away what you need of it, or choose another place"
            remedy += "." if self.force else "; --overwrite --force replaces any model directory."
            raise UsageError(
                Fault(where=str(self.out), expected="an output of trtllm-ct to replace", found=found, remedy=remedy)
            )


@contextmanager
def _parent(place: _Place, created: list[Path]) -> Iterator[Folder]:
    """Create the missing folders above the output, `created`, and yield the one that holds it."""
    try:
        for folder in reversed(created):
            file_calls.make_directory(str(folder))
        parent = Folder(place.out.parent)
    except OSError as error:
        _remove_folders(created)
        remedy = "Choose an output directory in a place that you can write to."
        raise _unusable(place.partial, f"{error.strerror or error}".lower(), remedy) from None
    with parent:
        yield parent


def _remove_folders(created: list[Path]) -> None:
    # Innermost folder first; rmdir fails for a folder in which somebody else put something.
    with suppress(OSError):
        for folder in created:
            file_calls.remove_directory(str(folder))


def _unusable(out: Path, found: str, remedy: str) -> UsageError:
    return UsageError(Fault(where=str(out), expected="a place for a new directory", found=found, remedy=remedy))


def _recover(parent: Folder, place: _Place) -> None:
    """Put the old output back, or remove it, if an earlier run was stopped while it replaced it in two steps."""
    status = parent.status(place.replaced.name)
    if status is None or not is_ours(status, parent.path):
        return
    if parent.status(place.out.name) is None:
        file_calls.rename(place.replaced.name, place.out.name, parent.descriptor)
        logger.warning("%s: put back; an earlier run was stopped while it replaced it", place.out)
    else:
        parent.remove(place.replaced.name)
        logger.warning("%s: removed, the old output that an earlier run had replaced", place.replaced)


def _install(parent: Folder, work: Folder, place: _Place, *, sync: bool, journal: str) -> None:
    """Let the finished directory become `out`; an existing `out` is deleted only after that."""
    write_manifest(work, but=journal)
    mode = _final_mode(work)
    # Not writable by others before it has its name: nobody may put anything into it that this process did not write.
    file_calls.set_mode(work.descriptor, mode & ~_OTHERS_WRITE)
    if sync:
        work.sync()
    if work.status(journal) is not None:
        file_calls.unlink(journal, work.descriptor)
        if sync:
            file_calls.sync(work.descriptor)
    place.require_free(parent)
    with ExitStack() as opened:
        old = None if parent.status(place.out.name) is None else opened.enter_context(parent.folder(place.out.name))
        name = _put_in_place(parent, work, place)
        if sync:
            file_calls.sync(parent.descriptor)
        if mode & _OTHERS_WRITE:
            file_calls.set_mode(work.descriptor, mode)
        if old is not None and parent.is_at(name, old):
            _remove_old(parent, name, old)


def _remove_old(parent: Folder, name: str, old: Folder) -> None:
    """Remove the old output, which has the name `name` now."""
    try:
        old.clear()
        file_calls.remove_directory(name, parent.descriptor)
    except OSError as error:  # The new directory is in place, so leftovers of the old one are no reason to fail.
        logger.warning("%s: the old output could not be removed: %s", parent.path / name, error.strerror)


def _put_in_place(parent: Folder, work: Folder, place: _Place) -> str:
    """Give the finished directory its name; return the name that an old output has now."""
    partial, out, replaced = place.partial.name, place.out.name, place.replaced.name
    if not parent.is_at(partial, work):
        raise _unusable(place.partial, "another directory than the one of this run", "Choose a place of your own.")
    if parent.status(out) is None:
        file_calls.rename(partial, out, parent.descriptor)
        return partial
    if file_calls.exchange(partial, out, parent.descriptor):
        return partial
    file_calls.rename(out, replaced, parent.descriptor)
    try:
        file_calls.rename(partial, out, parent.descriptor)
    except BaseException:
        file_calls.rename(replaced, out, parent.descriptor)
        raise
    return replaced


def _final_mode(work: Folder) -> int:
    """Return the mode that the directory gets: that of a file in it, and each reader may enter as well.

    The file has its mode from this process's umask and from the rules of the folder above.
    """
    file = work.status(MANIFEST)
    directory = file_calls.status(work.descriptor)
    mode = 0o755 if file is None else stat.S_IMODE(file.st_mode) | stat.S_IXUSR
    return stat.S_IMODE(directory.st_mode) & ~0o777 | mode | (mode & 0o444) >> 2

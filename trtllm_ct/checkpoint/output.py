"""An output directory that appears complete or not at all.

Work happens in `.OUT.partial` beside OUT, which becomes OUT at the end. So nobody can load half a checkpoint, and a run
that fails leaves an existing OUT unchanged. When a run is killed, interrupted or stopped by an error that is no fault
of the checkpoint, its work so far stays in `.OUT.partial`.

The end has an order that a power cut can't change. All files and folders are synced, then the names are exchanged in
one step, then the parent is synced, and only then the old OUT is removed. Where the file system can't exchange names,
the old OUT is moved to `.OUT.replaced-by-trtllm-ct` first, and moved back by the next run if there was no second step.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CheckpointError, Fault, HubError, OutputError, PayloadError, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.checkpoint.manifest import MANIFEST, reason_to_keep, write_manifest
from trtllm_ct.checkpoint.output_errors import output_errors, unusable
from trtllm_ct.checkpoint.output_place import OutputPlace, check_output_place, what_is_left
from trtllm_ct.checkpoint.work_folder import (
    DOWNLOADS,
    JOURNAL,
    JOURNAL_BYTES,
    Mark,
    journal_files,
    mark_of,
    open_work_folder,
    other_files,
    remove_files_and_mark,
    remove_marked,
    require_own_directory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["check_output_place", "replacing_directory", "what_is_left"]

logger = logging.getLogger("trtllm_ct")

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_LEFT = {Mark.WORK, Mark.REPLACED, Mark.LISTED}


@contextmanager
def replacing_directory(out: Path, *, overwrite: bool, force: bool = False, sync: bool = True) -> Iterator[Folder]:
    """Yield a working directory, which becomes `out` when the block ends without an error.

    The directory holds what an earlier run left there: the caller may resume that work, or clear it, but for the file
    `JOURNAL`, by which a later run knows that the directory is one of its own. That file is removed at the very end.
    On a `CheckpointError`, everything is left as it was before: a working directory that this run made is deleted, and
    so is one that it worked on if values are faulty (`PayloadError`). On a `HubError`, other errors and interrupts the
    directory stays if there is work in it. Missing parent folders are created.
    With `overwrite`, an existing `out` is replaced at the very end if this function wrote it and everything in it; with
    `force` as well, any model directory is replaced. With `sync`, the new directory survives a power cut as soon as
    this function returns, and until then the old one does.
    Raises `UsageError` before yielding when `out` can't be written, when another process works there, and when a
    directory that no conversion made has the name of the working directory; `OutputError` after it.
    """
    place = OutputPlace.of(out, overwrite=overwrite, force=force)
    try:
        place.require_free()
    except UsageError:
        _name_what_is_left(place)
        raise
    of_caller: list[OSError] = []
    with (
        output_errors(place.partial, but=of_caller),
        _parent(place) as (parent, made),
        _work(parent, place, made) as work,
    ):
        try:
            yield work
        except OSError as error:  # It may be an error of the source.
            of_caller.append(error)
            raise
        _install(parent, work, place, made if sync else [], sync=sync)


def _name_what_is_left(place: OutputPlace) -> None:
    """Warn of a directory beside an existing output that an earlier run has left."""
    for path in (place.partial, place.replaced):
        with suppress(OSError), Folder(path.parent) as parent, parent.folder(path.name) as folder:
            if mark_of(folder, parent) in _LEFT:
                logger.warning("%s: left of an earlier run; a conversion with --overwrite removes it", path)


@contextmanager
def _parent(place: OutputPlace) -> Iterator[tuple[Folder, list[Path]]]:
    """Create the missing folders above the output; yield the folder that holds it, and those that were made."""
    missing = list(takewhile(_is_missing, place.out.parents))
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            file_calls.make_directory(str(folder))
            made.insert(0, folder)
        parent = _writable(place.out.parent)
    except OSError as error:
        _remove_folders(made)
        remedy = "Choose an output directory in a place that you can write to."
        raise unusable(place.partial, f"{error.strerror or error}".lower(), remedy) from None
    with parent:
        yield parent, made


def _writable(path: Path) -> Folder:
    """Open the folder that holds the output; raises `OSError` if nothing can be made or renamed there."""
    parent = Folder(path, file_calls.open_way(str(path)))
    if not file_calls.is_writable(parent.descriptor):  # A working directory of an earlier run may be there already.
        parent.close()
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return parent


def _is_missing(folder: Path) -> bool:
    """Whether there is no such name; one that can't be looked up can't be made either."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _remove_folders(made: list[Path]) -> None:
    # Innermost folder first; rmdir fails for a folder in which somebody else put something.
    with suppress(OSError):
        for folder in made:
            file_calls.remove_directory(str(folder))


@contextmanager
def _work(parent: Folder, place: OutputPlace, made: list[Path]) -> Iterator[Folder]:
    """Yield the working directory; after an error, decide whether it stays."""
    try:
        work = open_work_folder(parent, place.partial)
    except UsageError:
        _remove_folders(made)
        raise
    with work:
        before = _Progress(work)
        try:
            _recover(parent, place)
            place.require_free(parent)
            place.require_movable(parent)
            yield work
        except (OSError, OutputError):
            raise
        except Exception as error:
            _keep_or_remove(error, before, work, parent, place)
            _remove_folders(made)
            raise


def _keep_or_remove(error: Exception, before: _Progress, work: Folder, parent: Folder, place: OutputPlace) -> None:
    """Leave the working directory, or remove it with the files of this run; others are named and stay."""
    try:
        now = _Progress(work)
        if _is_kept(error, before, now):
            logger.warning("%s: kept, so that a later run can go on from it", place.partial)
        elif parent.is_at(place.partial.name, work):
            remove_files_and_mark(parent, place.partial.name, work, now.own_files(before))
    except OSError as failure:
        logger.warning("%s: not removed: %s", place.partial, failure.strerror)


class _Progress:
    """What is in a working directory at one moment, and what its journal says: when it was changed, what is done."""

    def __init__(self, work: Folder) -> None:
        """Raises `OSError`."""
        status = work.status(JOURNAL)
        text = b"" if status is None else work.read(JOURNAL, JOURNAL_BYTES)
        self.changed_at = None if status is None else (status.st_size, status.st_mtime_ns)
        self.is_begun = bool(text)
        self.files = frozenset(work.files())
        has_weights = any(name.startswith(f"{DOWNLOADS}/") and name.endswith(".safetensors") for name in self.files)
        self.has_work = b'\n{"unit":' in text or has_weights
        self.listed = journal_files(work)

    def own_files(self, before: _Progress) -> frozenset[str]:
        """Return the files of this run, which has found those of `before`: as listed, or else all that are new."""
        return self.files - before.files if self.listed is None else self.listed


def _is_kept(error: Exception, before: _Progress, now: _Progress) -> bool:
    """Whether the work stays after an error; `before` is what this run has found. See `replacing_directory`."""
    if isinstance(error, PayloadError):
        return before.is_begun and before.changed_at == now.changed_at
    if isinstance(error, CheckpointError) and not isinstance(error, HubError):
        return before.is_begun
    return before.is_begun or now.has_work


def _recover(parent: Folder, place: OutputPlace) -> None:
    """Put the old output back, or remove it, if an earlier run was stopped while it replaced it in two steps.

    Raises `UsageError` if it can't be told whether the directory is an old output, and for anything else of that name:
    the old output could not get it.
    """
    name = place.replaced.name
    status = parent.status(name)
    if status is None:
        return
    require_own_directory(status, parent, place.replaced)
    with parent.folder(name) as old:
        mark = mark_of(old, parent)
        missing = parent.status(place.out.name) is None
        if missing and (mark is Mark.LISTED or (mark is Mark.NONE and reason_to_keep(old, force=True) is None)):
            file_calls.rename(name, place.out.name, parent.descriptor)
            logger.warning("%s: put back; an earlier run was stopped while it replaced it", place.out)
        elif mark is Mark.NONE:
            found = "a directory that no conversion has left there"
            raise unusable(place.replaced, found, "Move it away if you need it, otherwise delete it.")
        else:
            remove_marked(parent, name, old)
            logger.warning("%s: removed, the old output that an earlier run had replaced", place.replaced)


def _install(parent: Folder, work: Folder, place: OutputPlace, made: list[Path], *, sync: bool) -> None:
    """Let the finished directory become `out`; an existing `out` is deleted only after that."""
    _write_list(work, place)
    mode = _final_mode(work)
    # Not writable by others before it has its name: nobody may put anything into it that this process did not write.
    file_calls.set_mode(work.descriptor, mode & ~_OTHERS_WRITE)
    if sync:
        work.sync()
        _sync_names(made)
    try:
        place.require_free(parent)
    except UsageError as error:  # It became so meanwhile, and what was written is kept.
        raise OutputError(*error.faults) from None
    with ExitStack() as opened:
        old = None if parent.status(place.out.name) is None else opened.enter_context(parent.folder(place.out.name))
        name = _named(parent, work, place, sync=sync)
        if sync:
            _sync_name(parent, place)
        if mode & _OTHERS_WRITE:
            file_calls.set_mode(work.descriptor, mode)
        if old is not None and parent.is_at(name, old):
            _remove_old(parent, name, old)


def _write_list(work: Folder, place: OutputPlace) -> None:
    """Write the list of what this run has written; what somebody else has put there is named, and is not in it."""
    listed = journal_files(work)
    others = [] if listed is None else other_files(work, listed)
    if others:
        logger.warning(
            "%s: it also has files that no conversion wrote: %s", place.out, format_names(map(ascii, others))
        )
    write_manifest(work, [name for name in other_files(work, ()) if name not in others])


def _sync_names(made: list[Path]) -> None:
    """Return when the names of folders that were made would survive a power cut."""
    for folder in made:
        with suppress(PermissionError):  # A folder may be written to without a right to open it.
            descriptor = file_calls.open_way(str(folder.parent))
            try:
                file_calls.sync(descriptor)
            finally:
                file_calls.close(descriptor)


def _sync_name(parent: Folder, place: OutputPlace) -> None:
    """Return when the name of the output would survive a power cut."""
    try:
        file_calls.sync(parent.descriptor)
    except OSError as error:
        expected, found = "a file system that does what it is asked", f"{error.strerror or error}".lower()
        remedy = "The output is complete, but a power cut may undo its name; let the command `sync` succeed."
        raise OutputError(Fault(where=str(place.out), expected=expected, found=found, remedy=remedy)) from None


def _remove_old(parent: Folder, name: str, old: Folder) -> None:
    """Remove the old output, which has the name `name` now."""
    try:
        remove_marked(parent, name, old)
    except OSError as error:  # The new directory is in place, so leftovers of the old one are no reason to fail.
        logger.warning("%s: the old output could not be removed: %s", parent.path / name, error.strerror)


def _named(parent: Folder, work: Folder, place: OutputPlace, *, sync: bool) -> str:
    """Give the finished directory its name, without its journal; return the name that an old output has now.

    After an error and an interrupt the journal is in it again.
    """
    partial = place.partial.name
    if not parent.is_at(partial, work):
        found = "another directory than the one of this run"
        raise OutputError(*unusable(place.partial, found, "Choose a place of your own.").faults)
    with work.file(JOURNAL) as journal:
        file_calls.unlink(JOURNAL, work.descriptor)
        try:
            if sync:
                file_calls.sync(work.descriptor)
            return _put_in_place(parent, place)
        except BaseException:
            with suppress(OSError):
                if parent.is_at(partial, work):
                    work.copy(JOURNAL, iter(lambda: os.read(journal, 2**20), b""))
            raise


def _put_in_place(parent: Folder, place: OutputPlace) -> str:
    """Rename the working directory to the output; return the name that an old output has now."""
    partial, out, replaced = place.partial.name, place.out.name, place.replaced.name
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

"""`OutputPlace`: where an output goes, and whether a new directory may be put there.

All that can be known before the first byte is written is found here: a place that can't be used, a directory that may
not be replaced, and one that can't be.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.manifest import reason_to_keep
from trtllm_ct.checkpoint.mounts import is_mount_point, is_overlay
from trtllm_ct.checkpoint.output_errors import unusable
from trtllm_ct.checkpoint.work_folder import is_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["OutputPlace", "check_file_place", "check_output_place", "what_is_left"]

_MAX_LINKS = 40
"""The most links that Linux follows on one path."""

_ELSEWHERE = "Choose another place for the output."


def check_output_place(source: Path, out: Path) -> None:
    """Raise `UsageError` when the directories are the same or one is inside the other; links are followed.

    Raises it for an output that can't be looked up as well, see `OutputPlace.of`.
    """
    out = OutputPlace.of(out).out
    with _as_unusable(source):
        source = Path(os.path.realpath(source))
    if source == out or source in out.parents or out in source.parents:
        raise UsageError(
            Fault(
                where=str(out),
                expected="an output directory apart from the source",
                found="the source itself" if source == out else f"one inside the other, the source being {source}",
                remedy="Choose an output directory beside the source.",
            )
        )


def check_file_place(file: Path, folders: Iterable[Path], *, where: str) -> None:
    """Raise `UsageError` when a file to write is one of these folders, inside one, or a folder that holds one.

    A file in a source would become part of the checkpoint or replace some of it, and an output is replaced as a whole.
    The folders need not exist. Links to folders are followed; a link at the end of `file` is what would be replaced.
    """
    with _as_unusable(file):
        place = Path(os.path.realpath(file.parent)) / file.name
        folders = [Path(os.path.realpath(folder)) for folder in folders]
    for folder in folders:
        if place == folder or folder in place.parents or place in folder.parents:
            raise UsageError(
                Fault(
                    where=where,
                    expected="a file apart from the directories of the command",
                    found=f"{file}, which is {_beside(place, folder)}",
                    remedy="Name a file in another folder.",
                )
            )


def _beside(place: Path, folder: Path) -> str:
    """Say how a path lies to a folder from which it is not apart."""
    if place == folder:
        return "one of them"
    return f"inside {folder}" if folder in place.parents else f"a folder that would hold {folder}"


def what_is_left(out: Path) -> Callable[[], str]:
    """Return a function that says what a conversion to `out`, stopped since this call, has left, and how to go on."""
    before = _inode(out)
    with suppress(OSError, ValueError):
        out = Path(os.path.realpath(out))
    partial = OutputPlace(out).partial

    def sentence() -> str:
        now = _inode(out)
        if now is not None and now != before:
            rest = (
                f" {partial} is the old one; the next conversion there removes it." if os.path.lexists(partial) else ""
            )
            return f"The output is complete.{rest}"
        return "The same command goes on from here." if os.path.lexists(partial) else "Nothing was written."

    return sentence


def _inode(out: Path) -> tuple[int, int] | None:
    try:
        status = out.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """Where an output goes, a path without links, and what may be replaced there."""

    out: Path
    overwrite: bool = False
    force: bool = False

    @classmethod
    def of(cls, out: Path, *, overwrite: bool = False, force: bool = False) -> OutputPlace:
        """Return the place that a path leads to.

        Raises `UsageError` for a path that can't be looked up, and for one with another user's link on it: whoever made
        the link decides where the output would go.
        """
        with _as_unusable(out):
            return cls(_followed(out), overwrite, force)

    @property
    def partial(self) -> Path:
        """The working directory."""
        return self.out.parent / f".{self.out.name}.partial"

    @property
    def replaced(self) -> Path:
        """Where the old output is for a moment, on file systems that can't exchange two names."""
        return self.out.parent / f".{self.out.name}.replaced-by-trtllm-ct"

    def require_free(self, parent: Folder | None = None) -> None:
        """Raise `UsageError` unless a new directory may be put at `out`; `parent` is the folder that holds it."""
        if not self.out.name:
            raise unusable(self.out, "the root of the file system", _ELSEWHERE)
        if is_mount_point(self.partial):
            raise unusable(self.partial, "a mount point, which can't get another name", _ELSEWHERE)
        with _as_unusable(self.out):
            try:
                status = self.out.lstat() if parent is None else parent.status(self.out.name)
            except (FileNotFoundError, NotADirectoryError):  # The missing folders are made later.
                return
            if status is not None:
                self._require_replaceable(status, parent)

    def _require_replaceable(self, status: os.stat_result, parent: Folder | None) -> None:
        """Raise `UsageError` unless what is at `out` may be replaced, and can be."""
        remedy = _ELSEWHERE
        if not stat.S_ISDIR(status.st_mode):
            found = "a file of that name"
        elif is_mount_point(self.out):
            found, remedy = "a mount point, which can't be replaced", "Choose a new directory inside of it."
        elif not self.overwrite:
            found, remedy = "a directory of that name", "Choose another name, or replace it with --overwrite."
        elif any(place == self.out or self.out in place.parents for place in _current_and_home()):
            # Replacing deletes the old content, and nobody names these two directories on purpose.
            found = "a directory that holds the current or the home directory"
        else:
            self._require_written_here(status, parent)
            return
        raise unusable(self.out, found, remedy)

    def _require_written_here(self, status: os.stat_result, parent: Folder | None) -> None:
        """Raise `UsageError` if the old directory is somebody else's, or holds what no conversion wrote."""
        folder = Folder(self.out.parent) if parent is None else parent
        try:
            if os.geteuid() != 0 and not is_ours(status, folder):
                raise unusable(self.out, "a directory of another user", _ELSEWHERE)
            with folder.folder(self.out.name) as old:
                found = reason_to_keep(old, force=self.force)
        finally:
            if parent is None:
                folder.close()
        if found is not None:
            remedy = "Move away what you need of it, or choose another place"
            remedy += "." if self.force else "; --overwrite --force replaces any model directory."
            raise UsageError(
                Fault(where=str(self.out), expected="an output of trtllm-ct to replace", found=found, remedy=remedy)
            )

    def require_movable(self, parent: Folder) -> None:
        """Raise `UsageError` if the file system can't give an old directory another name.

        An overlay can't where the directory comes from a lower layer, as in an image of a container. The working
        directory, which is never empty, can't be replaced by a rename, so the attempt changes nothing.
        """
        status = parent.status(self.out.name)
        if status is None or not is_overlay(file_calls.status(parent.descriptor).st_dev):
            return
        if not file_calls.is_movable(self.out.name, self.partial.name, parent.descriptor):
            found = "a directory of a lower layer of an overlay, which can't be replaced"
            raise unusable(self.out, found, _ELSEWHERE)


@contextmanager
def _as_unusable(out: Path) -> Iterator[None]:
    """Raise `UsageError` for errors of the file system, and for a name that none has."""
    try:
        yield
    except (OSError, ValueError) as error:
        found = (getattr(error, "strerror", None) or str(error)).lower()
        where = getattr(error, "filename", None)
        where = where if isinstance(where, str) else str(out)
        remedy = "Choose an output directory in a place that you can write to."
        raise unusable(Path(where), found, remedy) from None


def _current_and_home() -> Iterator[Path]:
    """Yield the current directory and that of the user, as far as there are such."""
    with suppress(OSError):
        yield Path.cwd()
    with suppress(OSError, RuntimeError):
        yield Path.home()


def _followed(path: Path) -> Path:
    """Return the absolute path that a path leads to; what is missing at its end stays as it is.

    Raises `OSError` for a path that can't be looked up, `UsageError` for a link of another user.
    """
    place = Path("/")
    pending = [*reversed(os.path.join(os.getcwd() if not path.is_absolute() else "/", path).split("/"))]  # noqa: PTH118, PTH109
    links = 0
    while pending:
        part = pending.pop()
        if part in {"", "."}:
            continue
        if part == "..":
            place = place.parent
            continue
        try:
            status = (place / part).lstat()
        except (FileNotFoundError, NotADirectoryError):
            place /= part
            continue
        if not stat.S_ISLNK(status.st_mode):
            place /= part
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        _require_trusted(place / part, status)
        target = str((place / part).readlink())
        pending += reversed(target.split("/"))
        place = Path("/") if target.startswith("/") else place
    return place


def _require_trusted(link: Path, status: os.stat_result) -> None:
    """Raise `UsageError` for a link that neither root nor this user made."""
    if status.st_uid in {0, os.geteuid()}:
        return
    with suppress(OSError), Folder(link.parent) as parent:
        if is_ours(status, parent):
            return
    remedy = "Give the place that it leads to, if you mean that."
    raise unusable(link, f"a link of another user, with the number {status.st_uid}", remedy)

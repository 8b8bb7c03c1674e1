"""Where the files of a checkpoint are: in a folder of this machine (`Folder`), or far away (`remote.py: RemoteFolder`).

Detection, configuration, catalog and probe read a checkpoint through a `Source`. So they decide the same, wherever the
files are, and whatever a source fetches is checked by the code that checks local files.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.regular_files import is_present, open_regular, read_at, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["Folder", "Part", "Source", "StoredFile", "as_source", "local_folder", "open_local"]


class Part(NamedTuple):
    """Consecutive bytes of a file: its name, the offset of the first byte, and how many there are."""

    file: str
    offset: int
    nbytes: int


class StoredFile(Protocol):
    """A file that is open for reading."""

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        ...

    def read(self, nbytes: int, offset: int) -> bytes:
        """Return `nbytes` bytes from the byte `offset` on, fewer only where the file ends."""
        ...


@runtime_checkable
class Source(Protocol):
    """The files of a checkpoint, by their names relative to it. Every method raises `OSError` as a file system does.

    A file that is far away and can't be fetched is a `HubError`.
    """

    @property
    def place(self) -> str:
        """What messages and reports call it: the path of a folder, or the name of a repository with its commit."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder of this machine that holds the files; None if they are far away."""
        ...

    @property
    def weights_folder(self) -> Path | None:
        """The folder of this machine in which weights are read, if only for a while; None if they can't be read."""
        ...

    def where(self, name: str) -> str:
        """Return what messages call a file."""
        ...

    def names(self) -> list[str]:
        """Return the sorted names of all entries that are not hidden, those of inner folders included."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name, of whatever kind."""
        ...

    def folders_with(self, name: str) -> list[str]:
        """Return the sorted names of the inner folders that have a file of this name."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a regular file of at most `limit` bytes."""
        ...

    def open(self, name: str) -> AbstractContextManager[StoredFile]:
        """Open a regular file."""
        ...

    def announce(self, parts: Iterable[Part]) -> None:
        """Have parts of files ready that will be read next, many of them at once; they are only a hint."""
        ...


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine as a source."""

    folder: Path

    @property
    def place(self) -> str:
        """The path of the folder, as it was given."""
        return str(self.folder)

    @property
    def weights_folder(self) -> Path:
        """The folder itself."""
        return self.folder

    def where(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.folder / name)

    def names(self) -> list[str]:
        """Return the sorted names of all entries that are not hidden."""
        return sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name; a link that leads nowhere counts."""
        return is_present(self.folder / name)

    def folders_with(self, name: str) -> list[str]:
        """Return the sorted names of the inner folders that have a file of this name."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{name}"))

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a regular file of at most `limit` bytes."""
        return read_bounded(self.folder / name, limit)

    def open(self, name: str) -> AbstractContextManager[StoredFile]:
        """Open a regular file."""
        return open_local(self.folder / name)

    def announce(self, parts: Iterable[Part]) -> None:
        """Announce all reads to the kernel before the first one, so that it does many of them at once.

        Without it, each scalar is a separate wait: reading 48 000 of them from a cold disk took six times as long.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for file, of_file in groupby(sorted(parts), key=lambda part: part.file):
            # Only a hint: an error of the file will show when the file is read.
            with suppress(OSError), open_regular(self.folder / file) as descriptor:
                for part in of_file:
                    os.posix_fadvise(descriptor, part.offset, part.nbytes, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True, slots=True)
class _LocalFile:
    """A regular file of this machine, by its descriptor."""

    descriptor: int
    size: int

    def read(self, nbytes: int, offset: int) -> bytes:
        return read_at(self.descriptor, nbytes, offset)


@contextmanager
def open_local(path: Path) -> Iterator[StoredFile]:
    """Yield a regular file of this machine; see `open_regular`."""
    with open_regular(path) as descriptor:
        yield _LocalFile(descriptor, os.fstat(descriptor).st_size)


def as_source(place: str | Path | Source) -> Source:
    """Return the folder of a path as a source; a source is returned as it is.

    Raises `UsageError` for anything else.
    """
    return place if isinstance(place, Source) else Folder(path_of("directory", place))


def local_folder(source: Source) -> Path:
    """Return the folder in which the weights of a source are read; raises `UsageError` if they are far away."""
    if source.weights_folder is None:
        raise UsageError(
            Fault(
                where=source.place,
                expected="a directory of this machine, as weights are read",
                found="a place from which only headers and single values are read",
                remedy="Download the checkpoint, such as by hf download, and give the directory.",
            )
        )
    return source.weights_folder

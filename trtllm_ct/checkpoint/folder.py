"""`Folder`: a directory that is held open, and the names in it.

Every name is looked up in the open directory itself, so it makes no difference who exchanges directories or links on
the path to it meanwhile. Links in it are never followed.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from weakref import finalize

from trtllm_ct.checkpoint import file_calls

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path
    from typing import Any

    from typing_extensions import Self

__all__ = ["MAX_DEPTH", "Folder"]

_READ_BYTES = 2**20

MAX_DEPTH = 32
"""The most folders in each other; each is held open while what is below it is looked at. Real outputs have two."""


class Folder:
    """An open directory.

    `path` is where it was opened, and `descriptor` what its names are looked up in. Pickling keeps the path: the
    process that unpickles it opens the directory there. Use it as a context manager, or call `close`; a folder that is
    collected is closed too.
    """

    def __init__(self, path: Path, descriptor: int | None = None, depth: int = 0) -> None:
        """Take an open directory, or open the one at `path`, where a link as the last part is followed.

        `depth` is the number of folders above it that `folder` has opened one by one.
        """
        self.path = path
        self._depth = depth
        self.descriptor = file_calls.open_directory(str(path.resolve())) if descriptor is None else descriptor
        self._close = finalize(self, os.close, self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def close(self) -> None:
        """Close the directory; a second call does nothing."""
        if self._close.detach() is not None:
            file_calls.close(self.descriptor)

    def folder(self, name: str) -> Folder:
        """Open a directory in this one; raises `OSError` for the last of more than `MAX_DEPTH` in each other."""
        if self._depth >= MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} folders in each other", str(self.path / name))
        return Folder(self.path / name, file_calls.open_directory(name, self.descriptor), self._depth + 1)

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return file_calls.list_names(self.descriptor)

    def status(self, name: str | None = None) -> os.stat_result | None:
        """Return the status of a name, None if there is no such name; without a name, that of the directory itself."""
        if name is None:
            return file_calls.status(self.descriptor)
        with suppress(FileNotFoundError):
            return file_calls.status_of(name, self.descriptor)
        return None

    @contextmanager
    def file(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """Open a file with the flags of `os.open`, and yield its descriptor.

        Raises `OSError`, also for what is no regular file.
        """
        descriptor = file_calls.open_file(name, self.descriptor, flags)
        try:
            if not stat.S_ISREG(file_calls.status(descriptor).st_mode):
                raise OSError(0, "not a regular file", str(self.path / name))
            yield descriptor
        finally:
            file_calls.close(descriptor)

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file; raises `OSError` if it has more than `limit` bytes."""
        with self.file(name) as descriptor:
            size = file_calls.status(descriptor).st_size
            if size > limit:
                raise OSError(0, f"{size} bytes, which is too long", str(self.path / name))
            buffer = memoryview(bytearray(size))
            filled = 0
            while filled < size and (count := file_calls.read_at(descriptor, buffer[filled:], filled)):
                filled += count
            return bytes(buffer[:filled])

    def read_start(self, name: str, limit: int) -> bytes:
        """Return the first bytes of a file, at most `limit`; raises `OSError`, also for what is no regular file."""
        with self.file(name) as descriptor:
            buffer = memoryview(bytearray(limit))
            return bytes(buffer[: file_calls.read_at(descriptor, buffer, 0)])

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file; a file of that name is removed before, whatever it is."""
        self.remove(name)
        with self.file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            written = 0
            while written < len(content):
                written += file_calls.write(descriptor, content[written : written + _READ_BYTES])

    def copy(self, name: str, content: Iterable[bytes]) -> None:
        """Write a new file of the pieces of `content`, one after the other; `name` may be below folders, as `a/b`.

        The folders are made.
        """
        self.make_folders(name)
        with self.file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            for piece in content:
                data = piece
                while data:
                    data = data[file_calls.write(descriptor, data) :]

    def make_folders(self, name: str) -> None:
        """Make the folders that `name` is below, as `a` for `a/b`, as far as they are missing."""
        *folders, _ = name.split("/")
        for depth in range(len(folders)):
            with suppress(FileExistsError):
                file_calls.make_directory("/".join(folders[: depth + 1]), self.descriptor)

    def is_file(self, name: str) -> bool:
        """Whether a name is that of a regular file, and not of a link to one."""
        status = self.status(name)
        return status is not None and stat.S_ISREG(status.st_mode)

    def remove(self, name: str) -> None:
        """Remove a name with everything below it, if there is one; links are removed and not followed."""
        status = self.status(name)
        if status is None:
            return
        if stat.S_ISDIR(status.st_mode):
            with self.folder(name) as folder:
                for inner in folder.names():
                    folder.remove(inner)
            file_calls.remove_directory(name, self.descriptor)
        else:
            file_calls.unlink(name, self.descriptor)

    def remove_files(self, files: Collection[str], below: str = "") -> None:
        """Remove the named files, and every folder that holds no other file; names are those of `files`.

        `below` is the place of this directory in these names, empty or with a slash at its end.
        """
        for name in self.names():
            status = self.status(name)
            if status is None:
                continue
            if not stat.S_ISDIR(status.st_mode):
                if below + name in files:
                    file_calls.unlink(name, self.descriptor)
                continue
            with self.folder(name) as folder:
                folder.remove_files(files, f"{below}{name}/")
                is_empty = not folder.names()
            if is_empty:
                file_calls.remove_directory(name, self.descriptor)

    def files(self) -> Iterator[str]:
        """Yield the names of everything that is no directory, those in directories as `directory/name`."""
        for name in self.names():
            status = self.status(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                with self.folder(name) as folder:
                    yield from (f"{name}/{inner}" for inner in folder.files())
            else:
                yield name

    def sync(self) -> None:
        """Return when all files and names in and below the directory would survive a power cut."""
        for name in self.names():
            status = self.status(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                with self.folder(name) as folder:
                    folder.sync()
            elif status is not None and stat.S_ISREG(status.st_mode):
                with self.file(name) as descriptor:
                    file_calls.sync(descriptor)
        file_calls.sync(self.descriptor)

    def is_at(self, name: str, other: Folder) -> bool:
        """Whether `name` in this directory is the directory `other`."""
        status, there = self.status(name), file_calls.status(other.descriptor)
        return status is not None and (status.st_dev, status.st_ino) == (there.st_dev, there.st_ino)

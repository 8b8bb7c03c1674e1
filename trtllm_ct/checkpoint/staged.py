"""`Staged`: a checkpoint far away whose files come into a folder of this machine when they are needed.

Headers and values that decide are read from far away, as of any `RemoteFolder`; weights and side files are read in the
folder, where `Staged.fetch` puts one at a time. Files that this machine has already are linked there and never removed.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, HubError
from trtllm_ct.base.regular_files import open_regular
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.output_errors import output_errors
from trtllm_ct.checkpoint.source import Part
from trtllm_ct.checkpoint.work_folder import DOWNLOADS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from trtllm_ct.checkpoint.folder import Folder
    from trtllm_ct.checkpoint.remote import RemoteFolder
    from trtllm_ct.checkpoint.source import StoredFile

__all__ = ["Staged"]

_CHUNK_BYTES = 2**21


@dataclass(frozen=True, slots=True)
class Staged:
    """A `Source` whose weights are in a folder of the working directory `work`, as far as they were fetched."""

    remote: RemoteFolder
    work: Folder

    @property
    def place(self) -> str:
        """The name of the place far away, with the commit of a repository."""
        return self.remote.place

    @property
    def folder(self) -> Path | None:
        """None: not all files are on this machine at a time."""
        return None

    @property
    def weights_folder(self) -> Path:
        """The folder of this machine into which files come."""
        return self.work.path / DOWNLOADS

    def where(self, name: str) -> str:
        """Return what messages call a file."""
        return self.remote.where(name)

    def names(self) -> list[str]:
        """Return the sorted names of all entries that are not hidden."""
        return self.remote.names()

    def has(self, name: str) -> bool:
        """Whether there is a file of this name far away."""
        return self.remote.has(name)

    def folders_with(self, name: str) -> list[str]:
        """Return the sorted names of the inner folders that have a file of this name."""
        return self.remote.folders_with(name)

    def read(self, name: str, limit: int) -> bytes:
        """Fetch a file of at most `limit` bytes into memory."""
        return self.remote.read(name, limit)

    def open(self, name: str) -> AbstractContextManager[StoredFile]:
        """Open a file far away."""
        return self.remote.open(name)

    def announce(self, parts: Iterable[Part]) -> None:
        """Fetch parts of files at once and keep them until their file was read."""
        self.remote.announce(parts)

    def staged_name(self, name: str) -> str:
        """Return the name that a file has in the working directory."""
        return f"{DOWNLOADS}/{name}"

    def download_bytes(self, name: str) -> int:
        """Return what a file takes on the disk when it is here: nothing where this machine has it already."""
        return 0 if self.remote.transport.downloaded(name) is not None else self.remote.size(name)

    def fetch(self, name: str, take: Callable[[int], object], pause: Callable[[float], object]) -> int:
        """Put a whole file into the folder, or go on where an earlier run was stopped.

        Returns how many bytes were there. `take` is told how many have come, those that were there among them, or by a
        negative number how many come again; `pause` waits. What the two raise ends the download. Raises `HubError` if
        the file can't be fetched or is another one than was listed, and `OutputError` if the disk fails.
        """
        staged, stored = self.staged_name(name), self.remote.transport.downloaded(name)
        with output_errors(self.work.path):
            self.work.make_folders(staged)
            if stored is not None:
                self.work.remove(staged)
                file_calls.link(str(stored.absolute()), staged, self.work.descriptor)
                return 0
            try:
                with self.work.file(staged, os.O_RDWR | os.O_CREAT) as descriptor:
                    return _Download(self, name, descriptor, take).run(pause)
            finally:
                self._remove_empty(name)

    def fetch_side_file(self, name: str) -> None:
        """Put a small file into the folder as `fetch` does, but copy it where this machine has it: no link counts."""
        stored = self.remote.transport.downloaded(name)
        if stored is None:
            self.fetch(name, int, time.sleep)
            return
        with output_errors(self.work.path), open_regular(stored) as descriptor:
            self.remove(name)
            self.work.copy(self.staged_name(name), iter(lambda: os.read(descriptor, _CHUNK_BYTES), b""))

    def remove(self, name: str) -> None:
        """Remove a file from the folder, if it is there."""
        self.work.remove(self.staged_name(name))

    def _remove_empty(self, name: str) -> None:
        """Remove a file of which nothing came, unless it is empty far away too: it is no work to go on from."""
        status = self.work.status(self.staged_name(name))
        if status is not None and not status.st_size and self.remote.size(name):
            self.remove(name)

    def remove_but(self, kept: Collection[str], files: Iterable[str]) -> None:
        """Remove those of `files` from the folder that are none of `kept`; links too, as they may be out of date."""
        staged = {name: self.staged_name(name) for name in files}
        self.work.remove_files(
            {place for name, place in staged.items() if name not in kept or not self.work.is_file(place)}
        )


@dataclass(slots=True)
class _Download:
    """One file on its way to `descriptor`, which may have the beginning of it."""

    source: Staged
    name: str
    descriptor: int
    take: Callable[[int], object]

    def run(self, pause: Callable[[float], object]) -> int:
        """Fetch what is missing; return how many bytes were there.

        A beginning that turns out to be damaged is fetched anew.
        """
        size, stated = self.source.remote.size(self.name), self.source.remote.transport.hashes.get(self.name)
        before = self._done(size if stated is not None else 0)
        found = self._filled(before, size, pause)
        if stated is not None and found != stated and before:
            self.take(-size)
            before = self._done(0)
            found = self._filled(before, size, pause)
        if stated is not None and found != stated:
            file_calls.truncate(self.descriptor, 0)
            raise self._other_file(stated, found)
        return before

    def _filled(self, done: int, size: int, pause: Callable[[float], object]) -> str:
        """Fetch the bytes behind those that are `done`, and return the SHA-256 of all of them."""
        digest = hashlib.sha256()
        self._add_done(digest, done)
        self.take(done)

        def write(piece: bytes) -> None:
            nonlocal done
            self._write(piece, done)
            done += len(piece)
            digest.update(piece)
            self.take(len(piece))

        if done < size:
            self.source.remote.transport.copy(Part(self.name, done, size - done), write, pause)
        return digest.hexdigest()

    def _other_file(self, stated: str, found: str) -> HubError:
        return HubError(
            Fault(
                where=self.source.where(self.name),
                expected=f"a file with SHA-256 {stated}, as it is listed",
                found=found,
                remedy="A proxy or a mirror changes it, or it is damaged where it is: try another network, or set "
                "HF_ENDPOINT to another Hub.",
            )
        )

    def _done(self, most: int) -> int:
        """Return how many bytes are here; a file that is longer than `most` is fetched anew.

        A power cut may have left zeros in place of the last bytes. So where no hash will tell, nothing is believed.
        """
        done = file_calls.status(self.descriptor).st_size
        if done > most:
            file_calls.truncate(self.descriptor, 0)
            return 0
        return done

    def _add_done(self, digest: hashlib._Hash, done: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, done)))
        offset = 0
        while offset < done and (count := file_calls.read_at(self.descriptor, buffer[: done - offset], offset)):
            digest.update(buffer[:count])
            offset += count

    def _write(self, piece: bytes, offset: int) -> None:
        # The transport takes an error of a connection, which is an `OSError` too, for one that may pass.
        with output_errors(self.source.work.path):
            data = memoryview(piece)
            while data:
                written = file_calls.write_at(self.descriptor, data, offset)
                data, offset = data[written:], offset + written

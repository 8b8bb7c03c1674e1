"""`RemoteFolder`: a checkpoint that is far away. Files are listed once, and only parts of them are fetched.

The bytes come from a `Transport`: a repository of the Hub (`hub/client.py`) or another store (`object_store.py`). Many
parts are fetched at once, and those that are near each other in one request. Whatever the other side sends or claims,
this process holds no more than the limits below.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.base.errors import Fault, HubError
from trtllm_ct.checkpoint.source import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from trtllm_ct.checkpoint.source import StoredFile

__all__ = ["MOST_ANNOUNCED", "RemoteFolder", "Transport", "is_inside"]

CONCURRENT = 16
"""Requests at a time: twice as many as huggingface_hub downloads files at a time, since these are short."""

NEAR = 2**14
"""Parts with fewer bytes between them than that are fetched together: a request takes longer than these bytes do."""

MOST_ANNOUNCED = 512 * 2**20
"""The most bytes that are fetched ahead and held at a time. The headers of 10^6 tensors have 200 MB."""


def is_inside(path: str) -> bool:
    """Whether a path is one below a folder, whatever the other side calls its files: `a/../../b` is not."""
    return not {"", ".", ".."} & set(path.split("/"))


class Transport(Protocol):
    """Fetches bytes of files that are far away."""

    @property
    def place(self) -> str:
        """What messages and reports call the folder."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """The size of each file in bytes, by its path in the folder."""
        ...

    @property
    def hashes(self) -> Mapping[str, str]:
        """The SHA-256 of those files of which it is stated, in hexadecimal digits."""
        ...

    def fetch(self, part: Part) -> bytes:
        """Return exactly the bytes of a part, which lies inside its file; raises `HubError`. Threads may call it."""
        ...

    def copy(self, part: Part, take: Callable[[bytes], object], pause: Callable[[float], object]) -> None:
        """Pass exactly the bytes of a part to `take`, in order and piece by piece; `pause` waits for some seconds.

        Nothing of them is kept elsewhere. Raises `HubError`, and what the functions raise. Threads may call it.
        """
        ...

    def version(self, file: str) -> str:
        """What the content of a file is known by, beside `place` and its size; empty if there is no more."""
        ...

    def downloaded(self, file: str) -> Path | None:
        """Return where this machine has a file already, in a cache that belongs to somebody else."""
        ...

    def require_reachable(self, files: Sequence[str]) -> None:
        """Raise `HubError` if it is known that these files can't be fetched now."""
        ...


class RemoteFolder:
    """A folder that is far away, as a `Source`."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._ready: dict[str, list[tuple[int, bytes]]] = {}

    @property
    def place(self) -> str:
        """What messages and reports call it."""
        return self.transport.place

    @property
    def folder(self) -> Path | None:
        """None: the files are not on this machine."""
        return None

    @property
    def weights_folder(self) -> Path | None:
        """None: only parts of files are read."""
        return None

    def where(self, name: str) -> str:
        """Return what messages call a file."""
        return f"{self.place}/{name}"

    def names(self) -> list[str]:
        """Return the sorted names of all entries that are not hidden."""
        return sorted({path.partition("/")[0] for path in self.transport.sizes if not path.startswith(".")})

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return name in self.transport.sizes

    def folders_with(self, name: str) -> list[str]:
        """Return the sorted names of the inner folders that have a file of this name."""
        paths = (path.split("/") for path in self.transport.sizes)
        return sorted(parts[0] for parts in paths if len(parts) == 2 and parts[1] == name)

    def read(self, name: str, limit: int) -> bytes:
        """Fetch a file of at most `limit` bytes."""
        size = self.size(name)
        if size > limit:
            found = f"{size} bytes, where at most {limit} are read"
            raise OSError(errno.EFBIG, found, self.where(name))
        return self._fetch(Part(name, 0, size))

    @contextmanager
    def open(self, name: str) -> Iterator[StoredFile]:
        """Yield a file; what was announced of it is dropped at the end."""
        try:
            yield _RemoteFile(self, name, self.size(name))
        finally:
            self._ready.pop(name, None)

    def announce(self, parts: Iterable[Part]) -> None:
        """Fetch parts of files at once and keep them until their file was read.

        Raises `HubError` for what can't be fetched, and for more than `MOST_ANNOUNCED` bytes.
        """
        merged = list(_merged(self._inside(part) for part in parts if self.has(part.file)))
        total = sum(part.nbytes for part in merged)
        if total > MOST_ANNOUNCED:
            raise HubError(
                Fault(
                    where=self.place,
                    expected=f"at most {MOST_ANNOUNCED} bytes to read at once",
                    found=f"{total} bytes of values that decide how modules are delivered",
                    remedy="Download the checkpoint, and give the directory.",
                )
            )
        for part, data in self._fetch_all(merged):
            self._ready.setdefault(part.file, []).append((part.offset, data))

    def bytes_of(self, part: Part) -> bytes:
        """Return the bytes of a part, from what was announced as far as it goes."""
        for offset, data in self._ready.get(part.file, ()):
            begin = part.offset - offset
            if 0 <= begin < len(data):
                start = data[begin : begin + part.nbytes]
                rest = Part(part.file, part.offset + len(start), part.nbytes - len(start))
                return start + self._fetch(rest)
        return self._fetch(part)

    def _fetch(self, part: Part) -> bytes:
        part = self._inside(part)
        return self.transport.fetch(part) if part.nbytes else b""

    def _inside(self, part: Part) -> Part:
        """Return the part as far as its file goes."""
        return part._replace(nbytes=max(0, min(part.nbytes, self.size(part.file) - part.offset)))

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        if name not in self.transport.sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(name))
        return self.transport.sizes[name]

    def _fetch_all(self, parts: list[Part]) -> Iterator[tuple[Part, bytes]]:
        """Yield the parts with their bytes, as they come; after the first fault nothing more is asked for."""
        if not parts:
            return
        executor = ThreadPoolExecutor(min(CONCURRENT, len(parts)), thread_name_prefix="fetch")
        try:
            futures = {executor.submit(self._fetch, part): part for part in parts}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file of a `RemoteFolder`, which is fetched by parts."""

    source: RemoteFolder
    name: str
    size: int

    def read(self, nbytes: int, offset: int) -> bytes:
        return self.source.bytes_of(Part(self.name, offset, nbytes))


def _merged(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield the parts in the order of their files and offsets; those that are near each other made one."""
    last: Part | None = None
    for part in sorted(parts):
        if last is not None and part.file == last.file and part.offset <= last.offset + last.nbytes + NEAR:
            end = max(last.offset + last.nbytes, part.offset + part.nbytes)
            last = last._replace(nbytes=end - last.offset)
        else:
            if last is not None:
                yield last
            last = part
    if last is not None:
        yield last

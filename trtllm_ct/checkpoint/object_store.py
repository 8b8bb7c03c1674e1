"""`open_url`: a folder in a store that fsspec opens, such as `s3://BUCKET/FOLDER` or `gs://BUCKET/FOLDER`.

fsspec finds the package that knows the protocol (s3fs, gcsfs, ...), which has its own settings of access. Nothing is
kept: a store does not say which version of a file it holds.
Source: fsspec 2023.5 and 2026.9, `core.py: url_to_fs`, `spec.py: AbstractFileSystem.find, cat_file`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, HubError, MissingDependencyError, TrtllmCtError
from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.checkpoint.remote import RemoteFolder, is_inside

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from trtllm_ct.checkpoint.source import Part, Source

__all__ = ["open_url"]

_DEPTH = 2
"""Files of inner folders are listed too: an index may name them."""

_PIECE_BYTES = 2**24
"""How much of a file is asked for at once where all of it is copied."""


def open_url(url: str) -> Source:
    """Return a folder in a store as a source.

    Raises `HubError` for a URL that can't be read, and `MissingDependencyError` if fsspec, or the package that it needs
    for the protocol, is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError(PACKAGES["fsspec"].fault()) from error
    try:
        store, path = fsspec.core.url_to_fs(url)
        found = store.find(path, maxdepth=_DEPTH, detail=True)
    except Exception as error:
        raise _error(url, "a folder that can be listed", error) from error
    start = f"{path.rstrip('/')}/"
    names = [path.removeprefix(start) for path in found if path.startswith(start)]
    # The key of an object may be any text. What leads out of the folder is no file of it.
    sizes = {name: found[start + name]["size"] for name in names if is_inside(name)}
    if not sizes:
        raise _error(url, "a folder with files", FileNotFoundError("none"))
    versions = {name: _version(found[start + name]) for name in sizes}
    return RemoteFolder(_StoreFolder(url.rstrip("/"), sizes, versions, store, start))


def _version(entry: Mapping[str, Any]) -> str:
    """Return a hash of what a store says about a file.

    If that is no more than the size, it is another one each time: nobody knows whether the file is still the same.
    """
    told = sorted(entry.items()) if entry.keys() - {"name", "size", "type"} else secrets.token_hex(16)
    return sha256(repr(told).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _StoreFolder:
    """A folder of a store, as a `Transport`; `store` is a file system of fsspec.

    `versions` are hashes of what the store says about each file, such as its time and its ETag.
    """

    place: str
    sizes: Mapping[str, int]
    versions: Mapping[str, str]
    store: Any
    start: str

    def fetch(self, part: Part) -> bytes:
        """Return the bytes of a part of a file; raises `HubError`."""
        where, end = f"{self.place}/{part.file}", part.offset + part.nbytes
        try:
            data = bytes(self.store.cat_file(self.start + part.file, start=part.offset, end=end))
        except Exception as error:
            raise _error(where, f"bytes {part.offset}-{end - 1}", error) from error
        if len(data) != part.nbytes:
            found = ValueError(f"{len(data)} of them")
            raise _error(where, f"{part.nbytes} bytes from byte {part.offset} on", found)
        return data

    @property
    def hashes(self) -> Mapping[str, str]:
        """Empty: stores have hashes of several kinds."""
        return {}

    def copy(self, part: Part, take: Callable[[bytes], object], pause: Callable[[float], object]) -> None:
        """Pass the bytes of a part of a file to `take`, in order; the package of the protocol waits and tries again."""
        del pause
        for offset in range(part.offset, part.offset + part.nbytes, _PIECE_BYTES):
            nbytes = min(_PIECE_BYTES, part.offset + part.nbytes - offset)
            take(self.fetch(part._replace(offset=offset, nbytes=nbytes)))

    def version(self, file: str) -> str:
        """Return a hash of what the store said about a file when it was listed."""
        return self.versions[file]

    def downloaded(self, file: str) -> Path | None:
        """Return None: nothing of a store is kept."""
        del file
        return None

    def require_reachable(self, files: Sequence[str]) -> None:
        """Do nothing: a store is asked when it is read."""


def _error(where: str, expected: str, error: Exception) -> TrtllmCtError:
    """Return the error for what a store answers."""
    found = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    remedy = "Check the URL, and the access that the package for this protocol is set up with."
    if isinstance(error, ImportError):
        remedy = "Install the package that fsspec names for this protocol, such as s3fs or gcsfs."
        return MissingDependencyError(Fault(where=where, expected=expected, found=found, remedy=remedy))
    return HubError(Fault(where=where, expected=expected, found=found, remedy=remedy))

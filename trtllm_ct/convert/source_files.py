"""The identity and the content of a conversion's source files: are they still what the plan was made from?

Name, size and modification time are not enough: tools that make reproducible archives give all files the same times,
and two fine-tuned versions of a model have files of the same sizes. So a conversion also knows the resolved path, the
inode and the change time of each file, which no tool can set, a hash of each header, and a hash of samples of the
payload that each unit reads. Files far away are known by the commit of their repository and by their hashes in it, so
that none of them has to be fetched to know that they are the same.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, Fault
from trtllm_ct.base.regular_files import open_regular, read_at
from trtllm_ct.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from trtllm_ct.checkpoint.open_files import OpenFiles
from trtllm_ct.checkpoint.read_errors import file_changed, read_error
from trtllm_ct.checkpoint.staged import Staged

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.checkpoint.reader import Run

__all__ = ["SourceFile", "StagedFile", "sample_hash", "source_files"]

_SAMPLE_BYTES = 4096
_SAMPLE_STEP = 2**22
"""From the beginning of a run to its end, a sample every so many bytes; the last bytes are always one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A source file as it was when the conversion was planned; `header` is a hash of its header.

    `path` is resolved, because in a hub cache every file is a link to its content.
    """

    name: str
    path: Path
    inode: int
    size: int
    modified: int
    changed: int
    header: str

    @property
    def content(self) -> str:
        """What is the same on all machines that read the file, as text."""
        return f"{self.name} {self.size} {self.modified} {self.header}"

    @property
    def identity(self) -> str:
        """What is the same only for this very file, as text."""
        return f"{self.path} {self.inode} {self.changed}"

    def require_same(self, directory: Path) -> None:
        """Raise `CatalogError` if the file of this name in `directory` is another one now, or was written to.

        The change time is left out: it also changes when somebody links the file.
        """
        try:
            status = (directory / self.name).stat()
        except OSError as error:
            raise self._changed(f"{error.strerror or error}".lower()) from None
        if status.st_ino != self.inode:
            raise self._changed("another file of that name")
        if status.st_size != self.size:
            raise self._changed(f"{status.st_size} bytes")
        if status.st_mtime_ns != self.modified:
            raise self._changed("a file that was written to")

    def unreadable(self) -> CatalogError:
        """Return the error for a file of which the disk could not deliver some bytes."""
        return self._changed("bytes that the disk could not deliver")

    def _changed(self, found: str) -> CatalogError:
        remedy = "The file changed or vanished while it was in use: wait until it is complete and start again."
        expected = f"the file of {self.size} bytes that the conversion was planned for"
        return CatalogError(Fault(where=self.name, expected=expected, found=found, remedy=remedy))


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedFile:
    """A source file far away as it was listed; `place` names all files with their commit, `version` this one."""

    name: str
    place: str
    folder: Path
    size: int
    version: str

    @property
    def path(self) -> Path:
        """Where the file is while a unit reads it."""
        return (self.folder / self.name).resolve()

    @property
    def content(self) -> str:
        """What is the same wherever the file is read, as text."""
        return f"{self.name} {self.size} {self.version}"

    @property
    def identity(self) -> str:
        """What is the same only for this commit, as text."""
        return self.place

    def require_same(self, directory: Path) -> None:
        """Raise `CatalogError` if the file is not here as it was fetched."""
        try:
            size = (directory / self.name).stat().st_size
        except OSError as error:
            raise self._changed(f"{error.strerror or error}".lower()) from None
        if size != self.size:
            raise self._changed(f"{size} bytes")

    def unreadable(self) -> CatalogError:
        """Return the error for a file of which the disk could not deliver some bytes."""
        return self._changed("bytes that the disk could not deliver")

    def _changed(self, found: str) -> CatalogError:
        expected = f"the file of {self.size} bytes that was fetched of {self.place}"
        remedy = "It was changed while it was in use: run the same command again."
        return CatalogError(Fault(where=self.name, expected=expected, found=found, remedy=remedy))


def source_files(catalog: Catalog) -> dict[str, SourceFile | StagedFile]:
    """Return the files of a catalog by name, as they are now; raises `CatalogError` for a file that can't be read."""
    source = catalog.source
    if isinstance(source, Staged):
        return {name: _staged_file(source, name) for name in catalog.files}
    return {name: _source_file(catalog.directory, name) for name in catalog.files}


def _staged_file(source: Staged, name: str) -> StagedFile:
    version = source.remote.transport.version(name)
    size = source.remote.size(name)
    return StagedFile(name=name, place=source.place, folder=source.weights_folder, size=size, version=version)


def _source_file(directory: Path, name: str) -> SourceFile:
    try:
        with open_regular(directory / name) as descriptor:
            status = os.fstat(descriptor)
            length = read_at(descriptor, LENGTH_BYTES, 0)
            header = read_at(descriptor, min(int.from_bytes(length, "little"), MAX_HEADER_BYTES), LENGTH_BYTES)
            path = (directory / name).resolve()
    except OSError as error:
        found, remedy = f"{error.strerror or error}".lower(), "Check its permissions and the disk."
        raise CatalogError(Fault(where=name, expected="a readable file", found=found, remedy=remedy)) from None
    return SourceFile(
        name=name,
        path=path,
        inode=status.st_ino,
        size=status.st_size,
        modified=status.st_mtime_ns,
        changed=status.st_ctime_ns,
        header=hashlib.sha256(length + header).hexdigest(),
    )


def sample_hash(catalog: Catalog, runs: Iterable[Run]) -> str:
    """Return a hash of samples of the stored bytes in `runs`; a run of at most two samples is read whole.

    Of files far away nothing is read: the journal knows their hashes. Raises `CatalogError` when a file is gone or
    shorter than its header says.
    """
    if isinstance(catalog.source, Staged):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    with OpenFiles(catalog.directory) as files:
        for run in runs:
            tensor = catalog.tensors[run.name]
            size = tensor.spec.dtype.itemsize
            end = tensor.offset + (tensor.spec.numel if run.end is None else run.end) * size
            try:
                with files.descriptor(tensor.file) as descriptor:
                    for offset, nbytes in _samples(tensor.offset + run.begin * size, end):
                        data = read_at(descriptor, nbytes, offset)
                        if len(data) < nbytes:
                            raise file_changed(tensor, f"a file that ends before byte {offset + nbytes}")
                        digest.update(data)
            except OSError as error:
                raise read_error(tensor, error) from None
    return digest.hexdigest()


def _samples(begin: int, end: int) -> list[tuple[int, int]]:
    """Return offsets and lengths of the samples of a range of bytes."""
    if end - begin <= 2 * _SAMPLE_BYTES:
        return [(begin, end - begin)] if end > begin else []
    offsets = [*range(begin, end - _SAMPLE_BYTES, _SAMPLE_STEP), end - _SAMPLE_BYTES]
    return [(offset, _SAMPLE_BYTES) for offset in offsets]

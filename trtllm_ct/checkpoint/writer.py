"""Write safetensors files: headers first, then the payload in any order, with bounded memory.

`create_files` creates every file of a plan at its final size. Any number of `TensorWriter` objects, in threads or
processes, then write payloads directly to their places, without waiting for their neighbours in the file.
`ShardedWriter` does both for a single caller.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.catalog import INDEX_FILE
from trtllm_ct.checkpoint.copies import copy_stretch, stretches
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.checkpoint.output_errors import NO_ROOM
from trtllm_ct.checkpoint.output_files import OutputFiles, Piece, pieces_of
from trtllm_ct.checkpoint.read_errors import read_error
from trtllm_ct.checkpoint.stacks import StackEntries
from trtllm_ct.checkpoint.transfer import CHUNK_BYTES, checksum, preallocate, read_into, write_all
from trtllm_ct.checkpoint.write_plan import WritePlan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.checkpoint.copies import Copied
    from trtllm_ct.checkpoint.open_files import OpenFiles
    from trtllm_ct.checkpoint.write_plan import PlannedFile
    from trtllm_ct.layouts.stored_array import StoredArray

__all__ = [
    "ShardedWriter",
    "TensorWriter",
    "create_files",
    "file_locks",
    "require_room",
    "write_index",
]

_BLOCK_BYTES = 512
"""The unit of `st_blocks`, whatever the file system's blocks are."""


def create_files(folder: Folder, plan: WritePlan) -> None:
    """Create the files of a plan in `folder`: write headers, reserve room for all payload.

    A file that already has its header and its final size stays as it is, payload included. Raises `UsageError` when the
    disk is too small.
    """
    missing = require_room(folder, plan)
    needed = sum(file.nbytes for file in missing)
    try:
        for file in missing:
            folder.remove(file.name)
            with folder.file(file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                preallocate(descriptor, file.nbytes)
                write_all(descriptor, memoryview(file.header), 0)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        free = file_calls.free_bytes(folder.descriptor)
        raise _no_room(folder, needed, f"{error.strerror}, {free} bytes free".lower()) from None


def require_room(folder: Folder, plan: WritePlan, others: int = 0) -> list[PlannedFile]:
    """Return the files of a plan that are still to be created.

    Raises `UsageError` when the disk has no room for them and for `others`, the bytes of other files. What else is in
    the folder is removed before they are written, so its room counts as free.
    """
    missing = [file for file in plan.files if not _is_created(folder, file)]
    needed = sum(file.nbytes for file in missing) + others
    free = file_calls.free_bytes(folder.descriptor)
    if free < needed:
        free += _removed_bytes(folder, {file.name for file in plan.files} - {file.name for file in missing})
    if free < needed:
        raise _no_room(folder, needed, f"{free} bytes free")
    return missing


def _removed_bytes(folder: Folder, kept: Collection[str]) -> int:
    """Return the bytes on the disk of all files in and below a folder but those in `kept`."""
    statuses = (folder.status(name) for name in folder.files() if name not in kept)
    return sum(status.st_blocks * _BLOCK_BYTES for status in statuses if status is not None and status.st_nlink == 1)


def file_locks(plan: WritePlan) -> dict[str, Lock]:
    """Return a lock for each file of a plan, to be shared by the writers of one process."""
    return {file.name: Lock() for file in plan.files}


def write_index(folder: Folder, plan: WritePlan) -> None:
    """Write the index if the plan has several files."""
    if plan.index is not None:
        folder.write(INDEX_FILE, plan.index.encode())


class TensorWriter:
    """Writes tensors into the files of a plan, which `create_files` created. Use a writer from one thread only.

    Several writers may fill the same files at once, each with its own tensors. Writers of one process share `locks`,
    one lock per file: the kernel lets only one thread at a time write to a file, and without locks the other threads
    would not sleep while they wait but keep a core busy. `pieces` holds all ranges of bytes that were written and not
    only copied, in order. Memory: one entry of a stacked tensor, see `StackPart`. At most 16 files are open at a time;
    leaving the context closes them.
    """

    def __init__(self, folder: Folder, plan: WritePlan, locks: Mapping[str, Lock] | None = None) -> None:
        self._plan = plan
        self._locks = file_locks(plan) if locks is None else locks
        self._files = OutputFiles(folder, os.O_WRONLY)
        self._written: dict[str, list[tuple[int, int]]] = {}
        self._entries = StackEntries()
        self.pieces: list[Piece] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def write(self, name: str, tensor: StoredArray, row: int | None = None) -> None:
        """Write the tensor `name` to its place, or some of its rows, of which `row` is the first.

        Nothing is copied on the way. Raises `ValueError` for a tensor that does not fit the plan: unknown, of another
        dtype or shape, already written, or not contiguous. Each of these is a mistake of the caller, never of a
        checkpoint.
        """
        if name not in self._plan.places:
            raise ValueError(f"{name} is not among the planned tensors")
        spec = self._plan.places[name].spec
        shape = spec.shape if row is None else (tensor.shape[0], *spec.shape[1:])
        if tensor.dtype is not spec.dtype or tensor.shape != shape:
            raise ValueError(f"{name} was planned as {spec}, not {tensor.spec}")
        if not tensor.elements.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous, not with strides {tensor.elements.strides}")
        self.write_bytes(name, tensor.data, row * (spec.nbytes // spec.shape[0]) if row else 0)

    def write_bytes(self, name: str, data: memoryview, begin: int = 0) -> None:
        """Write bytes of the tensor `name` to their place, starting `begin` bytes after the tensor's first one.

        The rows of a matrix in a stacked tensor are kept until its entry is complete, which is then written at once.
        Raises `ValueError` for an unknown tensor, for bytes outside the tensor, and for bytes that were written before.
        """
        if name not in self._plan.places:
            raise ValueError(f"{name} is not among the planned tensors")
        self._claim(name, begin, begin + len(data))
        if name in self._plan.stacks:
            entry = self._entries.add(self._plan, name, data, begin)
            data, begin = entry if entry is not None else memoryview(b""), 0
        while data:
            self._put(name, begin, data[:CHUNK_BYTES])
            data, begin = data[CHUNK_BYTES:], begin + CHUNK_BYTES

    def copy(self, copied: Collection[Copied], sources: OpenFiles, *, recorded: bool = False) -> None:
        """Copy whole tensors from source files to their places.

        They are not in `pieces`, because the source holds the same; with `recorded` they are, for a source that is
        removed later.
        Raises `CatalogError` when a source file can't be read, and `ValueError` for a tensor that is unknown, stacked
        or was written before.
        """
        for name, _, _ in copied:
            if name not in self._plan.places or name in self._plan.stacks:
                raise ValueError(f"{name} has no place of its own among the planned tensors")
            self._claim(name, 0, self._plan.places[name].spec.nbytes)
        for stretch in stretches(copied, self._plan.places):
            with ExitStack() as opened:
                try:
                    source = opened.enter_context(sources.descriptor(stretch.source))
                except OSError as error:
                    raise read_error(stretch.stored[0], error) from None
                copy_stretch(stretch, source, self._files[stretch.file], self._locks[stretch.file])
                if recorded:
                    self.pieces += pieces_of(stretch, source)

    def is_complete(self, name: str) -> bool:
        """Whether every byte of a tensor was written by this writer."""
        return self._written.get(name) == [(0, self._plan.places[name].spec.nbytes)]

    def _claim(self, name: str, begin: int, end: int) -> None:
        """Record the bytes of a tensor that are about to be written.

        Raises `ValueError` for bytes outside the tensor, which belong to its neighbours in the file, and for bytes that
        were written before.
        """
        size = self._plan.places[name].spec.nbytes
        if not 0 <= begin <= end <= size:
            raise ValueError(f"{name} has {size} bytes, and {begin} to {end} lie outside")
        written = self._written.get(name, [])
        if any((first < end and begin < last) or (begin, end) == (first, last) for first, last in written):
            raise ValueError(f"{name} was written before")
        self._written[name] = _merged([*written, (begin, end)])

    def _put(self, name: str, begin: int, data: memoryview) -> None:
        """Write bytes of a tensor at `begin`, and record them in `pieces`."""
        place = self._plan.places[name]
        file, offset = place.file, place.offset + begin
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.is_continued_by(file, offset, len(data)):
            self.pieces[-1] = last.extended_by(data)
        else:
            self.pieces.append(Piece(file=file, offset=offset, nbytes=len(data), checksum=checksum(data)))
        with self._locks[file]:
            write_all(self._files[file], data, offset)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return disjoint ranges in ascending order, those that touch made one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


class ShardedWriter:
    """Writes the tensors of `specs` into safetensors files in `directory`, which must exist.

    The constructor creates all files at their final size, each with its header. `write` streams one tensor to its place
    and copies nothing. `finish` checks that no tensor is missing and writes the index. Leaving the context closes all
    files.
    """

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], *, max_shard_bytes: int) -> None:
        self._folder = Folder(directory)
        self._plan = WritePlan.of(specs, max_shard_bytes)
        create_files(self._folder, self._plan)
        self._writer = TensorWriter(self._folder, self._plan)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._writer.close()

    def write(self, name: str, tensor: StoredArray, row: int | None = None) -> None:
        """Write a tensor, or some of its rows, to its place; see `TensorWriter.write`."""
        self._writer.write(name, tensor, row)

    def finish(self) -> tuple[str, ...]:
        """Close the files, write the index when there are several, and return the names of all files written.

        Raises `ValueError` when a planned tensor was not written.
        """
        missing = [name for name in self._plan.places if not self._writer.is_complete(name)]
        if missing:
            raise ValueError(f"{len(missing)} planned tensors were not written: {format_names(sorted(missing))}")
        self.close()
        write_index(self._folder, self._plan)
        return self._plan.file_names


def _is_created(folder: Folder, file: PlannedFile) -> bool:
    """Whether a regular file with the planned header and the planned size exists already."""
    status = folder.status(file.name)
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != file.nbytes or status.st_nlink != 1:
        return False
    with folder.file(file.name) as descriptor:
        header = bytearray(len(file.header))
        return read_into(descriptor, memoryview(header), 0) == len(header) and header == file.header


def _no_room(folder: Folder, needed: int, found: str) -> UsageError:
    return UsageError(
        Fault(
            where=str(folder.path),
            expected=f"room for {needed} bytes",
            found=found,
            remedy="Free some space, or choose an output directory on another disk.",
        )
    )

"""The files of an output while they are filled: their descriptors, and whether what was written is still in them."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.copies import is_same
from trtllm_ct.checkpoint.read_errors import file_changed, read_error
from trtllm_ct.checkpoint.transfer import PAGE_BYTES, checksum, read_into

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Self

    from trtllm_ct.checkpoint.copies import Stretch
    from trtllm_ct.checkpoint.folder import Folder
    from trtllm_ct.checkpoint.open_files import OpenFiles

__all__ = ["PIECE_BYTES", "OutputFiles", "Piece", "copies_are_intact", "pieces_are_intact", "pieces_of"]

PIECE_BYTES = 8 * 2**20
"""Largest size of a piece: small enough to be read at once, and large enough to keep journals short."""

_MAX_OPEN_FILES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A contiguous range of at most `PIECE_BYTES` that was written: its place, and its `transfer.checksum`."""

    file: str
    offset: int
    nbytes: int
    checksum: int

    def is_continued_by(self, file: str, offset: int, nbytes: int) -> bool:
        """Whether `nbytes` bytes at `offset` of `file` can be added to this piece.

        They must follow it directly, it must end with a whole page so that checksums add up, and the result must not be
        longer than `PIECE_BYTES`.
        """
        follows = (file, offset) == (self.file, self.offset + self.nbytes)
        return follows and self.nbytes % PAGE_BYTES == 0 and self.nbytes + nbytes <= PIECE_BYTES

    def extended_by(self, data: memoryview) -> Piece:
        """Return this piece extended by `data`, the bytes that follow it."""
        total = (self.checksum + checksum(data, self.nbytes // PAGE_BYTES)) % 2**64
        return Piece(file=self.file, offset=self.offset, nbytes=self.nbytes + len(data), checksum=total)


def pieces_are_intact(folder: Folder, pieces: Iterable[Piece]) -> bool:
    """Whether the files of a folder still hold all pieces unchanged; reads them and compares checksums."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    with OutputFiles(folder, os.O_RDONLY) as files:
        try:
            for piece in pieces:
                data = buffer[: piece.nbytes]
                nbytes = read_into(files[piece.file], data, piece.offset)
                if nbytes < piece.nbytes or checksum(data) != piece.checksum:
                    return False
        except OSError:
            return False
    return True


def pieces_of(stretch: Stretch, source: int) -> Iterator[Piece]:
    """Yield the pieces of what was copied from an open file, for a journal whose source is gone when it is read.

    Raises `CatalogError` when the source ends too early or can't be read.
    """
    buffer = memoryview(bytearray(min(PIECE_BYTES, stretch.nbytes)))
    for done in range(0, stretch.nbytes, PIECE_BYTES):
        data = buffer[: min(PIECE_BYTES, stretch.nbytes - done)]
        begin = stretch.begin + done
        try:
            nbytes = read_into(source, data, begin)
        except OSError as error:
            raise read_error(stretch.tensor_at(begin), error) from None
        if nbytes < len(data):
            raise file_changed(stretch.tensor_at(begin), f"a file that ends before byte {begin + len(data)}")
        yield Piece(file=stretch.file, offset=stretch.offset + done, nbytes=nbytes, checksum=checksum(data))


def copies_are_intact(folder: Folder, copies: Iterable[Stretch], sources: OpenFiles) -> bool:
    """Whether the files of a folder still hold what was copied into them; compares it with the source."""
    with OutputFiles(folder, os.O_RDONLY) as files:
        try:
            for stretch in copies:
                with sources.descriptor(stretch.source) as source:
                    if not is_same(stretch, source, files[stretch.file]):
                        return False
        except OSError:
            return False
    return True


class OutputFiles:
    """File descriptors by file name, opened on demand; the least recently used one is closed to make room."""

    def __init__(self, folder: Folder, flags: int) -> None:
        self._folder = folder
        self._flags = flags
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors."""
        while self._descriptors:
            file_calls.close(self._descriptors.popitem()[1])

    def __getitem__(self, file: str) -> int:
        if file not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                file_calls.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[file] = file_calls.open_file(file, self._folder.descriptor, self._flags)
        self._descriptors.move_to_end(file)
        return self._descriptors[file]

"""Copy tensors from file to file inside the kernel, where their bytes do not change.

`copy_file_range` moves pages from one file to the other: no byte passes through this process, no page of the source is
mapped, and a file system whose files can share blocks copies nothing at all. Where it is missing or fails for whatever
reason, the bytes are read and written instead, which also says which of the two files is to blame.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.read_errors import file_changed, read_error
from trtllm_ct.checkpoint.transfer import WRITE_BYTES, read_into, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from threading import Lock

    from trtllm_ct.checkpoint.catalog import StoredTensor

__all__ = ["Copied", "Stretch", "copy_stretch", "is_same", "stretches"]

_COPY_BYTES = 16 * 2**20
"""The most bytes of one call, some milliseconds: other threads that write to the same file wait for its end."""

_COMPARED_BYTES = 2**20


class Copied(NamedTuple):
    """A tensor `name` of the output, whose bytes are those of the stored tensor `stored` from its byte `first` on."""

    name: str
    stored: StoredTensor
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """`nbytes` bytes from byte `begin` of the file `source`, which go to byte `offset` of the file `file`.

    They belong to one or more of the tensors `stored`, in order.
    """

    source: str
    begin: int
    file: str
    offset: int
    nbytes: int
    stored: tuple[StoredTensor, ...]

    def is_continued_by(self, other: Stretch) -> bool:
        """Whether another stretch follows directly, in both files."""
        end = (self.source, self.begin + self.nbytes, self.file, self.offset + self.nbytes)
        return end == (other.source, other.begin, other.file, other.offset)

    def continued_by(self, other: Stretch) -> Stretch:
        """Return both stretches as one."""
        return Stretch(
            source=self.source,
            begin=self.begin,
            file=self.file,
            offset=self.offset,
            nbytes=self.nbytes + other.nbytes,
            stored=self.stored + other.stored,
        )

    def tensor_at(self, begin: int) -> StoredTensor:
        """Return the stored tensor to which a byte of the source belongs."""
        return next(tensor for tensor in reversed(self.stored) if tensor.offset <= begin)


def stretches(copied: Iterable[Copied], places: Mapping[str, StoredTensor]) -> list[Stretch]:
    """Return where tensors are copied from and to, in the order of the output; neighbours in both files are one.

    `places` are those of the output.
    """
    single = [_stretch(tensor, places[tensor.name]) for tensor in copied]
    merged: list[Stretch] = []
    for stretch in sorted(single, key=lambda stretch: (stretch.file, stretch.offset)):
        if merged and merged[-1].is_continued_by(stretch):
            merged[-1] = merged[-1].continued_by(stretch)
        else:
            merged.append(stretch)
    return merged


def _stretch(copied: Copied, place: StoredTensor) -> Stretch:
    return Stretch(
        source=copied.stored.file,
        begin=copied.stored.offset + copied.first,
        file=place.file,
        offset=place.offset,
        nbytes=place.spec.nbytes,
        stored=(copied.stored,),
    )


def copy_stretch(stretch: Stretch, source: int, target: int, lock: Lock) -> None:
    """Copy a stretch between open files; `lock` is held during each call, see `TensorWriter`.

    Raises `CatalogError` when the source ends too early or can't be read, and `OSError` when the target can't be
    written.
    """
    done = 0
    while done < stretch.nbytes:
        nbytes, count = min(stretch.nbytes - done, _COPY_BYTES), 0
        with lock:
            with suppress(OSError):
                count = file_calls.copy_range(source, stretch.begin + done, target, stretch.offset + done, nbytes)
            # Some file systems say 0, the end of the file, for what they can't copy.
            done += count or _through_memory(stretch, done, nbytes, source, target)


def _through_memory(stretch: Stretch, done: int, nbytes: int, source: int, target: int) -> int:
    """Read and write `nbytes` bytes of a stretch, behind the first `done`; returns `nbytes`."""
    buffer, end = memoryview(bytearray(WRITE_BYTES)), done + nbytes
    while done < end:
        begin = stretch.begin + done
        try:
            count = file_calls.read_at(source, buffer[: end - done], begin)
        except OSError as error:
            raise read_error(stretch.tensor_at(begin), error) from None
        if not count:
            raise file_changed(stretch.tensor_at(begin), f"a file that ends before byte {stretch.begin + end}")
        write_all(target, buffer[:count], stretch.offset + done)
        done += count
    return nbytes


def is_same(stretch: Stretch, source: int, target: int) -> bool:
    """Whether the target holds the bytes of a stretch; reads both files and may raise `OSError`."""
    of_source, of_target = (memoryview(bytearray(min(stretch.nbytes, _COMPARED_BYTES))) for _ in range(2))
    for done in range(0, stretch.nbytes, _COMPARED_BYTES):
        nbytes = min(stretch.nbytes - done, _COMPARED_BYTES)
        filled = {
            read_into(source, of_source[:nbytes], stretch.begin + done),
            read_into(target, of_target[:nbytes], stretch.offset + done),
        }
        if filled != {nbytes} or of_source[:nbytes] != of_target[:nbytes]:
            return False
    return True

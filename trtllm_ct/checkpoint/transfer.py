"""Reserve, write, read and checksum bytes of files, in chunks that stay in the processor's cache.

A chunk that was just converted or summed is still in the processor's cache when the kernel copies it into the page
cache. Tensors that are only copied do not come here: see `copies.py`.
"""

from __future__ import annotations

from trtllm_ct.checkpoint import file_calls

__all__ = ["CHUNK_BYTES", "PAGE_BYTES", "WRITE_BYTES", "checksum", "preallocate", "read_into", "write_all"]

CHUNK_BYTES = 2**21
"""How many bytes are converted or summed at once: about the size of a core's second-level cache."""

WRITE_BYTES = 2**17
"""How many bytes are passed to the kernel in one call.

The kernel allocates memory for all of them in one block if it can. Small blocks were in use a moment ago; large ones
were seldom touched, and a virtual machine has to request them from its host first. With 1 MiB the kernel takes a third
more time, measured on ext4 under Firecracker.
"""

PAGE_BYTES = 4096
"""Bytes of a page: `checksum` multiplies all words of a page by the same number."""

_PAGE_WORDS = PAGE_BYTES // 8


def preallocate(descriptor: int, nbytes: int) -> None:
    """Give a file its final size, and reserve its blocks where the file system can do that.

    Writing is then faster, and a disk that is too small is noticed before the work starts. Raises `OSError`.
    """
    if not (nbytes and file_calls.allocate(descriptor, nbytes)):
        file_calls.truncate(descriptor, nbytes)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` to a file at `offset`; repeats the call as long as the system accepts only a part."""
    while data:
        written = file_calls.write_at(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[written:], offset + written


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from a file at `offset`; returns the bytes read, which are fewer only at the end of the file."""
    filled = 0
    while filled < len(buffer):
        count = file_calls.read_at(descriptor, buffer[filled:], offset + filled)
        if count == 0:
            break
        filled += count
    return filled


def checksum(data: memoryview, page: int = 0) -> int:
    """Return 64 bits that show whether a chunk is still what was written; computed at the speed of memory.

    The checksum is the sum of all 64-bit words, where the words of each 4 KiB page are multiplied by an odd number that
    only this page has. It detects pages that were lost or that changed places, which is what a crash does to a file. It
    does not protect against deliberate changes.
    The checksums of consecutive chunks add up, modulo 2^64, to the checksum of all of them together. For that, every
    chunk but the last must consist of whole pages, and `page` must be the number of the chunk's first page.
    """
    import numpy as np

    whole = len(data) // PAGE_BYTES
    pages = np.frombuffer(data, np.uint64, whole * _PAGE_WORDS).reshape(whole, _PAGE_WORDS).sum(axis=1)
    total = int(pages @ np.arange(2 * page + 1, 2 * (page + whole), 2, dtype=np.uint64))
    rest = data[whole * PAGE_BYTES :]
    if rest:
        words = np.frombuffer(rest, np.uint64, len(rest) // 8)
        total += (int(words.sum()) + int.from_bytes(rest[8 * len(words) :], "little")) * (2 * (page + whole) + 1)
    return total % 2**64

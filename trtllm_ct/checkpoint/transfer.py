"""Bytes between files and memory: reserved, written, read and summed up, in chunks that stay in the cache.

A chunk that was just converted or summed is still in the processor's cache when the kernel copies it into its own. What
is only copied is written out of the map of its source, which saves reading it into memory first.
"""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["CHUNK_BYTES", "PAGE_BYTES", "checksum", "preallocate", "read_into", "write_all"]

CHUNK_BYTES = 2**21
"""Bytes that are made or summed at once: about the second cache of a core."""

_WRITE_BYTES = 2**17
"""Bytes that the kernel is handed at once.

It takes memory for all of them in one block if it can. Small blocks are those that were free a moment ago; large ones
were seldom touched, and a virtual machine has to ask its host for them first: with 1 MiB the kernel takes a third more
time, measured on ext4 under Firecracker.
"""

PAGE_BYTES = 4096
"""Bytes that count together in a `checksum`."""

_PAGE_WORDS = PAGE_BYTES // 8
_NO_SUCH_CALL = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def preallocate(descriptor: int, nbytes: int) -> None:
    """Give a file its final size, on blocks that are reserved now where the file system can do that.

    Writing is faster then, and a disk that is too small shows before the work. Raises `OSError`.
    `os.posix_fallocate` would do, but where the file system can't, the C library writes a byte into every block.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    while nbytes and fallocate is not None:
        if fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) == 0:
            return
        code = ctypes.get_errno()
        if code in _NO_SUCH_CALL:
            break
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, nbytes)


def write_all(descriptor: int, octets: memoryview, offset: int) -> None:
    """Write all of `octets` at a place of a file, however little of it the system takes at once."""
    while octets:
        written = os.pwrite(descriptor, octets[:_WRITE_BYTES], offset)
        octets, offset = octets[written:], offset + written


def read_into(descriptor: int, octets: memoryview, offset: int) -> int:
    """Fill `octets` from a place of a file; returns how many bytes there were before its end."""
    held = 0
    while held < len(octets):
        count = os.preadv(descriptor, [octets[held:]], offset + held)
        if count == 0:
            break
        held += count
    return held


def checksum(octets: memoryview, page: int = 0) -> int:
    """64 bits that tell whether a chunk is the one that was written, at the speed of memory.

    The sum of all 64-bit words, each page of 4 KiB times an odd number of its own: it shows pages that were lost or
    changed places, which is what a crash does to a file. It is no proof against intent. Sums of chunks that follow one
    another add up, modulo 2^64, where all but the last are whole pages and `page` is the number of each one's first.
    """
    import numpy as np

    whole = len(octets) // PAGE_BYTES
    pages = np.frombuffer(octets, np.uint64, whole * _PAGE_WORDS).reshape(whole, _PAGE_WORDS).sum(axis=1)
    total = int(pages @ np.arange(2 * page + 1, 2 * (page + whole), 2, dtype=np.uint64))
    rest = octets[whole * PAGE_BYTES :]
    if rest:
        words = np.frombuffer(rest, np.uint64, len(rest) // 8)
        total += (int(words.sum()) + int.from_bytes(rest[8 * len(words) :], "little")) * (2 * (page + whole) + 1)
    return total % 2**64

"""Maps of files, and of windows of them for processes whose address space is limited: a whole file may not fit."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING
from weakref import finalize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["WINDOW_BYTES", "address_limit", "map_file", "window_of"]

WINDOW_BYTES = 64 << 20
"""Windows begin and end at multiples of this, so that neighbouring tensors share one."""

_MAP_FAILED = ctypes.c_void_p(-1).value


def address_limit() -> int | None:
    """Return the bytes of addresses that this process may use, as after `ulimit -v`; None for all that there are."""
    try:
        import resource
    except ImportError:  # Only Unix has such limits.
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def window_of(first: int, nbytes: int) -> tuple[int, int]:
    """Return begin and end, in bytes from the start of the file, of the window that holds a range of its bytes."""
    end = -(-(first + max(nbytes, 1)) // WINDOW_BYTES) * WINDOW_BYTES
    return first // WINDOW_BYTES * WINDOW_BYTES, end


def map_file(descriptor: int, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
    """Return the bytes of an open file from `begin` up to `end`, or up to its end, as a private map.

    The map needs no descriptor, which `mmap.mmap` would keep for as long as an array is alive. Raises `OSError`.
    """
    import numpy as np

    size = os.fstat(descriptor).st_size
    nbytes = (size if end is None else min(end, size)) - begin
    if nbytes <= 0:
        return np.empty(0, np.uint8)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = library.mmap(None, nbytes, protection, mmap.MAP_PRIVATE, descriptor, begin)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    buffer = (ctypes.c_ubyte * nbytes).from_address(address)
    finalize(buffer, library.munmap, address, nbytes)
    return np.frombuffer(memoryview(buffer), np.uint8)

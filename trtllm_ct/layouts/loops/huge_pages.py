"""Allocation of result arrays, in huge pages where the kernel provides them.

Writing to fresh memory is expensive: with 4 KiB pages, one weight causes thousands of page faults, and a repack into a
new array takes five times as long as a repack into an array that is already in use. With huge pages it takes twice as
long. numpy requests huge pages for arrays of 4 MiB or more (`NUMPY_MADVISE_HUGEPAGE`).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from trtllm_ct.layouts.stored_array import numpy_dtype

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from trtllm_ct.base.dtypes import DType

__all__ = ["empty"]

_ALIGNMENT = 64  # bytes: a cache line, which is the alignment of torch's own tensors


def empty(shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
    """Return an uninitialized contiguous array for elements of `dtype`, at the beginning of a cache line."""
    import numpy as np

    size = prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(numpy_dtype(dtype)).reshape(shape)

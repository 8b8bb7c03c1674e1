"""Allocation of result tensors, in huge pages where the kernel provides them.

Writing to fresh memory is expensive: with 4 KiB pages, one weight causes thousands of page faults, and a repack into a
new tensor takes five times as long as a repack into a tensor that is already in use. With huge pages it takes twice as
long. numpy requests huge pages for arrays of 4 MiB or more (`NUMPY_MADVISE_HUGEPAGE`); torch does not.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["empty"]

_LARGE = 1 << 22  # bytes: numpy requests huge pages from this size on
_ALIGNMENT = 64  # bytes: a cache line, which is the alignment of torch's own tensors


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized contiguous CPU tensor; the tensor owns its memory."""
    import torch

    size = prod(shape) * dtype.itemsize
    if size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    import numpy as np

    buffer = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return torch.from_numpy(buffer[start : start + size]).view(dtype).view(shape)

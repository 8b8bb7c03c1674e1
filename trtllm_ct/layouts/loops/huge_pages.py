"""Memory for results: in huge pages where the kernel gives them.

Fresh memory costs more than what is written to it: with pages of 4 KiB the kernel is entered thousands of times for one
weight, and a repack into a new tensor takes five times as long as into one that is in use; with huge pages, twice.
numpy asks for them for all arrays of 4 MiB or more (`NUMPY_MADVISE_HUGEPAGE`), torch does not.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["empty"]

_LARGE = 1 << 22
_ALIGNMENT = 64  # a cache line, as torch's own tensors begin


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor whose elements are yet to be written; it owns its memory and nothing else."""
    import torch

    size = prod(shape) * dtype.itemsize
    if size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    import numpy as np

    octets = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -octets.ctypes.data % _ALIGNMENT
    return torch.from_numpy(octets[start : start + size]).view(dtype).view(shape)

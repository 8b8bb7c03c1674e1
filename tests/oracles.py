"""Slow twins of the layout functions: one obvious line of arithmetic each, in plain Python and numpy.

They share no code with `trtllm_ct.layouts`. Codes are integer arrays [N, K]; values are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from trtllm_ct.schemes import Packing

Array = npt.NDArray[np.int64]

_UNSIGNED = {8: np.uint8, 32: np.uint32}


def pack(codes: Array, packing: Packing) -> Tensor:
    """Code number i along the packed axis lies in element i // n, in bits `bits * (i % n)` and up."""
    per_element = packing.container.bits // packing.bits
    offset = 2 ** (packing.bits - 1) if packing.offset_binary else 0
    lines = codes if packing.axis == 0 else codes.T
    elements = np.zeros((-(-lines.shape[0] // per_element), lines.shape[1]), dtype=np.int64)
    for i, line in enumerate(lines):
        field = (line + offset) % 2**packing.bits
        elements[i // per_element] += field * 2 ** (packing.bits * (i % per_element))
    elements = elements if packing.axis == 0 else elements.T
    unsigned = np.ascontiguousarray(elements, dtype=_UNSIGNED[packing.container.bits])
    return torch.from_numpy(unsigned).view(packing.container.torch_dtype)

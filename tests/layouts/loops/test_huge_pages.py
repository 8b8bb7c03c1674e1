"""Result arrays behave like any other array, and torch finds them as aligned as its own tensors."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.loops.huge_pages import empty

DTYPES = [DType.U8, DType.I8, DType.BF16, DType.F8_E4M3, DType.F32, DType.F64]
SHAPES = [(), (0,), (0, 5), (1,), (3, 7), (1, 1, 5), (64, 129), (1 << 22,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_array_has_the_requested_shape_and_width(shape: tuple[int, ...], dtype: DType) -> None:
    """It is contiguous, writable, and begins at a cache line."""
    array = empty(shape, dtype)

    assert (array.shape, array.itemsize) == (shape, dtype.itemsize)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert not array.size or array.ctypes.data % 64 == 0


def test_memory_lives_as_long_as_its_array() -> None:
    """And no two arrays share memory."""
    arrays = [empty((1000,), DType.I32) for _ in range(20)]
    for number, array in enumerate(arrays):
        array.fill(number)
    gc.collect()
    later = [empty((1000,), DType.I32) for _ in range(20)]
    for array in later:
        array.fill(-1)

    assert [np.unique(array).tolist() for array in arrays] == [[number] for number in range(20)]

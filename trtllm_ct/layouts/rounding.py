"""Rounding to a narrow float exactly once.

numpy has no bfloat16. A float64 number is rounded to it through float32, which must not round to nearest a second time:
the result would be wrong for values close to the midpoint of two neighbours. Rounding to odd in the intermediate
float32 makes the final result correct (S. Boldo, G. Melquiond: Emulation of FMA and correctly rounded sums, 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.stored_array import StoredArray, numpy_dtype

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["round_once"]

_NAN = 0x7FC0


def round_once(values: NDArray[Any], dtype: DType) -> StoredArray:
    """Round numbers (float64, float32 or float16, any shape) to `dtype`: to nearest, ties to even, exactly once.

    Numbers beyond the range of `dtype` become infinite. numpy's own conversion rounds once, for all dtypes that it has.
    """
    import numpy as np

    if dtype is DType.BF16:
        shape, values = values.shape, np.atleast_1d(values)
        single = _round_to_odd_float32(values) if values.dtype == np.float64 else values.astype(np.float32, copy=False)
        return StoredArray(_bfloat16_bits(single).reshape(shape), dtype)
    with np.errstate(over="ignore"):
        return StoredArray(np.asarray(values.astype(numpy_dtype(dtype), copy=False)), dtype)


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the bits of bfloat16.

    The result is the upper 16 bits, plus one if the lower 16 bits are more than half of their range, or if they are
    exactly half and the upper bits are odd.
    """
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(_NAN), nearest)


def _round_to_odd_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round float64 to odd float32: exact values stay, others become the neighbour whose last mantissa bit is one.

    Rounding to odd requires at least two more mantissa bits than the final dtype; float32 has these for bfloat16.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    even = (nearest.view(np.uint32) & np.uint32(1)) == 0
    inexact = (nearest.astype(np.float64) != values) & np.isfinite(nearest)
    direction = np.where(values > nearest, np.float32(np.inf), np.float32(-np.inf))
    return np.where(inexact & even, np.nextafter(nearest, direction), nearest)

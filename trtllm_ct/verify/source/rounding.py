"""Rounding of float64 to a narrower float: to nearest, ties to even, exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.base.dtypes import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["rounded"]

# Digits of the significand, the first one included, the exponent of the least normal number, and the largest number.
_FORMS = {
    DType.BF16: (8, -126, 2.0**128 - 2.0**120),
    DType.F16: (11, -14, 65504.0),
    DType.F32: (24, -126, 2.0**128 - 2.0**104),
}


def rounded(values: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
    """Return the numbers of `dtype` that are nearest to `values`, as float64.

    Each number is divided by the step between its neighbours, rounded to an integer and multiplied again: powers of
    two, so that only the rounding to an integer rounds. Numbers beyond the largest by half a step become infinite.
    """
    if dtype not in _FORMS:
        return values
    digits, least, largest = _FORMS[dtype]
    _, exponents = np.frexp(values)
    steps = np.maximum(exponents, least + 1) - digits
    with np.errstate(invalid="ignore"):
        result = np.ldexp(np.rint(np.ldexp(values, -steps)), steps)
    return np.where(np.abs(result) > largest, np.copysign(np.inf, values), result)

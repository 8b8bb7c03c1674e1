"""Rounding of float64 to a narrower float: to nearest, ties to even, exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.base.dtypes import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["rounded"]

# Digits of the significand, the first one included, the exponent of the least normal number, and the largest number.
_FLOAT64_DIGITS = 53
_FORMS = {
    DType.BF16: (8, -126, 2.0**128 - 2.0**120),
    DType.F16: (11, -14, 65504.0),
    DType.F32: (24, -126, 2.0**128 - 2.0**104),
    DType.F8_E4M3: (4, -6, 448.0),
}


def rounded(values: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
    """Return the numbers of `dtype` that are nearest to `values`, as float64.

    Numbers beyond the largest by half a step become infinite.
    """
    if dtype not in _FORMS:
        return values
    digits, least, largest = _FORMS[dtype]
    if _all_normal(values, least, largest):
        return _rounded_bits(values, _FLOAT64_DIGITS - digits)
    return _rounded_steps(values, digits, least, largest)


def _all_normal(values: NDArray[np.float64], least: int, largest: float) -> bool:
    """Whether each number is 0, or its magnitude is between the least normal and the largest number."""
    magnitudes = np.abs(values)
    return bool((magnitudes <= largest).all()) and np.array_equal(magnitudes < 2.0**least, magnitudes == 0)


def _rounded_bits(values: NDArray[np.float64], surplus: int) -> NDArray[np.float64]:
    """Round normal numbers to so many digits that `surplus` bits of the significand are cleared.

    Half of the last digit that is kept is added to the bits first, and 1 less if this digit is even, so that a tie
    becomes even. A carry out of the significand arrives in the exponent, whose bits are next to it.
    """
    bits = values.view(np.uint64)
    result = bits >> np.uint64(surplus)
    result &= np.uint64(1)
    result += np.uint64((1 << (surplus - 1)) - 1)
    result += bits
    result >>= np.uint64(surplus)
    result <<= np.uint64(surplus)
    return result.view(np.float64)


def _rounded_steps(values: NDArray[np.float64], digits: int, least: int, largest: float) -> NDArray[np.float64]:
    """Round any numbers.

    Each number is divided by the step between its neighbours, rounded to an integer and multiplied again: powers of
    two, so that only the rounding to an integer rounds.
    """
    _, exponents = np.frexp(values)
    steps = np.maximum(exponents, least + 1) - digits
    with np.errstate(invalid="ignore"):
        result = np.ldexp(np.rint(np.ldexp(values, -steps)), steps)
    return np.where(np.abs(result) > largest, np.copysign(np.inf, values), result)

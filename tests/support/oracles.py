"""Slow twins of the layout functions: one obvious line of arithmetic each, in plain Python and numpy.

They share no code with `trtllm_ct.layouts`. Codes are integer arrays [N, K]; exact values are fractions.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import Packing

Array = npt.NDArray[np.int64]

_UNSIGNED = {8: np.uint8, 32: np.uint32}

# Bits of precision (the hidden one included) and the exponents of the smallest and the largest normal number.
_FLOATS = {
    torch.bfloat16: (8, -126, 127),
    torch.float16: (11, -14, 15),
    torch.float32: (24, -126, 127),
}


def pack(codes: Array, packing: Packing) -> Tensor:
    """Every bit of every code at its place in the stream of bits of its row or column."""
    offset = 2 ** (packing.bits - 1) if packing.offset_binary else 0
    lines = codes if packing.axis == 1 else codes.T
    places = _places(lines.shape[1], packing)
    container_bits = packing.container.bits
    stream = np.zeros((len(lines), -(-(places.max() + 1) // container_bits) * container_bits), dtype=np.uint8)
    stream[:, places] = (lines[:, :, None] + offset) >> np.arange(packing.bits) & 1
    elements = np.packbits(stream, axis=1, bitorder="little").view(_UNSIGNED[container_bits])
    elements = np.ascontiguousarray(elements if packing.axis == 1 else elements.T)
    return torch.from_numpy(elements).view(packing.container.torch_dtype)


def unpack(container: Tensor, packing: Packing, shape: tuple[int, int]) -> Array:
    """The inverse of `pack`."""
    half = 2 ** (packing.bits - 1)
    elements = container.numpy() if packing.axis == 1 else container.numpy().T
    stream = np.unpackbits(np.ascontiguousarray(elements).view(np.uint8), axis=1, bitorder="little")
    places = _places(shape[packing.axis], packing)
    fields = (stream[:, places].astype(np.int64) << np.arange(packing.bits)).sum(axis=2)
    codes = fields - half if packing.offset_binary else (fields + half) % (2 * half) - half
    return (codes if packing.axis == 1 else codes.T)[: shape[0], : shape[1]]


def _places(count: int, packing: Packing) -> Array:
    """Where bit b of code i lies in the stream, [i, b]: one code after another, or so many to each element."""
    i, b = np.arange(count)[:, None], np.arange(packing.bits)
    if packing.dense:
        return i * packing.bits + b
    per_element = packing.container.bits // packing.bits
    return i // per_element * packing.container.bits + i % per_element * packing.bits + b


def round_fraction(value: Fraction, dtype: torch.dtype) -> float:
    """The nearest number of a float dtype; a tie goes to the one with an even last bit."""
    if value == 0:
        return 0.0
    precision, smallest, largest = _FLOATS[dtype]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    spacing = Fraction(2) ** (max(exponent, smallest) - (precision - 1))
    # `round` of a fraction takes ties to even; multiples of the spacing are the numbers of the dtype.
    rounded = round(magnitude / spacing) * spacing
    size = math.inf if rounded >= Fraction(2) ** (largest + 1) else float(rounded)
    return math.copysign(size, value)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`round_fraction` of every element; NaN, infinities and zeros stay what they are. float64."""
    rounded = [
        value if value == 0 or not math.isfinite(value) else round_fraction(Fraction(value), dtype)
        for value in values.double().flatten().tolist()
    ]
    return torch.tensor(rounded, dtype=torch.float64).reshape(values.shape)


def repeat_scale(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """The scale of every element of a larger grid, by division of its indices. float64."""
    rows, columns = shape
    stored_rows, stored_columns = scale.shape
    return torch.tensor(
        [
            [float(scale[n * stored_rows // rows, k * stored_columns // columns]) for k in range(columns)]
            for n in range(rows)
        ],
        dtype=torch.float64,
    )


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    """(code - zero point) * scale of every finite element as a fraction, rounded once. float64."""
    rows, columns = codes.shape
    values = []
    for n, k in np.ndindex(rows, columns):
        place = (min(n, scale.shape[0] - 1), k // (group_size or columns))
        zero = 0 if zero_point is None else int(zero_point[place])
        code = float(codes[n, k])
        if not math.isfinite(code):
            values.append(code)
        else:
            values.append(round_fraction((Fraction(code) - zero) * Fraction(float(scale[place])), dtype))
    return torch.tensor(values, dtype=torch.float64).reshape(rows, columns)


def additive_zero(scale: Tensor, zero_point: Tensor) -> Tensor:
    """-(zero point) * scale of every element as a fraction, rounded once to float32. float64."""
    values = [
        round_fraction(-Fraction(zero) * Fraction(factor), torch.float32)
        for zero, factor in zip(zero_point.flatten().tolist(), scale.double().flatten().tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(scale.shape)

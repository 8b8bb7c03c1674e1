"""Modules of small floats for tests: random ones, their headers, and the exact value of every element.

The exact values come from the definition of a float (sign, exponent, mantissa) and from fractions; nothing here uses
`trtllm_ct.layouts`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import oracles
import torch

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, FaultCollector
from trtllm_ct.base.schemes import Element, NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats import format_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.formats.base import StoredSpecs, StoredWeight

NVFP4_ARGS = QuantArgs(
    num_bits=4, type=NumberType.FLOAT, strategy=Strategy.TENSOR_GROUP, group_size=16, scale_dtype="float8_e4m3fn"
)
MXFP4_ARGS, MXFP6_ARGS, MXFP8_ARGS = (
    QuantArgs(num_bits=bits, type=NumberType.FLOAT, strategy=Strategy.GROUP, group_size=32, scale_dtype="uint8")
    for bits in (4, 6, 8)
)

_EXPONENT_AND_MANTISSA = {Element.E2M1: (2, 1), Element.E2M3: (2, 3), Element.E4M3: (4, 3)}
_BITS = {4: Element.E2M1, 6: Element.E2M3, 8: Element.E4M3}


def number(field: int, element: Element) -> Fraction | None:
    """The number that a bit pattern stands for; None for E4M3's NaN. Minus zero is zero."""
    exponent_bits, mantissa_bits = _EXPONENT_AND_MANTISSA[element]
    sign, rest = divmod(field, 2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = divmod(rest, 2**mantissa_bits)
    if element is Element.E4M3 and rest == 127:
        return None
    bias = 2 ** (exponent_bits - 1) - 1
    hidden = 0 if exponent == 0 else 2**mantissa_bits
    size: Fraction = Fraction(hidden + mantissa, 2**mantissa_bits) * Fraction(2) ** (max(exponent, 1) - bias)
    return -size if sign else size


def fields_of(codes: Tensor, bits: int, columns: int) -> list[list[int]]:
    """The bit patterns of each row: its bytes read as one little-endian number."""
    rows = [int.from_bytes(bytes(row), "little") for row in codes.view(torch.uint8).tolist()]
    return [[row >> (bits * k) & (2**bits - 1) for k in range(columns)] for row in rows]


def exact_values(stored: Mapping[str, Tensor], args: QuantArgs, columns: int, dtype: torch.dtype) -> Tensor:
    """Every element of a module as a fraction, rounded once to `dtype`; in float64."""
    codes = stored["weight_packed"] if "weight_packed" in stored else stored["weight"]
    scales = [[_scale(byte, stored) for byte in row] for row in stored["weight_scale"].view(torch.uint8).tolist()]
    values = [
        [_value(field, scales[n][k // (args.group_size or 1)], args, dtype) for k, field in enumerate(row)]
        for n, row in enumerate(fields_of(codes, args.num_bits, columns))
    ]
    return torch.tensor(values, dtype=torch.float64)


def _scale(byte: int, stored: Mapping[str, Tensor]) -> Fraction:
    if "weight_global_scale" not in stored:
        return Fraction(2) ** (byte - 127)
    local = number(byte, Element.E4M3)
    assert local is not None
    return local / Fraction(stored["weight_global_scale"].item())


def _value(field: int, scale: Fraction, args: QuantArgs, dtype: torch.dtype) -> float:
    code = number(field, _BITS[args.num_bits])
    if code is None:
        return math.nan
    value = code * scale
    return float(value) if dtype is torch.float64 else oracles.round_fraction(value, dtype)


def random_module(args: QuantArgs, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Random bytes for codes and scales, and a global scale for NVFP4; no scale is NaN or negative.

    Exponents of E8M0 stay within 60 of 1, so that products lie within the range of bfloat16.
    """
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, width: int) -> Tensor:
        return torch.randint(low, high, (rows, width), generator=generator, dtype=torch.uint8)

    codes = integers(0, 256, -(-columns * args.num_bits // 8))
    groups = -(-columns // (args.group_size or 1))
    named = {"weight": codes.view(torch.float8_e4m3fn)} if args.num_bits == 8 else {"weight_packed": codes}
    if args.group_size == 16:
        global_scale = 2.0 ** (4 + 12 * torch.rand(1, generator=generator))
        return named | {
            "weight_scale": integers(0, 127, groups).view(torch.float8_e4m3fn),
            "weight_global_scale": global_scale,
        }
    return named | {"weight_scale": integers(67, 188, groups)}


def specs_of(stored: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()}


def describe(
    args: QuantArgs, specs: StoredSpecs, expected: tuple[int, int] | None
) -> tuple[StoredWeight | None, list[Fault]]:
    entry = format_for(args, specs)
    assert entry is not None
    faults = FaultCollector()
    weight = entry.describe("lin", args, specs, expected, faults)
    return weight, faults.faults


def described(args: QuantArgs, stored: Mapping[str, Tensor], expected: tuple[int, int] | None = None) -> StoredWeight:
    weight, faults = describe(args, specs_of(stored), expected)
    assert not faults
    assert weight is not None
    return weight


def assert_one_fault(faults: list[Fault], where: str, expected: str, found: str, remedy: str) -> None:
    (fault,) = faults
    assert fault.where == where
    assert expected in fault.expected
    assert found in fault.found
    assert remedy in fault.remedy

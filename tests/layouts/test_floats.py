from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from float_modules import number
from torch import Tensor

from trtllm_ct.base.schemes import Element, Packing
from trtllm_ct.layouts import floats
from trtllm_ct.layouts.floats import E2M1_PACKED, E2M3_PACKED, element_fields, element_values, power_of_two
from trtllm_ct.layouts.packing import pack_fields, unpack_fields

WIDTHS = {Element.E2M1: 4, Element.E2M3: 6}
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def all_fields(element: Element) -> Tensor:
    return torch.arange(2 ** WIDTHS[element], dtype=torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("element", WIDTHS)
def test_each_field_is_decoded_exactly(element: Element, dtype: torch.dtype) -> None:
    """The values follow from sign, exponent and mantissa, and are exact in every float of 16 bits or more."""
    values = element_values(all_fields(element), element, dtype)
    assert values.dtype is dtype
    assert [Fraction(value) for value in values.tolist()] == [number(i, element) for i in range(len(values))]


@pytest.mark.parametrize(("element", "largest", "step"), [(Element.E2M1, 6.0, 0.5), (Element.E2M3, 7.5, 0.125)])
def test_range_and_smallest_step(element: Element, largest: float, step: float) -> None:
    values = element_values(all_fields(element), element, torch.float64).abs()
    assert values.max() == largest
    assert values[values > 0].min() == step


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("element", WIDTHS)
def test_values_are_converted_back_to_their_fields(element: Element, dtype: torch.dtype) -> None:
    """Also -0.0, which has its own field."""
    fields = all_fields(element).reshape(2, -1)
    assert torch.equal(element_fields(element_values(fields, element, dtype), element), fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponents_are_powers_of_two_and_255_is_nan(dtype: torch.dtype) -> None:
    values = power_of_two(torch.arange(256, dtype=torch.uint8), dtype)
    assert values.dtype is dtype
    assert values[:255].tolist() == [math.ldexp(1, exponent - 127) for exponent in range(255)]
    assert values[255].isnan()


def test_torch_decodes_e8m0_in_the_same_way() -> None:
    exponents = torch.arange(256, dtype=torch.uint8)
    theirs = exponents.view(torch.float8_e8m0fnu).to(torch.float32)
    torch.testing.assert_close(power_of_two(exponents, torch.float32), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("tile_elements", [1, 4, 1 << 20])
def test_any_shape_and_any_tile_size(
    shape: tuple[int, ...], tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floats, "_TILE_ELEMENTS", tile_elements)
    fields = torch.randint(0, 16, shape, dtype=torch.uint8)
    expected = torch.tensor(
        [float(number(field, Element.E2M1) or 0) for field in fields.flatten().tolist()], dtype=torch.float32
    )
    assert torch.equal(element_values(fields, Element.E2M1, torch.float32), expected.reshape(shape))
    assert tuple(power_of_two(fields, torch.float32).shape) == shape


# Bytes that compressed-tensors 0.20 writes, and the numbers that they encode.
PACKED = {
    "e2m1": (
        E2M1_PACKED,
        Element.E2M1,
        "1032547690badcfe",
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6],
    ),
    "e2m3": (
        E2M3_PACKED,
        Element.E2M3,
        "407020c9034517967d210aff",
        [0, 0.125, 0.875, 1, 1.125, 1.875, 2, 2.25, 3.75, 4, 4.5, 7.5, -0.125, -1, -2, -7.5],
    ),
}


@pytest.mark.parametrize(("packing", "element", "stored", "numbers"), PACKED.values(), ids=PACKED.keys())
def test_packed_bytes(packing: Packing, element: Element, stored: str, numbers: list[float]) -> None:
    packed = torch.tensor([list(bytes.fromhex(stored))], dtype=torch.uint8)
    fields = unpack_fields(packed, packing, (1, 16))
    assert element_values(fields, element, torch.float32).tolist() == [numbers]
    assert torch.equal(pack_fields(fields, packing), packed)

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from float_modules import number
from on_tensors import tensor_module
from torch import Tensor

from trtllm_ct.base.schemes import Element, Packing
from trtllm_ct.layouts import floats, packing
from trtllm_ct.layouts.floats import E2M1_PACKED, E2M3_PACKED, LARGEST

element_fields, element_values = tensor_module(floats).element_fields, tensor_module(floats).element_values
pack_fields, unpack_fields = tensor_module(packing).pack_fields, tensor_module(packing).unpack_fields

WIDTHS = {Element.E2M1: 4, Element.E2M3: 6}
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def all_fields(element: Element) -> Tensor:
    return torch.arange(2 ** WIDTHS[element], dtype=torch.uint8)


@pytest.mark.parametrize("element", WIDTHS)
def test_each_field_is_decoded_exactly(element: Element) -> None:
    """The values follow from sign, exponent and mantissa."""
    values = element_values(all_fields(element), element)
    assert values.dtype is torch.float32
    assert [Fraction(value) for value in values.tolist()] == [number(i, element) for i in range(len(values))]


@pytest.mark.parametrize(("element", "largest", "step"), [(Element.E2M1, 6.0, 0.5), (Element.E2M3, 7.5, 0.125)])
def test_range_and_smallest_step(element: Element, largest: float, step: float) -> None:
    values = element_values(all_fields(element), element).abs()
    assert values.max() == largest == LARGEST[element]
    assert values[values > 0].min() == step


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("element", WIDTHS)
def test_values_are_converted_back_to_their_fields(element: Element, dtype: torch.dtype) -> None:
    """Also -0.0, which has its own field."""
    fields = all_fields(element).reshape(2, -1)
    assert torch.equal(element_fields(element_values(fields, element).to(dtype), element), fields)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3, 5)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    fields = torch.randint(0, 16, shape, dtype=torch.uint8)
    expected = [float(number(field, Element.E2M1) or 0) for field in fields.flatten().tolist()]
    assert torch.equal(element_values(fields, Element.E2M1), torch.tensor(expected).reshape(shape))


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
    assert element_values(fields, element).tolist() == [numbers]
    assert torch.equal(pack_fields(fields, packing), packed)

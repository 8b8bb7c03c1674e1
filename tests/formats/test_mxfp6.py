from __future__ import annotations

import torch
from float_modules import MXFP4_ARGS, MXFP6_ARGS, assert_one_fault, describe, described, random_module, specs_of
from on_tensors import NATIVE

from trtllm_ct.base.schemes import Element
from trtllm_ct.formats.mxfp6 import MXFP6
from trtllm_ct.layouts.floats import E2M3_PACKED


def test_worked_bytes() -> None:
    """Bytes of compressed-tensors 0.20 with scale 1: four codes in three bytes, the first in the lowest bits."""
    half = [0, 0.125, 0.875, 1, 1.125, 1.875, 2, 2.25, 3.75, 4, 4.5, 7.5, -0.125, -1, -2, -7.5]
    stored = {
        "weight_packed": torch.tensor([list(bytes.fromhex("407020c9034517967d210aff" * 2))], dtype=torch.uint8),
        "weight_scale": torch.tensor([[0x7F]], dtype=torch.uint8),
    }
    weight = described(MXFP6_ARGS, stored, (1, 32))
    assert weight.format is MXFP6
    assert (weight.packing, weight.element) == (E2M3_PACKED, Element.E2M3)
    assert NATIVE.dequantize(weight, stored, torch.float32).tolist() == [half * 2]


def test_codes_of_four_bits_are_not_read_as_six() -> None:
    four = specs_of(random_module(MXFP4_ARGS, (6, 96), seed=3))
    _, faults = describe(MXFP6_ARGS, four, None)
    assert_one_fault(faults, "lin.weight_scale", "[6, 2]", "[6, 3]", "another width or group size")

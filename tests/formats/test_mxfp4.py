from __future__ import annotations

import torch
from float_modules import MXFP4_ARGS, MXFP6_ARGS, assert_one_fault, describe, described, random_module, specs_of
from on_tensors import NATIVE

from trtllm_ct.base.schemes import Element
from trtllm_ct.formats.mxfp4 import MXFP4
from trtllm_ct.layouts.floats import E2M1_PACKED


def test_worked_bytes() -> None:
    """Bytes of compressed-tensors 0.20: the same 32 codes with scales 1 and 4."""
    row = list(bytes.fromhex("10325476" * 4))
    stored = {
        "weight_packed": torch.tensor([row, row], dtype=torch.uint8),
        "weight_scale": torch.tensor([[0x7F], [0x81]], dtype=torch.uint8),
    }
    weight = described(MXFP4_ARGS, stored, (2, 32))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6] * 4
    assert weight.format is MXFP4
    assert (weight.packing, weight.element) == (E2M1_PACKED, Element.E2M1)
    assert NATIVE.dequantize(weight, stored, torch.float32).tolist() == [values, [4 * value for value in values]]


def test_codes_of_six_bits_are_not_read_as_four() -> None:
    """Read as 4-bit codes, the bytes hold 1.5 times as many columns as the scales have groups for."""
    six = specs_of(random_module(MXFP6_ARGS, (6, 64), seed=3))
    _, faults = describe(MXFP4_ARGS, six, None)
    assert_one_fault(faults, "lin.weight_scale", "[6, 3]", "[6, 2]", "another width or group size")

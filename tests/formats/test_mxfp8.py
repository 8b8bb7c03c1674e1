from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from float_modules import MXFP8_ARGS, assert_one_fault, describe, described, random_module, specs_of
from on_tensors import NATIVE

from trtllm_ct.base.schemes import Element, Strategy
from trtllm_ct.formats import format_for
from trtllm_ct.formats.mxfp8 import MXFP8


def test_worked_bytes() -> None:
    """Bytes of compressed-tensors 0.20 with scale 1/4: 1 to 16 and -1 to -16."""
    positive = bytes.fromhex("485054585a5c5e606162636465666768")
    row = [*positive, *(code | 0x80 for code in positive)]
    stored = {
        "weight": torch.tensor([row], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([[0x7D]], dtype=torch.uint8),
    }
    weight = described(MXFP8_ARGS, stored, (1, 32))
    assert weight.format is MXFP8
    assert (weight.packing, weight.element) == (None, Element.E4M3)
    values = [*range(1, 17), *range(-1, -17, -1)]
    assert NATIVE.dequantize(weight, stored, torch.float32).tolist() == [values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_float_scale_makes_it_plain_fp8(dtype: torch.dtype) -> None:
    stored = random_module(MXFP8_ARGS, (6, 64), seed=4)
    entry = format_for(MXFP8_ARGS, specs_of(stored | {"weight_scale": torch.ones(6, 2, dtype=dtype)}))
    assert entry is not None
    assert entry.name == "float-quantized"


def test_exponents_under_arguments_per_channel_are_a_fault() -> None:
    """Read as numbers, exponents around 127 would make weights a hundred times too large."""
    stored = random_module(MXFP8_ARGS, (6, 64), seed=4)
    args = replace(MXFP8_ARGS, strategy=Strategy.CHANNEL, group_size=None, scale_dtype=None)
    _, faults = describe(args, specs_of(stored), (6, 64))
    assert_one_fault(faults, "lin", "group_size 32", "fp8 channel", "config group targets this module")

"""The decoder of `marlin-24` of the verification, against the layouts of the package, which were written apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from on_tensors import on_tensors

from tests.layouts.test_marlin_24 import sparse_codes
from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy
from trtllm_ct.layouts import marlin_24 as marlin_24_layout
from trtllm_ct.verify.source.marlin_24 import read
from trtllm_ct.verify.source.weights import Weight

arrange_codes = on_tensors(marlin_24_layout.arrange_codes)
arrange_nibbles = on_tensors(marlin_24_layout.arrange_nibbles)
arrange_scales = on_tensors(marlin_24_layout.arrange_scales)
pick_fours = on_tensors(marlin_24_layout.pick_fours)

SHAPES = [(64, 64), (64, 160), (192, 256)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_those_that_were_arranged(shape: tuple[int, int], bits: int) -> None:
    rows, columns = shape
    codes = sparse_codes(shape, 0) if bits == 8 else sparse_codes(shape, 0).clamp(-8, 7)
    kept, nibbles = pick_fours(codes)
    scale = torch.rand((columns // 16, rows), generator=torch.Generator().manual_seed(1)).to(torch.float16)
    weight = Weight(
        module=cast("Any", SimpleNamespace(tensors={})),
        args=QuantArgs(num_bits=bits, type=NumberType.INT, symmetric=True, strategy=Strategy.GROUP, group_size=16),
        release=(0, 9),
        shape=shape,
        kept={
            "weight_packed": arrange_codes(kept, bits).numpy(),
            "meta": arrange_nibbles(nibbles).numpy(),
            "scale_packed": arrange_scales(scale).numpy(),
        },
    )

    coded = read(weight, 3, rows)

    assert np.array_equal(coded.codes, codes[3:].numpy())
    assert np.array_equal(coded.scale, scale.T[3:].double().numpy())

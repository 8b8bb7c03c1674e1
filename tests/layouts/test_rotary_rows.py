"""Conversion of the rows of a head from the order of pairs to the order of halves."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_form import in_pairs, packed_in_pairs
from on_tensors import on_tensors

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing
from trtllm_ct.layouts import rotary_rows
from trtllm_ct.layouts.torch_tensors import array_of, tensor_of

halves_of_packed_pairs = on_tensors(rotary_rows.halves_of_packed_pairs)


def halves_of_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    array = array_of(rows)
    return tensor_of(replace(array, elements=rotary_rows.halves_of_pairs(array.elements, head_dim)))


def test_two_heads_of_six_rows_by_hand() -> None:
    """In pairs, rows 0 and 1 rotate together; in halves, row 0 rotates with row 3."""
    pairs = torch.tensor([[0], [30], [1], [31], [2], [32], [100], [130], [101], [131], [102], [132]])

    halves = halves_of_pairs(pairs, 6)

    assert halves.flatten().tolist() == [0, 1, 2, 30, 31, 32, 100, 101, 102, 130, 131, 132]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.int32, torch.uint8])
@pytest.mark.parametrize("trailing", [(), (1,), (5,), (2, 1), (0,)])
def test_it_undoes_the_published_permutation_for_every_dtype_and_shape(
    dtype: torch.dtype, trailing: tuple[int, ...]
) -> None:
    rows = torch.randint(0, 100, (24, *trailing), generator=torch.Generator().manual_seed(0)).to(dtype)

    back = halves_of_pairs(in_pairs(rows, 8), 8)

    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back.float(), rows.float())


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), heads=st.integers(1, 3), half=st.integers(1, 9), dense=st.booleans(), data=st.data())
def test_packed_rows_keep_every_bit(bits: int, heads: int, half: int, dense: bool, data: st.DataObject) -> None:
    """Also when codes straddle words, and when the rows don't fill the last word."""
    packing = Packing(bits=bits, container=DType.I32, axis=0, offset_binary=True, dense=dense)
    rows = 2 * half * heads
    codes = data.draw(st.lists(st.integers(-(1 << bits - 1), (1 << bits - 1) - 1), min_size=rows, max_size=rows))
    words = oracles.pack(torch.tensor(codes)[:, None].repeat(1, 3).numpy(), packing)

    back = halves_of_packed_pairs(packed_in_pairs(words, rows, bits, 2 * half, dense=dense), packing, rows, 2 * half)

    assert torch.equal(back, words)

"""Conversions of the Marlin 2:4 layout, checked here and against the helpers that compressed-tensors still has."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import on_tensors
from torch import Tensor

from trtllm_ct.layouts import marlin_24
from trtllm_ct.layouts.marlin_24 import NIBBLES

(
    arrange_codes,
    arrange_nibbles,
    arrange_scales,
    expand_fours,
    pick_fours,
    restore_codes,
    restore_nibbles,
    restore_scales,
) = map(
    on_tensors,
    (
        marlin_24.arrange_codes,
        marlin_24.arrange_nibbles,
        marlin_24.arrange_scales,
        marlin_24.expand_fours,
        marlin_24.pick_fours,
        marlin_24.restore_codes,
        marlin_24.restore_nibbles,
        marlin_24.restore_scales,
    ),
)

SIZES = [(64, 32), (64, 160), (192, 64)]


def random_codes(shape: tuple[int, int], bits: int, seed: int = 0) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def sparse_codes(shape: tuple[int, int], seed: int, share: float = 1.0) -> Tensor:
    """Return codes [N, K] in which at most two of each four columns are not zero."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((*shape,), generator=generator).view(-1, 4).argsort(dim=1)
    kept = (order < 2) & (torch.rand(order.shape, generator=generator) < share)
    return random_codes(shape, 8, seed) * kept.view(shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_restoring_undoes_arranging_codes(size: tuple[int, int], bits: int) -> None:
    rows, columns = size
    codes = random_codes((rows, columns // 2), bits)

    words = arrange_codes(codes, bits)

    assert words.dtype == torch.int32
    assert words.shape == (columns // 32, rows * bits // 2)
    assert torch.equal(restore_codes(words, bits), codes)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_restoring_undoes_arranging_nibbles(size: tuple[int, int]) -> None:
    rows, columns = size
    nibbles = torch.randint(0, 16, (rows, columns // 4), dtype=torch.uint8)

    meta = arrange_nibbles(nibbles)

    assert meta.dtype == torch.int16
    assert meta.shape == (columns // 32, 2 * rows)
    assert torch.equal(restore_nibbles(meta), nibbles)


def test_scales_are_interleaved_by_eight() -> None:
    """compressed-tensors 0.14, N = 64, scale[n] = n + 1."""
    scales = torch.arange(1, 65, dtype=torch.float16)[None]

    stored = arrange_scales(scales)

    assert stored[0, :12].tolist() == [1, 5, 2, 6, 3, 7, 4, 8, 9, 13, 10, 14]
    assert torch.equal(restore_scales(stored), scales)


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_expanding_undoes_picking(seed: int, share: float) -> None:
    codes = sparse_codes((3, 16), seed, share)

    kept, nibbles = pick_fours(codes)

    assert kept.shape == (3, 8)
    assert set(nibbles.flatten().tolist()) <= set(NIBBLES)
    assert torch.equal(expand_fours(kept, nibbles), codes)


def test_every_nibble_puts_two_codes_in_place() -> None:
    for nibble in NIBBLES:
        expected = [0, 0, 0, 0]
        expected[nibble % 4], expected[nibble // 4] = 5, -128
        codes = torch.tensor([[5, -128]], dtype=torch.int8)
        assert expand_fours(codes, torch.tensor([[nibble]], dtype=torch.uint8)).tolist() == [expected]


@pytest.mark.parametrize("marks", [marks for marks in product((0, 1), repeat=4) if sum(marks) > 2], ids=str)
def test_more_than_two_of_four_are_refused(marks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2:4"):
        pick_fours(torch.tensor([marks], dtype=torch.int8))


@pytest.mark.library
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_library_picks_and_arranges_the_same(size: tuple[int, int], share: float) -> None:
    from compressed_tensors.utils import sparse_semi_structured_from_dense_cutlass as from_dense
    from compressed_tensors.utils import sparse_semi_structured_to_dense_cutlass as to_dense

    codes = sparse_codes(size, seed=5, share=share)
    kept, nibbles = pick_fours(codes)

    values, meta = from_dense(codes.half())

    assert torch.equal(kept.half(), values)
    assert torch.equal(arrange_nibbles(nibbles).flatten(), meta.flatten())
    assert torch.equal(
        to_dense(values, meta).to(torch.int8), expand_fours(kept, restore_nibbles(arrange_nibbles(nibbles)))
    )


@pytest.mark.library
@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_permutes_tiles_the_same(bits: int) -> None:
    from compressed_tensors.utils.permutations_24 import get_permutations_24

    order = get_permutations_24(bits)[0]
    codes = random_codes((128, 32), bits)
    tiles = codes.T.reshape(2, 16, 8, 16).permute(0, 2, 1, 3).reshape(-1, 1024)[:, order].reshape(2, -1)

    raw = arrange_codes(codes, bits).view(torch.uint8)

    fields = torch.stack([raw & 15, raw >> 4], dim=2).flatten(1) if bits == 4 else raw
    assert torch.equal(fields.to(torch.int16) - 2 ** (bits - 1), tiles.to(torch.int16))

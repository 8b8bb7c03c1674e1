from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import on_tensors
from torch import Tensor

from trtllm_ct.layouts import bitmasks
from trtllm_ct.layouts.torch_tensors import array_of, tensor_of

count_marks, count_marks_per_four, pack_mask, unpack_mask = map(
    on_tensors,
    (bitmasks.count_marks, bitmasks.count_marks_per_four, bitmasks.pack_mask, bitmasks.unpack_mask),
)

SHAPES = [(1,), (8,), (13,), (1, 1), (3, 10), (5, 16), (2, 3, 9), (0,), (0, 8), (4, 0), (2, 0, 5)]
DTYPES = [torch.float8_e4m3fn, torch.int8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.int64]


def scatter_marked(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    array = array_of(values)
    scattered = bitmasks.scatter_marked(array.elements, bitmask.numpy(), columns)
    return tensor_of(replace(array, elements=scattered))


def gather_marked(dense: Tensor, mask: Tensor) -> Tensor:
    return tensor_of(array_of(dense)[mask.numpy()])


def random_mask(shape: tuple[int, ...], seed: int = 0, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def slow_bytes(mask: Tensor) -> list[list[int]]:
    """Return the bytes of each row: bit j of byte i is column 8 * i + j."""
    columns = mask.shape[-1]
    rows: list[list[bool]] = mask.reshape(mask.numel() // columns, columns).tolist()
    return [[sum(2**j for j, mark in enumerate(row[i : i + 8]) if mark) for i in range(0, columns, 8)] for row in rows]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_a_mask_is_packed_lowest_bit_first(shape: tuple[int, ...]) -> None:
    mask = random_mask(shape)

    packed = pack_mask(mask)

    assert packed.dtype == torch.uint8
    assert packed.reshape(-1, packed.shape[-1]).tolist() == slow_bytes(mask)


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_undoes_packing(shape: tuple[int, ...], share: float) -> None:
    mask = random_mask(shape, share=share)

    packed = pack_mask(mask)

    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(unpack_mask(packed, shape[-1]), mask)
    assert torch.equal(count_marks(packed), mask.sum(dim=-1))


def test_marks_are_counted_in_every_byte() -> None:
    all_bytes = torch.arange(256, dtype=torch.uint8)
    low, high = ([f"{byte >> shift & 15:b}".count("1") for byte in range(256)] for shift in (0, 4))
    assert (count_marks_per_four(all_bytes) & 15).tolist() == low
    assert (count_marks_per_four(all_bytes) >> 4).tolist() == high
    assert count_marks(all_bytes).item() == sum(low) + sum(high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scattering_undoes_gathering(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = random_mask(shape, seed=1)
    dense = torch.randint(1, 100, shape).to(dtype)

    restored = scatter_marked(gather_marked(dense, mask), pack_mask(mask), shape[-1])

    assert restored.dtype == dtype
    expected = torch.where(mask, dense.double(), 0.0)
    assert torch.equal(restored.double(), expected)


@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from([1, 7, 64, 1 << 20]), st.integers(0, 2**32), st.data())
@settings(max_examples=40, deadline=None)
def test_the_tile_size_does_not_change_the_result(
    rows: int, columns: int, tile: int, seed: int, data: st.DataObject
) -> None:
    mask = random_mask((rows, columns), seed, share=data.draw(st.sampled_from([0, 0.1, 0.9, 1])))
    dense = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmasks, "_TILE_ELEMENTS", tile)
        restored = scatter_marked(dense[mask], pack_mask(mask), columns)
    assert torch.equal(restored, dense.masked_fill(~mask, 0))


def test_nan_payloads_survive() -> None:
    """The functions copy bits, so that a signalling NaN stays one."""
    bits = torch.tensor([0x7F81, 0x7FC1, -0x7F, 0x7F80], dtype=torch.int16)
    mask = torch.tensor([True, True, True, True])
    restored = scatter_marked(gather_marked(bits.view(torch.bfloat16), mask), pack_mask(mask), 4)
    assert torch.equal(restored.view(torch.int16), bits)


@pytest.mark.parametrize(
    ("dtype", "zeros", "others"),
    [
        (torch.float8_e4m3fn, [0x00, 0x80], [0x01, 0x81, 0x7F, 0xFF, 0x7E]),
        (torch.float8_e5m2, [0x00, 0x80], [0x01, 0x81, 0x7C, 0xFD]),
        (torch.float8_e8m0fnu, [], [0x00, 0x7F, 0x80, 0xFF]),
        (torch.int8, [0x00], [0x01, 0x80, 0xFF]),
        (torch.uint8, [0x00], [0x80, 0xFF]),
    ],
    ids=str,
)
def test_what_counts_as_zero_among_bytes(dtype: torch.dtype, zeros: list[int], others: list[int]) -> None:
    bits = torch.tensor([*zeros, *others], dtype=torch.uint8).view(dtype)
    assert array_of(bits).is_nonzero.tolist() == [False] * len(zeros) + [True] * len(others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_counts_as_zero_among_floats(dtype: torch.dtype) -> None:
    """-0.0 counts as zero; the smallest subnormal number and NaN do not."""
    smallest = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    values = torch.tensor([0.0, -0.0, smallest.item(), -smallest.item(), torch.nan, -torch.inf], dtype=dtype)
    assert array_of(values).is_nonzero.tolist() == [False, False, True, True, True, True]


@pytest.mark.library
@pytest.mark.parametrize("shape", [(3, 10), (5, 16), (1, 1), (7, 129)], ids=str)
def test_the_library_packs_the_same_bits(shape: tuple[int, int]) -> None:
    from compressed_tensors.utils import pack_bitmasks, unpack_bitmasks

    mask = random_mask(shape, seed=2)
    assert torch.equal(pack_mask(mask), pack_bitmasks(mask))
    assert torch.equal(unpack_mask(pack_mask(mask), shape[1]), unpack_bitmasks(pack_mask(mask), list(shape)))

from __future__ import annotations

import hypothesis.strategies as st
import oracles
import pytest
import torch
import torch_twins
from hypothesis import given, settings
from on_tensors import Scaling, tensor_module
from torch import Tensor

from trtllm_ct.layouts import scales

on_tensors = tensor_module(scales)
additive_zero, widen_scale = on_tensors.additive_zero, on_tensors.widen_scale
dequantize = on_tensors.dequantize
SCALE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DENSE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_scale(rows: int, groups: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return random scales over many powers of two, which are not on any coarse grid."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 4, (rows, groups), generator=generator)
    return (torch.rand((rows, groups), generator=generator) * 2.0**exponents).to(dtype)


def random_codes(shape: tuple[int, int], dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == "fp8":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    half = {"int4": 8, "int8": 128}[dtype]
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ((1, 1), ()),
        ((1, 1), (5,)),
        ((5, 1), (5,)),
        ((1, 1), (5, 6)),
        ((5, 1), (5, 6)),
        ((5, 2), (5, 6)),
        ((5, 6), (5, 6)),
        ((1, 1), (1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
def test_widening_repeats_scales_and_changes_no_value(
    stored: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scale = random_scale(*stored, dtype, seed=0)
    before = scale.clone()
    wide = widen_scale(scale, shape)
    assert (wide.dtype, tuple(wide.shape)) == (torch.float32, shape)
    assert wide.is_contiguous()
    grid = (*shape, 1, 1)[:2] if shape else (1, 1)
    assert torch.equal(wide.double().reshape(grid), oracles.repeat_scale(scale, grid))
    assert torch.equal(wide, torch_twins.widen_scale(scale, shape))
    assert torch.equal(scale, before)


def test_widened_scales_are_no_expanded_views() -> None:
    """An expanded view can neither be saved nor written to."""
    wide = widen_scale(torch.tensor([[2.0]]), (3, 4))
    wide[0, 0] = 7
    assert wide[0, 1] == 2


def test_additive_zero_of_a_worked_example() -> None:
    scale = torch.tensor([[0.5], [0.25], [1.0], [2.0]])
    zero_point = torch.tensor([[3], [-8], [0], [7]], dtype=torch.int8)
    zero = additive_zero(scale, zero_point)
    assert zero.flatten().tolist() == [-1.5, 2.0, 0.0, -14.0]
    assert not zero.signbit()[2, 0]
    codes = torch.tensor([range(-8, 0), range(8), (7, -8, 0, 1, -1, 2, -2, 3), (1, 1, 1, 1, -1, -1, -1, -1)])
    assert torch.equal((codes - zero_point) * scale, codes * scale + zero)


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(SCALE_DTYPES), seed=st.integers(0, 2**31))
def test_additive_zero_equals_the_slow_reference(dtype: torch.dtype, seed: int) -> None:
    scale = random_scale(3, 4, dtype, seed)
    zero_point = random_codes((3, 4), "int8", seed)
    zero = additive_zero(scale, zero_point)
    assert zero.dtype is torch.float32
    assert torch.equal(zero.double(), oracles.additive_zero(scale, zero_point))
    assert torch.equal(zero, torch_twins.additive_zero(scale, zero_point))


@settings(max_examples=150, deadline=None)
@given(
    code_dtype=st.sampled_from(["int4", "int8", "fp8"]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    dtype=st.sampled_from(DENSE_DTYPES),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 13)),
    strategy=st.sampled_from(["tensor", "channel", 1, 3, 4, 13, 64]),
    with_zero_point=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dequantizing_equals_the_slow_reference(
    code_dtype: str,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    shape: tuple[int, int],
    strategy: str | int,
    with_zero_point: bool,
    seed: int,
) -> None:
    """Every element is the exact value, rounded once; the last group may have fewer columns."""
    rows, columns = shape
    group_size = strategy if isinstance(strategy, int) else None
    groups = -(-columns // group_size) if group_size else 1
    scale = random_scale(1 if strategy == "tensor" else rows, groups, scale_dtype, seed)
    zero_point = None
    if with_zero_point and code_dtype != "fp8":
        zero_point = random_codes(tuple(scale.shape), code_dtype, seed + 1)
    codes = random_codes(shape, code_dtype, seed)
    before = codes.clone()
    scaling = Scaling(scale=scale, zero_point=zero_point, group_columns=group_size)
    values = dequantize(codes, scaling, dtype)
    assert values.dtype is dtype
    assert values.is_contiguous()
    expected = oracles.dequantize(codes, scale, zero_point, group_size, dtype)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)
    twin = torch_twins.dequantize(codes, scaling, dtype)
    torch.testing.assert_close(values, twin, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("tile_elements", [1, 24, 1 << 20])
@pytest.mark.parametrize(("scale_rows", "groups"), [(1, 1), (7, 1), (7, 2)])
def test_the_tile_size_does_not_change_the_result(
    scale_rows: int, groups: int, tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = random_codes((7, 8), "int4", seed=1)
    scale = random_scale(scale_rows, groups, torch.float32, seed=2)
    zero_point = random_codes((scale_rows, groups), "int4", seed=3)
    scaling = Scaling(scale=scale, zero_point=zero_point, group_columns=8 // groups)
    whole = dequantize(codes, scaling, torch.bfloat16)
    monkeypatch.setattr(scales, "_TILE_ELEMENTS", tile_elements)
    assert torch.equal(dequantize(codes, scaling, torch.bfloat16), whole)


def test_a_zero_scale_gives_zeros_and_nan_stays_nan() -> None:
    codes = torch.tensor([[0x7F, 0x08, 0xFF], [0x7E, 0xFE, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = dequantize(codes, Scaling(scale=torch.tensor([[1.0], [0.0]])), torch.bfloat16)
    assert values[0].isnan().tolist() == [True, False, True]
    assert values[1].tolist() == [0.0, 0.0, 0.0]


def test_float32_scales_are_not_rounded_in_between() -> None:
    """5 * scale exceeds the midpoint of 1 and the next bfloat16 number by less than the precision of float32."""
    scale = torch.tensor([[float.fromhex("0x1.9b3334p-3")]])
    codes = torch.tensor([[5]], dtype=torch.int8)
    assert dequantize(codes, Scaling(scale=scale), torch.bfloat16).item() == 1 + 2**-7

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtllm_ct.reference.activations import FP8_MAX, quantize_per_tensor, quantize_per_token, round_to_fp8

WIDE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", WIDE)
def test_values_of_the_fp8_grid_survive(dtype: torch.dtype) -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    grid = grid[grid.isfinite()].to(dtype)

    assert torch.equal(grid, round_to_fp8(grid, torch.tensor(1.0)))
    assert torch.equal(grid / 4, round_to_fp8(grid / 4, torch.tensor(0.25)))


def test_known_roundings() -> None:
    """Three mantissa bits, ties to even, saturation where a bare cast would give NaN."""
    values = torch.tensor([17.0, 19.0, 448.0, 460.0, 1e6, -1e6, 2.0**-10, 1.5 * 2.0**-9])

    rounded = round_to_fp8(values, torch.tensor(1.0))

    assert rounded.tolist() == [16.0, 20.0, 448.0, 448.0, 448.0, -448.0, 0.0, 2.0**-8]


def test_a_static_scale_clips_what_lies_beyond_it() -> None:
    values = torch.tensor([[1.0, 100.0], [-100.0, 0.5]])

    clipped = quantize_per_tensor(values, torch.tensor(0.125))

    assert clipped.tolist() == [[1.0, 56.0], [-56.0, 0.5]]


def test_a_dynamic_scale_maps_the_largest_value_to_the_largest_code() -> None:
    values = torch.tensor([[1.0, 896.0], [-3.0, 0.5]])

    assert torch.equal(round_to_fp8(values, torch.tensor(2.0)), quantize_per_tensor(values, None))


def test_rows_of_zeros_stay_zero() -> None:
    values = torch.tensor([[0.0, 0.0], [448.0, 1.0]])

    assert torch.equal(values, quantize_per_token(values))
    assert torch.equal(values[:1], quantize_per_tensor(values[:1], None))


def test_each_token_has_its_own_scale() -> None:
    values = torch.randn(2, 3, 8)
    values[0, 1] *= 1000

    rows = [quantize_per_tensor(row, None) for row in values.flatten(0, 1)]

    assert torch.equal(torch.stack(rows).view_as(values), quantize_per_token(values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_inputs_stay_visible(bad: float) -> None:
    """NaN and inf must not come out as ordinary numbers."""
    values = torch.tensor([[1.0, bad]])

    assert not quantize_per_token(values).isfinite().all()


@given(seed=st.integers(0, 10_000), exponent=st.integers(-6, 6), dtype=st.sampled_from(WIDE))
def test_rounding_is_idempotent_and_close(seed: int, exponent: int, dtype: torch.dtype) -> None:
    scale = torch.tensor(2.0**exponent)
    values = (torch.randn(16, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)

    once = round_to_fp8(values, scale)

    assert once.dtype == dtype
    assert torch.equal(once, round_to_fp8(once, scale))
    # Half a step of three mantissa bits, or of the smallest subnormal.
    step = torch.maximum(values.abs().double() / 16, scale.double() * 2.0**-10)
    assert ((once.double() - values.double()).abs() <= step).all()


@given(seed=st.integers(0, 10_000))
def test_dynamic_scales_never_clip(seed: int) -> None:
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) * FP8_MAX * 100

    assert torch.allclose(quantize_per_token(values), values, rtol=1 / 16, atol=FP8_MAX)

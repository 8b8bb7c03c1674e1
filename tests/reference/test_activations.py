from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtllm_ct.reference.activations import (
    FP8_MAX,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_per_block,
    quantize_per_tensor,
    quantize_per_token,
    round_to_e2m1,
    round_to_fp8,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WIDE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALF = torch.tensor(0.5)
# value -> value after rounding to E2M1; a value halfway between two neighbours goes to the even code.
E2M1_ROUNDINGS = (
    {value: value for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)}
    | {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    | {0.28125: 0.5, 0.71875: 0.5, 1.28125: 1.5, 2.53125: 3.0, 5.0625: 6.0, 6.5: 6.0, 60000.0: 6.0}
)


def padded(values: list[float], length: int) -> Tensor:
    return torch.tensor(values + [0.0] * (length - len(values)))


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


def test_a_static_scale_clips_larger_values() -> None:
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
def test_nan_and_inf_do_not_become_ordinary_numbers(bad: float) -> None:
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


@pytest.mark.parametrize("dtype", WIDE)
def test_float4_rounds_to_nearest_and_halfway_values_to_the_even_code(dtype: torch.dtype) -> None:
    values, wanted = (torch.tensor(list(side), dtype=dtype) for side in (E2M1_ROUNDINGS, E2M1_ROUNDINGS.values()))

    assert torch.equal(wanted, round_to_e2m1(values))
    assert torch.equal(-wanted, round_to_e2m1(-values))


def test_nvfp4_by_hand() -> None:
    """input_scale 0.5; the scale of a group is e4m3(peak / 6 / 0.5), and 0.5 times it is what codes are multiplied by.

    First group: peak 12, scale 4, so that codes stand for multiples of 2. Second: peak 10, 3.33 rounds to 3.25, and
    codes stand for multiples of 1.625; 10 / 1.625 is beyond 6. Third: the scale saturates at 448. Fourth: zeros.
    """
    groups = [
        padded([12.0, 5.0, -1.0, 0.4, 7.0, 3.1, -11.0], 16),
        padded([10.0, -1.0, 5.0], 16),
        padded([5000.0, 300.0, -112.0], 16),
        torch.zeros(16),
    ]
    wanted = [
        padded([12.0, 4.0, -1.0, 0.0, 8.0, 3.0, -12.0], 16),
        padded([9.75, -0.8125, 4.875], 16),
        padded([1344.0, 336.0, -112.0], 16),
        torch.zeros(16),
    ]

    assert torch.equal(torch.cat(wanted)[None], quantize_nvfp4(torch.cat(groups)[None], HALF))


def test_nvfp4_with_the_zero_scale_of_an_expert_without_calibration_is_zero() -> None:
    assert torch.equal(torch.zeros(2, 16), quantize_nvfp4(torch.ones(2, 16), torch.zeros(1)))


def test_mxfp8_by_hand() -> None:
    """The scale is peak / 448, rounded up to a power of two, so that no code saturates.

    Peaks of 448 and 224.5 have the scale 1; 449, 500 and 512 have 2; 0.7 has 2^-9, and 1e-6 is then below half of the
    smallest code.
    """
    groups = [
        padded([448.0, 17.0], 32),
        padded([224.5, 17.0], 32),
        padded([449.0, 17.0], 32),
        padded([500.0, -19.0], 32),
        padded([512.0, 34.0], 32),
        padded([0.7, 1e-6], 32),
    ]
    wanted = [
        padded([448.0, 16.0], 32),
        padded([224.0, 16.0], 32),
        padded([448.0, 16.0], 32),
        padded([512.0, -20.0], 32),
        padded([512.0, 32.0], 32),
        padded([0.6875, 0.0], 32),
    ]

    assert torch.equal(torch.cat(wanted)[None], quantize_mxfp8(torch.cat(groups)[None]))


@pytest.mark.parametrize("exponent", [-20, -1, 0, 5, 20])
def test_no_peak_of_an_mxfp8_group_saturates(exponent: int) -> None:
    """Peaks between 448 and 512 times a power of two get the next scale, and lose at most half a step of e4m3."""
    peaks = torch.linspace(256, 512, 257).ldexp(torch.tensor(exponent))
    groups = torch.zeros(len(peaks), 32)
    groups[:, 7] = peaks

    assert ((quantize_mxfp8(groups)[:, 7] - peaks).abs() <= peaks / 16).all()


def test_each_block_of_a_token_has_its_own_scale() -> None:
    values = torch.randn(2, 3, 300)
    values[..., 128:256] *= 1000

    rounded = quantize_per_block(values)

    for start, end in ((0, 128), (128, 256), (256, 300)):
        assert torch.equal(quantize_per_token(values[..., start:end]), rounded[..., start:end])


@pytest.mark.parametrize("quantize", [quantize_mxfp8, lambda x: quantize_nvfp4(x, HALF)], ids=["mxfp8", "nvfp4"])
@pytest.mark.parametrize("dtype", WIDE)
def test_groups_keep_shape_and_dtype(quantize: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    rounded = quantize(torch.randn(2, 3, 64).to(dtype))

    assert rounded.shape == (2, 3, 64)
    assert rounded.dtype == dtype
    assert torch.equal(quantize(torch.zeros(1, 32, dtype=dtype)), torch.zeros(1, 32, dtype=dtype))


def test_nan_stays_nan_in_groups() -> None:
    """An infinity has no E8M0 scale and becomes NaN; a static scale saturates it, as hardware does."""
    values = torch.zeros(1, 32)
    for bad in (torch.nan, torch.inf):
        values[0, 3] = bad
        assert quantize_mxfp8(values)[0, 3].isnan()
    assert quantize_nvfp4(values, HALF)[0, 3] == 1344.0
    values[0, 3] = torch.nan
    assert quantize_nvfp4(values, HALF)[0, 3].isnan()

"""Weights are quantized again with the best scales, which brute force, torch's rounding and the loops confirm."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trtllm_ct.layouts import requantize
from trtllm_ct.layouts.loops.lanes import SCALES_AT_ONCE
from trtllm_ct.layouts.requantize import (
    LARGEST_OF_NVFP4,
    block_peaks,
    to_e2m1_exponents,
    to_e2m1_groups,
    to_e4m3_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
POSITIVE_E4M3 = E4M3[1:127]
GLOBAL = 2.0**-10
KINDS = ("integers", "normal", "outliers", "constant", "powers of two")


@pytest.fixture(autouse=True)
def no_doubt(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Loops run as the machine code that is kept, not as numba's own functions."""
    yield
    assert not caplog.text


def values_of(kind: str, shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    """Values as they are stored: integer codes times scales of groups of 32, and others that are hard."""
    random = np.random.default_rng(seed)
    match kind:
        case "integers":
            codes = random.integers(-8, 8, shape)
            scale = np.exp(random.normal(-5, 0.4, (shape[0], -(-shape[1] // 32))))
            values = codes * np.repeat(scale, 32, axis=1)[:, : shape[1]]
        case "normal":
            values = random.normal(0, 0.02, shape)
        case "outliers":
            values = random.normal(0, 0.02, shape) * np.where(random.random(shape) < 0.02, 50, 1)
        case "constant":
            values = np.full(shape, 0.37)
        case _:
            values = random.integers(-7, 8, shape) * 2.0 ** random.integers(-9, -3, (shape[0], 1)) * 0.0123
    return values.astype(np.float32)


def e4m3_values(codes: NDArray[np.uint8], scale: NDArray[np.float32], block: tuple[int, int]) -> NDArray[np.float64]:
    scales = np.repeat(np.repeat(scale.astype(np.float64), block[0], 0), block[1], 1)
    return E4M3[codes] * scales[: codes.shape[0], : codes.shape[1]]


def e2m1_values(pairs: NDArray[np.uint8], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(pairs.shape[0], -1)
    return E2M1[codes] * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


def squared(values: NDArray[np.float32], result: NDArray[np.float64]) -> float:
    return float(np.square(values.astype(np.float64) - result).sum())


def least_error(values: NDArray[np.float32], numbers: NDArray[np.float64], scales: NDArray[np.float64]) -> float:
    """The least squared error of one group over all scales, by trying each number of the format for each value."""
    tried = numbers[None, None, :] * scales[:, None, None]
    return float(np.square(values[None, :, None] - tried).min(axis=-1).sum(axis=-1).min())


class TestRounding:
    """With its scale, each value gets the nearest code."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_e4m3_rounds_as_torch_does(self, kind: str) -> None:
        values = values_of(kind, (40, 70))

        codes, scale = to_e4m3_blocks(values, (16, 32))

        scales = np.repeat(np.repeat(scale, 16, 0), 32, 1)[:40, :70]
        expected = torch.from_numpy(values * (np.float32(1) / scales)).to(torch.float8_e4m3fn).view(torch.uint8)
        assert np.array_equal(codes, expected.numpy())

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_code_of_e2m1_is_nearer(self, kind: str) -> None:
        values = values_of(kind, (8, 64))

        pairs, scale = to_e2m1_groups(values, 16, GLOBAL)

        scales = np.repeat(E4M3[scale] * GLOBAL, 16, axis=1)
        nearest = np.abs(values[..., None] - E2M1 * scales[..., None]).min(axis=-1)
        found = np.abs(values - e2m1_values(pairs, E4M3[scale] * GLOBAL))
        assert np.allclose(found, nearest, rtol=1e-6, atol=1e-12)

    def test_ties_go_to_the_even_code(self) -> None:
        """With 6 in each group the exponent is that of 1, and these are halfway between two numbers."""
        halfway = np.array([[6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5] + [0] * 24], np.float32)

        pairs, exponent = to_e2m1_exponents(halfway)

        assert exponent.tolist() == [[127]]
        assert e2m1_values(pairs, np.ones((1, 1)))[0, :8].tolist() == [6, 0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_candidates_of_e4m3_blocks_fill_whole_registers(*, powers_of_two: bool) -> None:
    """The loops read and write so many at once."""
    peaks, _ = block_peaks(powers_of_two=powers_of_two)

    assert len(peaks) == 1 or len(peaks) % SCALES_AT_ONCE == 0


@pytest.mark.parametrize(
    "function", [to_e4m3_blocks, partial(to_e2m1_groups, group_size=16, global_scale=GLOBAL), to_e2m1_exponents]
)
def test_weights_without_rows_stay_empty(
    function: Callable[[NDArray[np.float32]], tuple[NDArray[np.uint8], Any]],
) -> None:
    codes, scales = function(np.zeros((0, 64), np.float32))

    assert codes.shape[0] == scales.shape[0] == 0


class TestOptimality:
    """No scale that the format has is better, by trying them all on small blocks."""

    @pytest.mark.parametrize(("kind", "seed"), [*product(KINDS, range(4))])
    def test_no_e4m3_scale_of_a_group_is_better(self, kind: str, seed: int) -> None:
        values = values_of(kind, (6, 64), seed)

        pairs, scale = to_e2m1_groups(values, 16, GLOBAL)

        result = e2m1_values(pairs, E4M3[scale] * GLOBAL)
        for row, g in product(range(6), range(4)):
            group = slice(16 * g, 16 * g + 16)
            best = least_error(values[row, group], E2M1, POSITIVE_E4M3 * GLOBAL)
            assert squared(values[row, group], result[row, group]) <= best * (1 + 1e-5) + 1e-18

    @pytest.mark.parametrize("middle", range(10))
    @pytest.mark.parametrize("loops", [False, True], ids=["numpy", "loops"])
    def test_no_e4m3_scale_is_better_where_a_sixth_of_a_group_is_subnormal(self, middle: int, loops: bool) -> None:
        """Scales have few mantissas there: the best one may be three times as large, and then its codes are small."""
        random = np.random.default_rng(middle)
        unit, rows = 2.0**-9 * GLOBAL, 5000 if loops else 300
        largest = 6 * unit * random.uniform(max(middle - 0.5, 0.01), middle + 0.5, (rows, 1))
        integers = random.integers(-12, 13, (rows, 16)) * random.integers(1, 16, (rows, 1)) * unit / 4
        values = np.where(random.random((rows, 1)) < 0.5, integers, random.normal(0, 1, (rows, 16)) * largest)
        values = (values * largest / np.abs(values).max(1, keepdims=True).clip(unit / 8)).astype(np.float32)
        values[::3] = np.rint(values[::3] / (unit / 2)) * (unit / 2)

        pairs, scale = to_e2m1_groups(values, 16, GLOBAL)

        error = np.square(values.astype(np.float64) - e2m1_values(pairs, E4M3[scale] * GLOBAL)).sum(1)
        for row in range(0, rows, rows // 300):
            assert error[row] <= least_error(values[row], E2M1, POSITIVE_E4M3 * GLOBAL) * (1 + 1e-5)

    @given(arrays(np.float32, (1, 16), elements=st.floats(-2, 2, width=32)))
    @settings(max_examples=200, deadline=None)
    def test_no_e4m3_scale_is_better_for_any_group(self, values: NDArray[np.float32]) -> None:
        pairs, scale = to_e2m1_groups(values, 16, GLOBAL)

        best = least_error(values[0], E2M1, POSITIVE_E4M3 * GLOBAL)
        assert squared(values, e2m1_values(pairs, E4M3[scale] * GLOBAL)) <= best * (1 + 1e-5) + 1e-14

    @given(arrays(np.float32, (1, 32), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
    @settings(max_examples=200, deadline=None)
    def test_no_exponent_is_better(self, values: NDArray[np.float32]) -> None:
        pairs, exponent = to_e2m1_exponents(values)

        powers = 2.0 ** (np.arange(255) - 127.0)
        found = squared(values, e2m1_values(pairs, powers[exponent]))
        assert found <= least_error(values[0], E2M1, powers[20:]) * (1 + 1e-5) + 1e-30

    @pytest.mark.parametrize(("kind", "seed"), [*product(KINDS, range(3))])
    def test_no_scale_of_a_block_is_much_better(self, kind: str, seed: int) -> None:
        """Scales of float32 are too many to try; of 600 in two binades none has two percent less error."""
        values = values_of(kind, (128, 128), seed)

        codes, scale = to_e4m3_blocks(values)

        found = squared(values, e4m3_values(codes, scale, (128, 128)))
        largest = float(np.abs(values).max())
        tried = largest / 448 * 2.0 ** np.linspace(-0.5, 1.5, 600)
        best = min(squared(values, _rounded_to_e4m3(values / one) * one) for one in tried)
        assert found <= best * 1.02 + 1e-12


def _rounded_to_e4m3(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = torch.from_numpy(np.clip(numbers, -448, 448)).float()
    return clipped.to(torch.float8_e4m3fn).double().numpy()


class TestExactness:
    """What the format can hold is held exactly."""

    @pytest.mark.parametrize("odd", [1, 3, 5, 7, 9, 11, 13, 15])
    def test_e4m3_holds_integers_whose_scales_differ_by_powers_of_two(self, odd: int) -> None:
        """The largest magnitude is an odd number times its scale; eleven exponents fit below it."""
        random = np.random.default_rng(odd)
        codes = random.integers(-odd, odd + 1, (128, 128)) * (random.random((128, 128)) < 0.5)
        codes[0, 0] = odd
        scale = 2.0 ** -random.integers(0, 6, (128, 1)) * 0.0173
        scale[0] = 0.0173
        values = (codes * scale.astype(np.float32)).astype(np.float32)

        result = e4m3_values(*to_e4m3_blocks(values), (128, 128))

        assert np.allclose(result, values, rtol=2e-7, atol=0)

    def test_one_row_that_is_exact_does_not_decide(self) -> None:
        """The rows that candidates are compared on first are zero here: all of them are exact there."""
        values = np.zeros((128, 128), np.float32)
        values[1:8] = 5 * 0.0173
        values[9:16] = 3 * 0.0173
        values[17] = 15 * 0.0173

        result = e4m3_values(*to_e4m3_blocks(values), (128, 128))

        assert np.allclose(result, values, rtol=2e-7, atol=0)

    @pytest.mark.parametrize("exponent", [-60, -7, 0, 60])
    def test_numbers_of_e2m1_stay_what_they_are(self, exponent: int) -> None:
        values = np.tile(E2M1, (2, 4)).astype(np.float32) * np.float32(2.0**exponent)

        pairs, exponents = to_e2m1_exponents(values)

        assert np.array_equal(e2m1_values(pairs, 2.0 ** (exponents.astype(float) - 127)), values)

    @pytest.mark.parametrize("kind", KINDS)
    def test_powers_of_two_are_the_smallest_that_hold_the_block(self, kind: str) -> None:
        values = values_of(kind, (256, 384))

        codes, scale = to_e4m3_blocks(values, powers_of_two=True)

        largest = np.abs(values.reshape(2, 128, 3, 128)).max(axis=(1, 3))
        assert np.array_equal(np.frexp(scale)[0], np.full(scale.shape, 0.5))
        assert ((largest <= 448 * scale) & (largest > 224 * scale)).all()
        assert squared(values, e4m3_values(codes, scale, (128, 128))) <= 0.06**2 * np.square(values).sum()

    def test_zeros_stay_zero_and_scales_are_positive(self) -> None:
        zeros = np.zeros((256, 128), np.float32)

        codes, scale = to_e4m3_blocks(zeros)
        groups, e4m3 = to_e2m1_groups(zeros, 16, GLOBAL)
        exponents = to_e2m1_exponents(zeros)[0]

        assert not codes.any()
        assert not groups.any()
        assert not exponents.any()
        assert (scale > 0).all()
        assert (e4m3 > 0).all()

    def test_the_largest_value_of_nvfp4_is_held(self) -> None:
        values = np.full((1, 16), LARGEST_OF_NVFP4 * GLOBAL, np.float32)

        pairs, scale = to_e2m1_groups(values, 16, GLOBAL)

        assert np.array_equal(e2m1_values(pairs, E4M3[scale] * GLOBAL), values)


class TestLoops:
    """Loops give the same bits as numpy operations."""

    @pytest.fixture
    def both(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
        with monkeypatch.context() as patch:
            yield patch

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(128, 128), (130, 200), (1, 32), (300, 96), (257, 640)])
    def test_blocks(self, kind: str, shape: tuple[int, int], both: pytest.MonkeyPatch) -> None:
        self._compare(both, to_e4m3_blocks, values_of(kind, shape))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(128, 128), (130, 200), (1, 32)])
    def test_blocks_with_powers_of_two(self, kind: str, shape: tuple[int, int], both: pytest.MonkeyPatch) -> None:
        self._compare(both, partial(to_e4m3_blocks, powers_of_two=True), values_of(kind, shape))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(1, 16), (5, 32), (64, 640)])
    def test_groups(self, kind: str, shape: tuple[int, int], both: pytest.MonkeyPatch) -> None:
        self._compare(both, lambda values: to_e2m1_groups(values, 16, GLOBAL), values_of(kind, shape))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(1, 32), (5, 64), (64, 640)])
    def test_exponents(self, kind: str, shape: tuple[int, int], both: pytest.MonkeyPatch) -> None:
        self._compare(both, to_e2m1_exponents, values_of(kind, shape))

    @staticmethod
    def _compare(patch: pytest.MonkeyPatch, function, values: NDArray[np.float32]) -> None:
        patch.setattr(requantize, "_MIN_VALUES", values.size + 1)
        by_numpy = function(values)
        patch.setattr(requantize, "_MIN_VALUES", 0)
        by_loop = function(values)
        for one, other in zip(by_numpy, by_loop, strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)

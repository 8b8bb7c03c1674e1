"""int4 weights become from their codes what they become from their values, and are dequantized where they don't."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.layouts import requantize_int4
from trtllm_ct.layouts.loops import lanes, machine_code, requantize_int4_kernels
from trtllm_ct.layouts.loops.machine_code import kernel
from trtllm_ct.layouts.requantize import LARGEST_OF_NVFP4, to_e2m1_exponents, to_e2m1_groups, to_e4m3_blocks
from trtllm_ct.layouts.requantize_int4 import int4_to_e2m1_exponents, int4_to_e2m1_groups, int4_to_e4m3_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

GLOBAL = 2.0**-8
LARGEST_SCALE = LARGEST_OF_NVFP4 * GLOBAL / 8
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
POWERS = 2.0 ** (np.arange(256) - 127.0)

Result = tuple["NDArray[np.uint8]", "NDArray[np.uint8]"]


@pytest.fixture(autouse=True)
def no_doubt(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Loops run as the machine code that is kept, not as numba's own functions."""
    yield
    assert not caplog.text


def packed(codes: NDArray[np.int64]) -> NDArray[np.int32]:
    """Words of eight codes in offset binary, the first one in the lowest bits."""
    fields = (codes + 8).reshape(codes.shape[0], -1, 8)
    return (fields << 4 * np.arange(8)).sum(-1).astype(np.uint32).view(np.int32)


def bfloat16(scale: NDArray[np.float64]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """The bits of scales, rounded to bfloat16 by torch, and their numbers."""
    rounded = torch.from_numpy(scale).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16), rounded.float().numpy()


def values_of(codes: NDArray[np.int64], numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a weight is dequantized to; it is exact."""
    return codes.astype(np.float32) * np.repeat(numbers, codes.shape[1] // numbers.shape[1], axis=1)


def e2m1_errors(
    values: NDArray[np.float32], pairs: NDArray[np.uint8], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The squared error of each group, computed in float64."""
    fields = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scale.shape, -1)
    return np.square(values.reshape(fields.shape) - E2M1[fields] * scale[..., None]).sum(-1)


def least_errors(values: NDArray[np.float32], width: int, scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least squared error of each group over all scales, by trying each number for each value."""
    groups = values.reshape(values.shape[0], -1, width).astype(np.float64)
    of_scale = [np.square(groups[..., None] - E2M1 * scale).min(-1).sum(-1) for scale in scales]
    return np.minimum.reduce(of_scale)


def check_e2m1(
    codes: NDArray[np.int64], values: NDArray[np.float32], found: Result, expected: Result, numbers: NDArray[np.float64]
) -> None:
    """Compare with what values give: the same bits, unless two scales have the same error."""
    same = found[1] == expected[1]
    width = codes.shape[1] // same.shape[1]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == np.uint8
        assert one.shape == other.shape
    alike = np.repeat(same, width // 2, axis=1)
    assert np.array_equal(found[0][alike], expected[0][alike])
    of_found = e2m1_errors(values, found[0], numbers[found[1]])
    of_expected = e2m1_errors(values, expected[0], numbers[expected[1]])
    assert np.allclose(of_found, of_expected, rtol=1e-6, atol=0)


def check_groups(codes: NDArray[np.int64], scale: NDArray[np.float64]) -> None:
    bits, numbers = bfloat16(scale)
    values = values_of(codes, numbers)
    found = int4_to_e2m1_groups(packed(codes), bits, GLOBAL)
    check_e2m1(codes, values, found, to_e2m1_groups(values, 16, GLOBAL), E4M3 * GLOBAL)


def check_exponents(codes: NDArray[np.int64], scale: NDArray[np.float64]) -> None:
    bits, numbers = bfloat16(scale)
    values = values_of(codes, numbers)
    found = int4_to_e2m1_exponents(packed(codes), bits)
    check_e2m1(codes, values, found, to_e2m1_exponents(values), POWERS)


def e4m3_errors(
    values: NDArray[np.float32], codes: NDArray[np.uint8], scale: NDArray[np.float32], block: tuple[int, int]
) -> NDArray[np.float64]:
    """The squared error of each block, computed in float64."""
    scales = np.repeat(np.repeat(scale.astype(np.float64), block[0], 0), block[1], 1)
    errors = np.square(values - E4M3[codes] * scales[: values.shape[0], : values.shape[1]])
    rows, columns = (range(0, length, size) for length, size in zip(values.shape, block, strict=True))
    return np.add.reduceat(np.add.reduceat(errors, rows, axis=0), columns, axis=1)


def check_blocks(codes: NDArray[np.int64], scale: NDArray[np.float64], block: tuple[int, int] = (128, 128)) -> None:
    """Compare with what values give: the same bits, unless two scales have the same error."""
    bits, numbers = bfloat16(scale)
    values = values_of(codes, numbers)
    for powers_of_two in (False, True):
        found = int4_to_e4m3_blocks(packed(codes), bits, block, powers_of_two=powers_of_two)
        expected = to_e4m3_blocks(values, block, powers_of_two=powers_of_two)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
        same = found[1] == expected[1]
        alike = np.repeat(np.repeat(same, block[0], 0), block[1], 1)[: codes.shape[0], : codes.shape[1]]
        assert np.array_equal(found[0][alike], expected[0][alike])
        errors = (e4m3_errors(values, *result, block) for result in (found, expected))
        assert np.allclose(*errors, rtol=1e-5, atol=1e-13 * np.square(values.astype(np.float64)).sum())


CHECKS = [check_groups, check_exponents, check_blocks]


def random_codes(shape: tuple[int, int], seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(-8, 8, shape)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("groups", [1, 2, 8], ids=["a row", "half a row", "each 32 columns"])
@pytest.mark.parametrize("spread", [0.2, 3.0], ids=["alike", "of all sizes"])
def test_the_result_is_that_of_the_values(check: Callable[..., None], groups: int, spread: float) -> None:
    scale = np.exp(np.random.default_rng(groups).normal(-5, spread, (300, groups))).clip(1e-7, LARGEST_SCALE)

    check(random_codes((300, 256)), scale)


@pytest.mark.parametrize("check", [check_groups, check_blocks])
def test_scales_may_be_those_of_sixteen_columns(check: Callable[..., None]) -> None:
    check(random_codes((130, 192)), np.exp(np.random.default_rng(1).normal(-5, 0.3, (130, 12))))


def test_every_mantissa_and_every_largest_magnitude() -> None:
    """All kinds of groups occur, each with several exponents of the scale, down to candidates that are subnormal."""
    mantissas, largest = np.meshgrid(np.arange(128), np.arange(9), indexing="ij")
    random = np.random.default_rng(0)
    for exponent in (-14, -12, -10, -7, -3, 0):
        scale = ((1 + mantissas.ravel() / 128) * 2.0**exponent)[:, None].clip(0, LARGEST_SCALE)
        limit = largest.ravel()[:, None]
        codes = np.clip(random.integers(-8, 8, (limit.size, 32)), -limit, np.minimum(limit, 7))
        codes[:, ::16] = -limit
        check_groups(codes, scale)
        check_exponents(codes, scale)


@given(st.lists(st.integers(-8, 7), min_size=32, max_size=32), st.floats(2.0**-20, LARGEST_SCALE))
@settings(max_examples=200, deadline=None)
def test_any_group(codes: list[int], scale: float) -> None:
    for check in CHECKS:
        check(np.array([codes]), np.array([[scale]]))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("code", [0, -8, 7, 1], ids=str)
def test_a_constant_weight(check: Callable[..., None], code: int) -> None:
    check(np.full((3, 64), code), np.full((3, 2), 0.01))


def test_no_scale_is_better() -> None:
    """No other number that the format has gives a group less error, by trying them all."""
    codes, scale = random_codes((64, 64), 3), np.exp(np.random.default_rng(3).normal(-5, 0.5, (64, 2)))
    codes[::4] //= 4  # groups without large magnitudes
    bits, numbers = bfloat16(scale)
    values = values_of(codes, numbers)

    pairs, scales = int4_to_e2m1_groups(packed(codes), bits, GLOBAL)
    found = e2m1_errors(values, pairs, E4M3[scales] * GLOBAL)
    assert (found <= least_errors(values, 16, E4M3[1:127] * GLOBAL) * (1 + 1e-6)).all()

    pairs, exponents = int4_to_e2m1_exponents(packed(codes), bits)
    found = e2m1_errors(values, pairs, POWERS[exponents])
    assert (found <= least_errors(values, 32, POWERS[100:140]) * (1 + 1e-12)).all()


@pytest.mark.parametrize(("largest", "step"), [(5, 1), (6, 1), (7, 8), (8, 16)])
def test_eight_candidates_are_enough_for_any_group(largest: int, step: int) -> None:
    """The least error of the lanes is the least of all eleven candidates, for every histogram of sixteen codes."""
    tables, scale = requantize_int4._nvfp4_tables(GLOBAL), (1 + np.arange(128) / 128) * 2.0**-5
    counts = np.array(
        [np.bincount(row, minlength=largest + 1) for row in combinations_with_replacement(range(largest + 1), 15)]
    )[:, 1:].astype(np.float32)
    counts[:, -1] += 1
    for mantissa in range(0, 128, step):
        kind = 9 * mantissa + largest
        first = int(tables.first[kind])
        magnitudes = scale[mantissa] * np.arange(1, largest + 1)
        tried = E4M3[first : first + tables.above + 1] * GLOBAL
        errors = np.square(magnitudes[:, None, None] - E2M1 * tried[:, None]).min(-1).astype(np.float32)
        least = (counts @ errors).min(axis=1)
        assert np.allclose((counts @ tables.errors[kind, :largest]).min(axis=1), least, rtol=1e-5, atol=1e-12)


class TestBlocks:
    """FP8 blocks of every size and kind have the bits that their values give."""

    @pytest.mark.parametrize("block", [(128, 128), (1, 384), (64, 32), (128, 16)], ids=str)
    @pytest.mark.parametrize("groups", [1, 3, 12, 24], ids=lambda groups: f"scales of {384 // groups} columns")
    def test_of_any_size(self, block: tuple[int, int], groups: int) -> None:
        scale = np.exp(np.random.default_rng(groups).normal(-5, 0.3, (150, groups)))

        check_blocks(random_codes((150, 384)), scale, block)

    def test_at_the_end_may_be_smaller(self) -> None:
        check_blocks(random_codes((129, 160)), np.exp(np.random.default_rng(0).normal(-5, 0.3, (129, 5))))

    def test_whose_scales_differ_by_powers_of_two_are_exact(self) -> None:
        codes = random_codes((128, 128)) | 1
        scale = 2.0 ** -np.random.default_rng(0).integers(0, 4, (128, 4)) * 0.0173
        bits, numbers = bfloat16(scale)

        found, scales = int4_to_e4m3_blocks(packed(codes), bits)

        assert np.array_equal(E4M3[found] * float(scales[0, 0]), values_of(codes, numbers).astype(np.float64))
        check_blocks(codes, scale)

    @pytest.mark.parametrize("difference", [8, 9, 30])
    def test_whose_scales_differ_much(self, difference: int) -> None:
        scale = np.full((128, 4), 0.0173)
        scale[5, 2] *= 2.0**-difference

        check_blocks(random_codes((128, 128)), scale)

    def test_of_zeros_beside_others(self) -> None:
        codes = random_codes((256, 256))
        codes[:128, :128] = 0
        codes[130] = 0

        check_blocks(codes, np.full((256, 8), 0.01))


@pytest.mark.parametrize("rows", [1, 70])
def test_many_groups_whose_scales_are_extreme(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rounded by their values, some at a time, in long rows of which the last one is not full."""
    monkeypatch.setattr(requantize_int4, "_GROUPS_BY_VALUES", 150)
    scale = np.random.default_rng(rows).uniform(0.6, LARGEST_SCALE, (rows, 6))
    scale[:, ::3] = 2.0**-17

    check_groups(random_codes((rows, 192)), scale)


@pytest.mark.parametrize("function", [int4_to_e2m1_groups, int4_to_e2m1_exponents, int4_to_e4m3_blocks])
def test_words_need_not_be_aligned_or_contiguous(function: Callable[..., Result]) -> None:
    """Words in a file lie at multiples of four bytes, and rows of a slice have gaps."""
    more = (GLOBAL,) if function is int4_to_e2m1_groups else ()
    bits, _ = bfloat16(np.full((4, 2), 0.01))
    words = packed(random_codes((4, 64), 1))
    shifted = np.frombuffer(b"----" + words.tobytes(), np.int32)[1:].reshape(words.shape)
    gaps = np.concatenate([words, words], axis=1)[:, : words.shape[1]]

    expected = function(words, bits, *more)

    for given_words, given_bits in ((shifted, bits), (gaps, np.concatenate([bits, bits], axis=1)[:, :2])):
        found = function(given_words, given_bits, *more)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["e2m1_with_exponents", "e4m3_blocks"])
def test_processors_without_an_instruction_for_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are looked up one by one there, with the same result."""
    codes, scale = random_codes((130, 256)), np.exp(np.random.default_rng(0).normal(-5, 0.3, (130, 8)))
    monkeypatch.setattr(machine_code, "read_cached", lambda *_: None)
    monkeypatch.setattr(machine_code, "write_cached", lambda *_: None)
    monkeypatch.setattr(lanes, "_LOOK_UP", {})
    loop = getattr(requantize_int4_kernels, name)
    monkeypatch.setattr(requantize_int4_kernels, name, kernel(*loop._example)(loop.__wrapped__))

    (check_exponents if name == "e2m1_with_exponents" else check_blocks)(codes, scale)


@pytest.mark.parametrize("limit", [2.0**-40, 2.0**39])
@pytest.mark.parametrize("check", [check_exponents, check_blocks])
def test_scales_may_be_far_from_one(check: Callable[..., None], limit: float) -> None:
    check(random_codes((130, 128)), np.full((130, 4), limit) * (1 + np.arange(4) / 8))

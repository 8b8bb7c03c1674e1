"""int4 weights become from their codes what they become from their values, and are dequantized where they don't."""

from __future__ import annotations

from functools import partial
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.layouts import requantize_int4
from trtllm_ct.layouts.loops import (
    lanes,
    machine_code,
    requantize_int4_kernels,
    requantize_int4_nvfp4_kernels,
    vectors,
)
from trtllm_ct.layouts.loops.machine_code import kernel
from trtllm_ct.layouts.requantize import LARGEST_OF_NVFP4, to_e2m1_exponents, to_e2m1_groups, to_e4m3_blocks
from trtllm_ct.layouts.requantize_int4 import int4_to_e2m1_exponents, int4_to_e2m1_groups, int4_to_e4m3_blocks
from trtllm_ct.layouts.requantize_int4_tables import nvfp4_symmetric_tables, nvfp4_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from numpy.typing import NDArray

GLOBAL = 2.0**-8
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


def values_of(
    codes: NDArray[np.int64], numbers: NDArray[np.float32], zeros: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """What a weight is dequantized to; it is exact."""
    zeros = np.zeros(numbers.shape, int) if zeros is None else zeros
    zero, number = (np.repeat(each, codes.shape[1] // numbers.shape[1], axis=1) for each in (zeros, numbers))
    return (codes - zero).astype(np.float32) * number


def offset_binary(zeros: NDArray[np.int64] | None) -> NDArray[np.uint8] | None:
    """Zero points as the functions take them."""
    return None if zeros is None else (zeros + 8).astype(np.uint8)


def largest_scale(*, with_zeros: bool) -> float:
    """The largest scale of weights that NVFP4 holds: numbers are at most 8, or 15."""
    return LARGEST_OF_NVFP4 * GLOBAL / (15 if with_zeros else 8)


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
    """Compare with what values give: the same bits, unless two scales of numbers have the same error."""
    same = found[1] == expected[1]
    assert same[~values.reshape(*same.shape, -1).any(-1)].all(), "a group of zeros has another scale"
    width = codes.shape[1] // same.shape[1]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == np.uint8
        assert one.shape == other.shape
    alike = np.repeat(same, width // 2, axis=1)
    assert np.array_equal(found[0][alike], expected[0][alike])
    of_found = e2m1_errors(values, found[0], numbers[found[1]])
    of_expected = e2m1_errors(values, expected[0], numbers[expected[1]])
    assert np.allclose(of_found, of_expected, rtol=1e-6, atol=0)


def check_groups(codes: NDArray[np.int64], scale: NDArray[np.float64], zeros: NDArray[np.int64] | None = None) -> None:
    bits, numbers = bfloat16(scale)
    values = values_of(codes, numbers, zeros)
    found = int4_to_e2m1_groups(packed(codes), bits, offset_binary(zeros), GLOBAL)
    check_e2m1(codes, values, found, to_e2m1_groups(values, 16, GLOBAL), E4M3 * GLOBAL)


def check_exponents(
    codes: NDArray[np.int64], scale: NDArray[np.float64], zeros: NDArray[np.int64] | None = None
) -> None:
    bits, numbers = bfloat16(scale)
    values = values_of(codes, numbers, zeros)
    found = int4_to_e2m1_exponents(packed(codes), bits, offset_binary(zeros))
    check_e2m1(codes, values, found, to_e2m1_exponents(values), POWERS)


def e4m3_errors(
    values: NDArray[np.float32], codes: NDArray[np.uint8], scale: NDArray[np.float32], block: tuple[int, int]
) -> NDArray[np.float64]:
    """The squared error of each block, computed in float64."""
    scales = np.repeat(np.repeat(scale.astype(np.float64), block[0], 0), block[1], 1)
    errors = np.square(values - E4M3[codes] * scales[: values.shape[0], : values.shape[1]])
    rows, columns = (range(0, length, size) for length, size in zip(values.shape, block, strict=True))
    return np.add.reduceat(np.add.reduceat(errors, rows, axis=0), columns, axis=1)


def check_blocks(
    codes: NDArray[np.int64],
    scale: NDArray[np.float64],
    zeros: NDArray[np.int64] | None = None,
    block: tuple[int, int] = (128, 128),
) -> None:
    """Compare with what values give: the same bits, unless two scales of numbers have the same error."""
    bits, numbers = bfloat16(scale)
    values = values_of(codes, numbers, zeros)
    for powers_of_two in (False, True):
        found = int4_to_e4m3_blocks(packed(codes), bits, offset_binary(zeros), block, powers_of_two=powers_of_two)
        expected = to_e4m3_blocks(values, block, powers_of_two=powers_of_two)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
        same = found[1] == expected[1]
        are_zeros = e4m3_errors(values, np.zeros_like(found[0]), found[1], block) == 0
        assert same[are_zeros].all(), "a block of zeros has another scale"
        alike = np.repeat(np.repeat(same, block[0], 0), block[1], 1)[: codes.shape[0], : codes.shape[1]]
        assert np.array_equal(found[0][alike], expected[0][alike])
        errors = (e4m3_errors(values, *result, block) for result in (found, expected))
        assert np.allclose(*errors, rtol=1e-5, atol=1e-13 * np.square(values.astype(np.float64)).sum())


CHECKS = [check_groups, check_exponents, check_blocks]


def random_codes(shape: tuple[int, int], seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(-8, 8, shape)


@pytest.fixture(params=[False, True], ids=["symmetric", "zero points"])
def zeros_of(request: pytest.FixtureRequest) -> Callable[..., NDArray[np.int64] | None]:
    """A function that makes random zero points in a shape, or None."""
    return random_codes if request.param else lambda *_: None


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("groups", [1, 2, 8], ids=["a row", "half a row", "each 32 columns"])
@pytest.mark.parametrize("spread", [0.2, 3.0], ids=["alike", "of all sizes"])
def test_the_result_is_that_of_the_values(
    check: Callable[..., None], groups: int, spread: float, zeros_of: Callable[..., NDArray[np.int64] | None]
) -> None:
    scale, zeros = np.exp(np.random.default_rng(groups).normal(-5, spread, (300, groups))), zeros_of((300, groups), 9)

    check(random_codes((300, 256)), scale.clip(1e-7, largest_scale(with_zeros=zeros is not None)), zeros)


@pytest.mark.parametrize("check", [check_groups, check_blocks])
@pytest.mark.parametrize("groups", [12, 4], ids=["sixteen columns", "forty-eight columns"])
def test_scales_may_be_those_of_few_words(
    check: Callable[..., None], groups: int, zeros_of: Callable[..., NDArray[np.int64] | None]
) -> None:
    scale = np.exp(np.random.default_rng(1).normal(-5, 0.3, (130, groups)))

    check(random_codes((130, 192)), scale, zeros_of((130, groups), 2))


@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zero points"])
def test_every_mantissa_and_every_largest_magnitude(with_zeros: bool) -> None:
    """All kinds of groups occur, each with several exponents of the scale, down to candidates that are subnormal."""
    most, limit_of_scales = 15 if with_zeros else 8, largest_scale(with_zeros=with_zeros)
    mantissas, largest = np.meshgrid(np.arange(128), np.arange(most + 1), indexing="ij")
    random, limit = np.random.default_rng(0), largest.ravel()[:, None]
    # Rows with exponents from -11 to -3 have normal candidates only, whatever their magnitudes are.
    for exponent in (-14, -12, -11, -7, -3, -2, 0):
        scale = ((1 + mantissas.ravel() / 128) * 2.0**exponent)[:, None].clip(0, limit_of_scales)
        # A zero point that leaves room for the largest magnitude below it or above it.
        below = random.integers(0, 2, limit.shape).astype(bool)
        zeros = np.where(below, random.integers(limit, 16), random.integers(0, 16 - limit)) - 8
        zeros = zeros if with_zeros else np.zeros_like(limit)
        sign = np.where(below, -1, 1) if with_zeros else -1
        lowest, highest = np.maximum(zeros - limit, -8), np.minimum(zeros + limit, 7)
        codes = random.integers(lowest, highest + 1, (limit.size, 32))
        codes[:, ::16] = zeros + sign * limit
        for check in (check_groups, check_exponents, partial(check_blocks, block=(1, 32))):
            check(codes, scale, zeros if with_zeros else None)


@given(
    st.lists(st.integers(-8, 7), min_size=32, max_size=32),
    st.floats(2.0**-20, largest_scale(with_zeros=False)),
    st.none() | st.integers(-8, 7),
)
@settings(max_examples=300, deadline=None)
def test_any_group(codes: list[int], scale: float, zero: int | None) -> None:
    scale = min(scale, largest_scale(with_zeros=zero is not None))
    for check in CHECKS:
        check(np.array([codes]), np.array([[scale]]), None if zero is None else np.array([[zero]]))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("code", [0, -8, 7, 1], ids=str)
@pytest.mark.parametrize("zero", [None, 0, -8, 7, 1], ids=str)
def test_a_constant_weight(check: Callable[..., None], code: int, zero: int | None) -> None:
    """Of zeros, too: of codes that are the zero point."""
    check(np.full((3, 64), code), np.full((3, 2), 0.01), None if zero is None else np.full((3, 2), zero))


@pytest.mark.parametrize("check", CHECKS)
def test_zeros_beside_other_groups(
    check: Callable[..., None], zeros_of: Callable[..., NDArray[np.int64] | None]
) -> None:
    """A block, a row, a group and half a group have codes that are their zero points."""
    codes, zeros = random_codes((256, 256)), zeros_of((256, 8), 3)
    zero = np.repeat(np.zeros((256, 8), int) if zeros is None else zeros, 32, axis=1)
    for place in (np.s_[:128, :128], np.s_[130], np.s_[140, 32:64], np.s_[150, 16:32]):
        codes[place] = zero[place]

    check(codes, np.full((256, 8), 0.01), zeros)


@pytest.mark.parametrize("function", [int4_to_e2m1_groups, int4_to_e2m1_exponents, int4_to_e4m3_blocks])
def test_the_zero_point_of_symmetric_weights_may_be_given(function: Callable[..., Result]) -> None:
    more = (GLOBAL,) if function is int4_to_e2m1_groups else ()
    codes, scale = random_codes((70, 256), 5), np.exp(np.random.default_rng(5).normal(-5, 0.4, (70, 8)))
    bits, numbers = bfloat16(scale)

    implied, given_ = (function(packed(codes), bits, zeros, *more) for zeros in (None, np.full((70, 8), 8, np.uint8)))

    if function is int4_to_e2m1_groups:
        check_e2m1(codes, values_of(codes, numbers), given_, implied, E4M3 * GLOBAL)
    else:
        assert all(np.array_equal(one, other) for one, other in zip(implied, given_, strict=True))


def test_every_zero_point() -> None:
    zeros = np.repeat(np.arange(-8, 8), 8)[:, None].repeat(2, axis=1)
    scale = np.exp(np.random.default_rng(8).normal(-5, 0.3, zeros.shape))

    for check in CHECKS:
        check(random_codes((128, 128), 8), scale, zeros)


def test_no_scale_is_better(zeros_of: Callable[..., NDArray[np.int64] | None]) -> None:
    """No other number that the format has gives a group less error, by trying them all."""
    codes, scale = random_codes((64, 64), 3), np.exp(np.random.default_rng(3).normal(-5, 0.5, (64, 2)))
    codes[::4] //= 4  # groups without large magnitudes
    bits, numbers = bfloat16(scale)
    zeros = zeros_of((64, 2), 3)
    values = values_of(codes, numbers, zeros)

    pairs, scales = int4_to_e2m1_groups(packed(codes), bits, offset_binary(zeros), GLOBAL)
    found = e2m1_errors(values, pairs, E4M3[scales] * GLOBAL)
    assert (found <= least_errors(values, 16, E4M3[1:127] * GLOBAL) * (1 + 1e-6)).all()

    pairs, exponents = int4_to_e2m1_exponents(packed(codes), bits, offset_binary(zeros))
    found = e2m1_errors(values, pairs, POWERS[exponents])
    assert (found <= least_errors(values, 32, POWERS[100:140]) * (1 + 1e-12)).all()


@pytest.mark.parametrize(("largest", "step"), [(5, 1), (6, 1), (7, 8), (8, 16)])
def test_eight_candidates_are_enough_for_any_group(largest: int, step: int) -> None:
    """The least error of the lanes is the least of all eleven candidates, for every histogram of sixteen codes."""
    tables, scale = nvfp4_symmetric_tables(GLOBAL), (1 + np.arange(128) / 128) * 2.0**-5
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


@pytest.mark.parametrize("largest", range(1, 16))
def test_integers_are_the_errors_of_groups_with_zero_points(largest: int) -> None:
    """The least integer is that of the scale with the least error of all eleven.

    28 bits hold all of them: the number of a candidate fits below.
    """
    tables, random = nvfp4_tables(GLOBAL), np.random.default_rng(largest)
    lanes = 8 if largest <= 8 else 12
    for mantissa in range(0, 128, 3):
        kind, scale = 16 * mantissa + largest, (1 + mantissa / 128) * 2.0**-5
        magnitudes = random.integers(0, largest + 1, (200, 16))
        magnitudes[:, 0] = largest
        records = tables.records.reshape(-1, 4, 16)[tables.places.reshape(-1, 16)[kind, :lanes] // 64]
        products, squares = (records[:, table].astype(np.int64)[:, magnitudes].sum(-1) for table in (0, 1))
        factors = tables.factors.reshape(-1, 4, 2, 4, 2)[kind].astype(np.int64)
        assert np.array_equal(factors[..., 0], factors[..., 1])
        of_products, of_squares = np.swapaxes(factors[..., 0], 0, 1).reshape(2, 16)[:, :lanes, None]
        found = products * of_products + squares * of_squares
        assert abs(found).max() < 2**27
        first = int(tables.first[kind])
        tried = E4M3[first : first + tables.above + 1] * GLOBAL
        values = scale * magnitudes
        errors = np.square(values[..., None, None] - E2M1 * tried[:, None]).min(-1).sum(1)
        chosen = E4M3[tables.steps.reshape(-1, 16)[kind, found.argmin(0)]] * GLOBAL
        of_chosen = np.square(values[..., None] - E2M1 * chosen[:, None, None]).min(-1).sum(1)
        assert np.allclose(of_chosen, errors.min(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [-60, -20, -11, -1, 0, 1, 4, 20])
def test_the_global_scale_may_be_any_power_of_two(
    exponent: int, zeros_of: Callable[..., NDArray[np.int64] | None]
) -> None:
    """Scales are given with it: the codes and scales of groups are those of another global scale."""
    factor, zeros = 2.0 ** (exponent + 8), offset_binary(zeros_of((40, 8), 2))
    scale = np.exp(np.random.default_rng(2).uniform(-12, -0.5, (40, 8)))
    codes = packed(random_codes((40, 128), 2))

    found = int4_to_e2m1_groups(codes, bfloat16(scale * factor)[0], zeros, GLOBAL * factor)

    expected = int4_to_e2m1_groups(codes, bfloat16(scale)[0], zeros, GLOBAL)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("function", [int4_to_e2m1_groups, int4_to_e2m1_exponents, int4_to_e4m3_blocks])
def test_zero_points_belong_to_scales(function: Callable[..., Result]) -> None:
    more = (GLOBAL,) if function is int4_to_e2m1_groups else ()
    bits, _ = bfloat16(np.full((4, 2), 0.01))

    with pytest.raises(AssertionError, match=r"zero points are \(4, 1\), and scales \(4, 2\)"):
        function(packed(random_codes((4, 64))), bits, np.zeros((4, 1), np.uint8), *more)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("function", [int4_to_e2m1_groups, int4_to_e2m1_exponents, int4_to_e4m3_blocks])
def test_a_weight_without_rows_stays_empty(function: Callable[..., Result], rows: int) -> None:
    more = (GLOBAL,) if function is int4_to_e2m1_groups else ()

    codes, _ = function(packed(random_codes((3, 64)))[:rows], bfloat16(np.full((3, 2), 0.01))[0][:rows], None, *more)

    assert codes.shape == (rows, 64 if function is int4_to_e4m3_blocks else 32)


class TestBlocks:
    """FP8 blocks of every size and kind have the bits that their values give."""

    @pytest.mark.parametrize("block", [(128, 128), (1, 384), (64, 32), (128, 16)], ids=str)
    @pytest.mark.parametrize("groups", [1, 3, 12, 24], ids=lambda groups: f"scales of {384 // groups} columns")
    def test_of_any_size(
        self, block: tuple[int, int], groups: int, zeros_of: Callable[..., NDArray[np.int64] | None]
    ) -> None:
        scale = np.exp(np.random.default_rng(groups).normal(-5, 0.3, (150, groups)))

        check_blocks(random_codes((150, 384)), scale, zeros_of((150, groups), 4), block)

    def test_at_the_end_may_be_smaller(self, zeros_of: Callable[..., NDArray[np.int64] | None]) -> None:
        scale = np.exp(np.random.default_rng(0).normal(-5, 0.3, (129, 5)))

        check_blocks(random_codes((129, 160)), scale, zeros_of((129, 5), 5))

    def test_whose_scales_differ_by_powers_of_two_are_exact(self) -> None:
        codes = random_codes((128, 128)) | 1
        scale = 2.0 ** -np.random.default_rng(0).integers(0, 4, (128, 4)) * 0.0173
        bits, numbers = bfloat16(scale)

        found, scales = int4_to_e4m3_blocks(packed(codes), bits, None)

        assert np.array_equal(E4M3[found] * float(scales[0, 0]), values_of(codes, numbers).astype(np.float64))
        check_blocks(codes, scale)

    @pytest.mark.parametrize("difference", [8, 9, 30])
    def test_whose_scales_differ_much(self, difference: int, zeros_of: Callable[..., NDArray[np.int64] | None]) -> None:
        scale = np.full((128, 4), 0.0173)
        scale[5, 2] *= 2.0**-difference

        check_blocks(random_codes((128, 128)), scale, zeros_of((128, 4), 6))


@pytest.mark.parametrize("rows", [1, 70])
def test_many_groups_whose_scales_are_extreme(
    rows: int, monkeypatch: pytest.MonkeyPatch, zeros_of: Callable[..., NDArray[np.int64] | None]
) -> None:
    """They are rounded by their values, some at a time, in long rows of which the last one is not full."""
    monkeypatch.setattr(requantize_int4, "_GROUPS_BY_VALUES", 150)
    zeros = zeros_of((rows, 6), 7)
    scale = np.random.default_rng(rows).uniform(0.45, 1, (rows, 6)) * largest_scale(with_zeros=zeros is not None)
    scale[:, ::3] = 2.0**-17

    check_groups(random_codes((rows, 192)), scale, zeros)


@pytest.mark.parametrize("function", [int4_to_e2m1_groups, int4_to_e2m1_exponents, int4_to_e4m3_blocks])
def test_words_need_not_be_aligned_or_contiguous(function: Callable[..., Result]) -> None:
    """Words in a file lie at multiples of four bytes, and rows of a slice have gaps."""
    more = (GLOBAL,) if function is int4_to_e2m1_groups else ()
    bits, _ = bfloat16(np.full((4, 2), 0.01))
    words, zeros = packed(random_codes((4, 64), 1)), offset_binary(random_codes((4, 2), 1))
    shifted = np.frombuffer(b"----" + words.tobytes(), np.int32)[1:].reshape(words.shape)
    gaps = np.concatenate([words, words], axis=1)[:, : words.shape[1]]

    expected = function(words, bits, zeros, *more)

    with_gaps = gaps, *(np.concatenate([each, each], axis=1)[:, :2] for each in (bits, zeros))
    for arguments in ((shifted, bits, zeros), with_gaps):
        found = function(*arguments, *more)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("module", "name", "check", "kinds"),
    [
        (requantize_int4_kernels, "e2m1_with_exponents", check_exponents, (False, True)),
        (requantize_int4_kernels, "e4m3_blocks", check_blocks, (False, True)),
        (requantize_int4_nvfp4_kernels, "e2m1_with_e4m3_scales", check_groups, (False,)),
        (requantize_int4_nvfp4_kernels, "e2m1_with_e4m3_scales_and_zero_points", check_groups, (True,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_processors_without_an_instruction_for_tables(
    module: ModuleType,
    name: str,
    check: Callable[..., None],
    kinds: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes are looked up one by one there, with the same result, with and without zero points."""
    codes, scale = random_codes((130, 256)), np.exp(np.random.default_rng(0).normal(-5, 0.3, (130, 8)))
    monkeypatch.setattr(machine_code, "read_cached", lambda *_: None)
    monkeypatch.setattr(machine_code, "write_cached", lambda *_: None)
    monkeypatch.setattr(vectors, "_LOOK_UP", {})
    monkeypatch.setattr(lanes, "_has_avx2", lambda: False)
    loop = getattr(module, name)
    monkeypatch.setattr(module, name, kernel(*loop._example)(loop.__wrapped__))

    for with_zeros in kinds:
        check(codes, scale, random_codes((130, 8), 1) if with_zeros else None)


@pytest.mark.parametrize("limit", [2.0**-40, 2.0**39])
@pytest.mark.parametrize("check", [check_exponents, check_blocks])
def test_scales_may_be_far_from_one(
    check: Callable[..., None], limit: float, zeros_of: Callable[..., NDArray[np.int64] | None]
) -> None:
    check(random_codes((130, 128)), np.full((130, 4), limit) * (1 + np.arange(4) / 8), zeros_of((130, 4), 1))

"""The numbers of small floats and of packed codes, against examples that the library wrote and standards print."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.verify.source.numbers import E2M1, E2M3, E4M3, look_up, nibble_values, nibbles, to_numbers, unpack
from trtllm_ct.verify.source.rounding import rounded


def test_e2m1_has_the_sixteen_values_of_the_standard():
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1.tolist() == [*magnitudes, *(-value for value in magnitudes)]


@pytest.mark.parametrize(
    ("code", "value"), [(0x08, 1.0), (0x1F, 7.5), (0x01, 0.125), (0x07, 0.875), (0x28, -1.0), (0x3F, -7.5)]
)
def test_e2m3_by_code(code: int, value: float):
    assert E2M3[code] == value


@pytest.mark.parametrize(
    ("code", "value"),
    [(0x38, 1.0), (0xC0, -2.0), (0x46, 3.5), (0x7E, 448.0), (0x1D, 0.1015625), (0x01, 2.0**-9), (0x08, 2.0**-6)],
)
def test_e4m3_by_code(code: int, value: float):
    assert E4M3[code] == value


def test_e4m3_has_two_codes_that_are_no_number():
    assert np.flatnonzero(np.isnan(E4M3)).tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("columns", [1, 2, 5, 8])
def test_bytes_are_looked_up_at_odd_and_even_lengths(columns: int):
    codes = np.arange(3 * columns, dtype=np.uint8).reshape(3, columns)

    assert np.array_equal(look_up(codes, E4M3), E4M3[codes])


def test_the_first_nibble_is_the_low_one():
    assert nibbles(np.array([[0x21], [0xF0]], np.uint8)).tolist() == [[1, 2], [0, 15]]
    assert nibble_values(np.array([[0x21]], np.uint8), np.arange(16, dtype=np.int8)).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("dtype", "raw", "value"),
    [
        (DType.BF16, np.array([0x3F80], np.uint16), 1.0),
        (DType.F8_E8M0, np.array([127], np.uint8), 1.0),
        (DType.F8_E8M0, np.array([0], np.uint8), 2.0**-127),
        (DType.F8_E5M2, np.array([0x3C], np.uint8), 1.0),
        (DType.F16, np.array([1.5], np.float16), 1.5),
        (DType.I8, np.array([-3], np.int8), -3.0),
    ],
)
def test_stored_elements_by_dtype(dtype: DType, raw: np.ndarray, value: float):
    assert to_numbers(raw, dtype).tolist() == [value]


def test_the_last_exponent_is_no_number():
    assert np.isnan(to_numbers(np.array([255], np.uint8), DType.F8_E8M0)).all()


# Bytes of twelve codes from the lowest up, as compressed-tensors 0.20 (dense) and 0.10.2 (padded) write them.
@pytest.mark.parametrize(
    ("bits", "dense", "data"),
    [
        (3, True, "88c6fa8806000000"),
        (5, True, "2088418a3928a905"),
        (6, True, "40200c44611c48a22c000000"),
        (7, True, "8080604028180e8884620100"),
        (3, False, "88c6fa081a000000"),
        (5, False, "2088410ae6a0a416"),
        (6, False, "40200c0485712009ca020000"),
        (7, False, "808060008482e10088846201"),
    ],
)
def test_codes_of_odd_widths(bits: int, dense: bool, data: str):
    packed = np.frombuffer(bytes.fromhex(data), np.uint8)[None]

    codes = unpack(packed, bits, 12, dense=dense)

    assert codes.tolist() == [[code % (1 << bits) for code in range(12)]]


class TestRounding:
    @pytest.mark.parametrize(
        ("dtype", "exact", "nearest"),
        [
            (DType.BF16, 1 + 2.0**-8, 1.0),
            (DType.BF16, 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-7),
            (DType.BF16, 1 + 3 * 2.0**-8, 1 + 2.0**-6),
            (DType.BF16, 2.0**-133, 2.0**-133),
            (DType.BF16, 2.0**-134, 0.0),
            (DType.BF16, 2.0**-134 * 1.01, 2.0**-133),
            (DType.BF16, -(2.0**128), -np.inf),
            (DType.BF16, 2.0**128 - 2.0**119, np.inf),
            (DType.BF16, 2.0**128 - 2.0**119 - 2.0**80, 2.0**128 - 2.0**120),
            (DType.F16, 65504.0, 65504.0),
            (DType.F16, 65520.0, np.inf),
            (DType.F16, 65519.0, 65504.0),
            (DType.F16, 2.0**-24, 2.0**-24),
            (DType.F32, 1 + 2.0**-24, 1.0),
            (DType.F64, 1 + 2.0**-50, 1 + 2.0**-50),
        ],
    )
    def test_to_the_nearest_ties_to_even(self, dtype: DType, exact: float, nearest: float):
        assert rounded(np.array([exact]), dtype).tolist() == [nearest]

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_numpy_rounds_alike(self, dtype: str):
        values = np.random.default_rng(0).normal(size=5000) * np.exp2(np.random.default_rng(1).integers(-40, 20, 5000))
        with np.errstate(over="ignore"):
            expected = values.astype(dtype).astype(np.float64)

        assert np.array_equal(rounded(values, DType.from_torch(dtype)), expected)

    @pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
    @pytest.mark.parametrize("odd", [np.nan, np.inf, 1e300, 1e-300])
    def test_a_number_is_rounded_alike_whatever_is_beside_it(self, dtype: DType, odd: float):
        """Normal numbers alone are rounded by their bits, numbers beside others by steps."""
        digits = {DType.BF16: 8, DType.F16: 11, DType.F32: 24}[dtype]
        random = np.random.default_rng(0)
        halves = random.integers(1 << digits, 1 << (digits + 1), 2000) * 2.0 ** random.integers(-12, 4, 2000)
        near = np.concatenate([np.nextafter(halves, direction) for direction in (0, np.inf)])
        values = np.concatenate([halves, near, [0.0, -0.0]]) * 2.0**-digits
        values = np.concatenate([values, -values])

        alone, beside = rounded(values, dtype), rounded(np.append(values, odd), dtype)[:-1]

        assert alone.tobytes() == beside.tobytes()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
    def test_what_is_no_number_stays(self, value: float):
        assert np.array_equal(rounded(np.array([value]), DType.BF16), [value], equal_nan=True)

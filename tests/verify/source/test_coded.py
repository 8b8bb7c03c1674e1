"""Weights as codes and scales: their values, and that two are called equal only if every element is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trtllm_ct.verify.source.coded import Coded
from trtllm_ct.verify.source.numbers import E4M3

ROWS, COLUMNS, WIDTH = 6, 70, 16


def coded(*, float8: bool = False, zero: bool = False, offset: bool = False, width: int = WIDTH) -> Coded:
    """Return random rows, the last group of which is narrower than the others."""
    random = np.random.default_rng(0)
    codes = random.integers(-127, 127, (ROWS, COLUMNS)).astype(np.int8)
    groups = (ROWS, -(-COLUMNS // width))
    return Coded(
        codes=codes.view(np.uint8) & 0x7E if float8 else codes,
        scale=random.uniform(1, 2, groups).astype(np.float32).astype(np.float64),
        width=width,
        zero=random.integers(-8, 8, groups).astype(np.float64) if zero else None,
        offset=random.normal(size=groups) if offset else None,
    )


def same(rows: Coded) -> Coded:
    """Return rows with the same numbers in other arrays."""
    return replace(rows, codes=rows.codes.copy(), scale=rows.scale.copy())


def changed(array: np.ndarray, place: tuple[int, int], value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_values_by_element(zero: bool, offset: bool):
    rows = coded(zero=zero, offset=offset)
    group = np.arange(COLUMNS) // WIDTH
    expected = rows.codes.astype(np.float64)
    if rows.zero is not None:
        expected -= rows.zero[:, group]
    expected *= rows.scale[:, group]
    if rows.offset is not None:
        expected += rows.offset[:, group]

    assert np.array_equal(rows.values(), expected)
    assert rows.first() == (expected + (0 if rows.zero is None else rows.zero[:, group] * rows.scale[:, group]))[0, 0]


def test_bits_of_e4m3_stand_for_their_numbers():
    rows = coded(float8=True)

    assert np.array_equal(rows.values(), E4M3[rows.codes] * rows.scale[:, np.arange(COLUMNS) // WIDTH])


@pytest.mark.parametrize("divisor", [2.0, 0.0])
def test_a_divisor_divides_and_zero_makes_zeros(divisor: float):
    rows = coded()

    expected = rows.values() / divisor if divisor else np.zeros((ROWS, COLUMNS))
    assert np.array_equal(replace(rows, divisor=divisor).values(), expected)


@pytest.mark.parametrize("float8", [False, True])
def test_the_same_numbers_are_equal(float8: bool):
    rows = coded(float8=float8)

    assert rows.equals(same(rows))


def test_one_code_off_by_one_is_not_equal():
    rows = coded()
    for place in np.ndindex(ROWS, COLUMNS):
        assert not rows.equals(replace(rows, codes=changed(rows.codes, place, rows.codes[place] + 1)))


def test_one_scale_off_in_its_last_bit_is_not_equal():
    rows = coded()
    for place in np.ndindex(*rows.scale.shape):
        scale = changed(rows.scale, place, np.nextafter(np.float32(rows.scale[place]), np.float32(2)))
        assert not rows.equals(replace(rows, scale=scale))
        assert not replace(rows, scale=scale).equals(rows)


def test_a_zero_point_equals_the_offset_that_it_makes():
    rows = coded(zero=True)
    assert rows.zero is not None
    delivered = replace(rows, zero=None, offset=-rows.zero * rows.scale)

    assert delivered.equals(rows)
    for place in np.ndindex(*rows.zero.shape):
        assert not delivered.equals(replace(rows, zero=changed(rows.zero, place, rows.zero[place] + 1)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_no_number_are_never_equal(value: float):
    rows = coded()
    odd = replace(rows, scale=changed(rows.scale, (ROWS - 1, 0), value))

    assert not odd.equals(same(odd))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_number_are_never_equal(code: int):
    rows = coded(float8=True)
    odd = replace(rows, codes=changed(rows.codes, (ROWS - 1, COLUMNS - 1), code))

    assert not odd.equals(same(odd))


def test_the_same_bits_of_another_type_are_not_equal():
    rows = coded()

    assert not rows.equals(replace(rows, codes=rows.codes.view(np.uint8)))


def test_repeated_scales_are_equal_to_those_of_wider_groups():
    wide = coded(width=32)
    narrow = replace(wide, width=WIDTH, scale=np.repeat(wide.scale, 2, axis=1)[:, : -(-COLUMNS // WIDTH)])

    assert narrow.equals(wide)
    assert wide.equals(narrow)
    assert not narrow.equals(replace(wide, scale=changed(wide.scale, (0, 2), 3.0)))
    assert np.array_equal(narrow.values(), wide.values())


def test_one_scale_of_all_is_equal_to_as_many():
    rows = replace(coded(), scale=np.full((ROWS, -(-COLUMNS // WIDTH)), 0.5))

    assert rows.equals(replace(rows, scale=np.full((1, 1), 0.5), width=COLUMNS)) is False  # widths that don't divide
    assert rows.equals(replace(rows, scale=np.full((ROWS, 1), 0.5)))


def test_scattered_groups_are_compared_by_value():
    rows = coded()
    scattered = replace(rows, columns=np.arange(COLUMNS) % rows.scale.shape[1])

    assert not scattered.equals(same(scattered))

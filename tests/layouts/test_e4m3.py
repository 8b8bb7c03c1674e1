"""Multiplication of E4M3 scales by powers of two, checked against the definition of the format for every number."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from float_modules import number
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.base.schemes import Element
from trtllm_ct.layouts import e4m3
from trtllm_ct.layouts.e4m3 import ANY_POWER, exact_powers, round_to_e4m3
from trtllm_ct.layouts.torch_tensors import array_of

NUMBERS = {byte: number(byte, Element.E4M3) for byte in range(256)}
BYTES = {value: byte for byte, value in NUMBERS.items() if value is not None and byte < 0x80}
NAN, MINUS_NAN, MINUS_ZERO = 0x7F, 0xFF, 0x80
POWERS = range(-40, 41)


def shifted(byte: int, power: int) -> int | None:
    """Return the byte of a number times 2^power by the definition of the format, or None if it can't be represented."""
    value = NUMBERS[byte]
    if value is None:
        return None
    magnitude = BYTES.get(abs(value) * Fraction(2) ** power)
    return None if magnitude is None else magnitude | byte & 0x80


def as_scale(data: bytes, *shape: int) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8).view(torch.float8_e4m3fn).view(shape or (-1,))


def shift_scale(scale: torch.Tensor, power: int) -> torch.Tensor | None:
    result = e4m3.shift_scale(array_of(scale).elements, power)
    return None if result is None else torch.from_numpy(result).view(torch.float8_e4m3fn)


def bytes_of(scale: torch.Tensor) -> bytes:
    return bytes(scale.view(torch.uint8).flatten().tolist())


class TestExactPowers:
    @pytest.mark.parametrize("byte", sorted(set(BYTES.values()) - {0}))
    def test_they_are_all_powers_that_keep_a_number_representable(self, byte: int) -> None:
        """The negative number has the same powers, and the range of powers has no gap."""
        exact = [power for power in POWERS if shifted(byte, power) is not None]

        least, most = exact_powers(bytes([byte]))

        assert list(range(least, most + 1)) == exact
        assert exact_powers(bytes([byte | 0x80])) == (least, most)

    @pytest.mark.parametrize(
        ("number_", "powers"),
        [(448.0, (-15, 0)), (1.0, (-9, 8)), (2.0**-9, (0, 17)), (2.0**-6, (-3, 14)), (1.125, (-6, 8))],
    )
    def test_worked_examples(self, number_: float, powers: tuple[int, int]) -> None:
        """The largest number, 1, the smallest subnormal and normal numbers, and one that needs the whole mantissa."""
        assert exact_powers(bytes([BYTES[Fraction(number_)]])) == powers

    @pytest.mark.parametrize(
        "data",
        [b"", b"\0", b"\x80", b"\0\x80\0", bytes([NAN]), bytes([MINUS_NAN, 0])],
        ids=["none", "zero", "minus zero", "zeros", "nan", "minus nan"],
    )
    def test_zeros_and_nan_allow_any_power(self, data: bytes) -> None:
        """The checks of the payload report NaN. The range must exceed the range between two float32 numbers."""
        assert exact_powers(data) == ANY_POWER
        assert ANY_POWER[0] < -277
        assert ANY_POWER[1] > 277

    @given(data=st.binary(max_size=40))
    def test_several_numbers_allow_the_powers_that_all_of_them_allow(self, data: bytes) -> None:
        """The range always contains 0."""
        powers_of_each = [
            {power for power in POWERS if shifted(byte, power) is not None}
            for byte in data
            if NUMBERS[byte] is not None
        ]

        least, most = exact_powers(data)

        assert least <= 0 <= most
        assert {power for power in POWERS if least <= power <= most} == set(POWERS).intersection(*powers_of_each)


class TestShiftScale:
    @pytest.mark.parametrize("power", [*range(-19, 20), -40, 40])
    def test_each_number_is_shifted_exactly_or_refused(self, power: int) -> None:
        """Signs stay, also the sign of zero; NaN is refused."""
        for byte in range(256):
            result = shift_scale(as_scale(bytes([byte])), power)

            assert (None if result is None else bytes_of(result)[0]) == shifted(byte, power), byte

    @settings(max_examples=60, deadline=None)
    @given(data=st.binary(min_size=1, max_size=20), power=st.integers(-18, 18))
    def test_one_number_that_can_not_be_shifted_refuses_the_whole_scale(self, data: bytes, power: int) -> None:
        want = [shifted(byte, power) for byte in data]

        result = shift_scale(as_scale(data), power)

        assert (None if result is None else list(bytes_of(result))) == (None if None in want else want)

    @given(data=st.binary(max_size=20).map(lambda data: bytes(byte for byte in data if byte & 0x7F != NAN)))
    @settings(max_examples=40, deadline=None)
    def test_exact_powers_gives_the_limits_of_shift_scale(self, data: bytes) -> None:
        """Both limits work and can be undone; one step beyond either limit is refused."""
        least, most = exact_powers(data)
        scale = as_scale(data)
        for power in (least, most):
            shifted_scale = shift_scale(scale, power)
            assert shifted_scale is not None
            restored = shift_scale(shifted_scale, -power)
            assert restored is not None
            assert bytes_of(restored) == data
        if (least, most) != ANY_POWER:
            assert shift_scale(scale, least - 1) is None
            assert shift_scale(scale, most + 1) is None

    @pytest.mark.parametrize("power", [*ANY_POWER, -300, -150, 127, 128, 256, 300])
    def test_powers_beyond_float32_keep_zeros_and_refuse_all_other_numbers(self, power: int) -> None:
        """In particular, infinity times zero never occurs."""
        zeros = as_scale(bytes([0, MINUS_ZERO]))

        result = shift_scale(zeros, power)

        assert result is not None
        assert bytes_of(result) == bytes_of(zeros)
        for byte in (1, 0x38, 0x7E):
            assert shift_scale(as_scale(bytes([0, byte])), power) is None

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (2, 3, 2)], ids=str)
    def test_any_shape_works_and_the_input_does_not_change(self, shape: tuple[int, ...]) -> None:
        scale = torch.full(shape, 1.5).to(torch.float8_e4m3fn)
        before = scale.clone()

        result = shift_scale(scale, -2)

        assert result is not None
        assert (result.dtype, result.shape) == (torch.float8_e4m3fn, shape)
        assert bytes_of(result) == bytes([BYTES[Fraction(3, 8)]]) * math.prod(shape)
        assert bytes_of(scale) == bytes_of(before)


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_numbers_are_rounded_to_e4m3_as_torch_rounds_them(step: int) -> None:
    """All numbers of E4M3, the midpoints between them, and the float32 numbers next to both."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([463.0])))
    values = (exact.view(torch.int32) + step * (exact != 0)).view(torch.float32)
    for signed in (values, -values):
        rounded = torch.from_numpy(round_to_e4m3(signed.numpy())).view(torch.float8_e4m3fn)

        assert torch.equal(rounded.view(torch.uint8), signed.to(torch.float8_e4m3fn).view(torch.uint8))


def test_the_largest_number_of_e4m3_stands_for_larger_ones() -> None:
    assert round_to_e4m3(np.array([480, -1e30, np.inf, np.nan], np.float32)).tolist() == [0x7E, 0xFE, 0x7E, 0x7F]


def test_exact_powers_does_not_import_torch() -> None:
    """Probes run before any heavy package is imported."""
    done = run_python(
        """
        import sys
        from trtllm_ct.layouts.e4m3 import exact_powers

        print(exact_powers(b"8"), sorted({"torch", "numpy", "numba"} & set(sys.modules)))
        """
    )

    assert done.stdout.strip() == "(-9, 8) []"

"""Which powers of two E4M3 scales can be shifted by: held to the definition of the format, number by number."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from float_modules import number
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.base.schemes import Element
from trtllm_ct.layouts.e4m3 import ANY_POWER, exact_powers, shift_scale

NUMBERS = {byte: number(byte, Element.E4M3) for byte in range(256)}
BYTES = {value: byte for byte, value in NUMBERS.items() if value is not None and byte < 0x80}
NAN, MINUS_NAN, MINUS_ZERO = 0x7F, 0xFF, 0x80
POWERS = range(-40, 41)


def shifted(byte: int, power: int) -> int | None:
    """The byte of a number times 2^power by the definition of the format, or None where there is none."""
    value = NUMBERS[byte]
    if value is None:
        return None
    size = BYTES.get(abs(value) * Fraction(2) ** power)
    return None if size is None else size | byte & 0x80


def as_scale(data: bytes, *shape: int) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8).view(torch.float8_e4m3fn).view(shape or (-1,))


def octets(scale: torch.Tensor) -> bytes:
    return bytes(scale.view(torch.uint8).flatten().tolist())


class TestExactPowers:
    @pytest.mark.parametrize("byte", sorted(set(BYTES.values()) - {0}))
    def test_they_are_all_powers_under_which_a_number_stays_one(self, byte: int) -> None:
        """Its negative has the same ones, and there is no gap between the least and the largest."""
        exact = [power for power in POWERS if shifted(byte, power) is not None]

        least, most = exact_powers(bytes([byte]))

        assert list(range(least, most + 1)) == exact
        assert exact_powers(bytes([byte | 0x80])) == (least, most)

    @pytest.mark.parametrize(
        ("number_", "powers"),
        [(448.0, (-15, 0)), (1.0, (-9, 8)), (2.0**-9, (0, 17)), (2.0**-6, (-3, 14)), (1.125, (-6, 8))],
    )
    def test_well_known_ones(self, number_: float, powers: tuple[int, int]) -> None:
        """The largest number, one, the smallest subnormal and normal ones, and one that needs the whole mantissa."""
        assert exact_powers(bytes([BYTES[Fraction(number_)]])) == powers

    @pytest.mark.parametrize(
        "data",
        [b"", b"\0", b"\x80", b"\0\x80\0", bytes([NAN]), bytes([MINUS_NAN, 0])],
        ids=["none", "zero", "minus zero", "zeros", "nan", "minus nan"],
    )
    def test_any_power_fits_zeros_and_what_no_power_fits(self, data: bytes) -> None:
        """NaN is left to the checks of the payload; more powers than float32 has must be allowed."""
        assert exact_powers(data) == ANY_POWER
        assert ANY_POWER[0] < -277
        assert ANY_POWER[1] > 277

    @given(data=st.binary(max_size=40))
    def test_those_of_several_are_what_all_of_them_have_in_common(self, data: bytes) -> None:
        """Never an empty range: 0 is always in it."""
        own = [
            {power for power in POWERS if shifted(byte, power) is not None}
            for byte in data
            if NUMBERS[byte] is not None
        ]

        least, most = exact_powers(data)

        assert least <= 0 <= most
        assert {power for power in POWERS if least <= power <= most} == set(POWERS).intersection(*own)


class TestShiftScale:
    @pytest.mark.parametrize("power", [*range(-19, 20), -40, 40])
    def test_each_number_gets_its_byte_or_is_refused(self, power: int) -> None:
        """Signs stay, that of zero too; NaN has no number."""
        for byte in range(256):
            found = shift_scale(as_scale(bytes([byte])), power)

            assert (None if found is None else octets(found)[0]) == shifted(byte, power), byte

    @settings(max_examples=60, deadline=None)
    @given(data=st.binary(min_size=1, max_size=20), power=st.integers(-18, 18))
    def test_one_number_that_has_none_refuses_them_all(self, data: bytes, power: int) -> None:
        want = [shifted(byte, power) for byte in data]

        found = shift_scale(as_scale(data), power)

        assert (None if found is None else list(octets(found))) == (None if None in want else want)

    @given(data=st.binary(max_size=20).map(lambda data: bytes(byte for byte in data if byte & 0x7F != NAN)))
    @settings(max_examples=40, deadline=None)
    def test_it_does_what_exact_powers_promise(self, data: bytes) -> None:
        """At both ends, and no further; and it can be taken back."""
        least, most = exact_powers(data)
        scale = as_scale(data)
        for power in (least, most):
            there = shift_scale(scale, power)
            assert there is not None
            back = shift_scale(there, -power)
            assert back is not None
            assert octets(back) == data
        if (least, most) != ANY_POWER:
            assert shift_scale(scale, least - 1) is None
            assert shift_scale(scale, most + 1) is None

    @pytest.mark.parametrize("power", [*ANY_POWER, -300, -150, 127, 128, 256, 300])
    def test_powers_beyond_float32_leave_zeros_and_refuse_the_rest(self, power: int) -> None:
        """In particular infinity times zero never shows."""
        zeros = as_scale(bytes([0, MINUS_ZERO]))

        found = shift_scale(zeros, power)

        assert found is not None
        assert octets(found) == octets(zeros)
        for byte in (1, 0x38, 0x7E):
            assert shift_scale(as_scale(bytes([0, byte])), power) is None

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (2, 3, 2)], ids=str)
    def test_any_shape_and_the_input_stays(self, shape: tuple[int, ...]) -> None:
        scale = torch.full(shape, 1.5).to(torch.float8_e4m3fn)
        before = scale.clone()

        found = shift_scale(scale, -2)

        assert found is not None
        assert (found.dtype, found.shape) == (torch.float8_e4m3fn, shape)
        assert octets(found) == bytes([BYTES[Fraction(3, 8)]]) * math.prod(shape)
        assert octets(scale) == octets(before)


def test_what_the_bytes_say_is_known_without_torch() -> None:
    """Probes run before anything heavy is imported."""
    done = run_python(
        """
        import sys
        from trtllm_ct.layouts.e4m3 import exact_powers

        print(exact_powers(b"8"), sorted({"torch", "numpy", "numba"} & set(sys.modules)))
        """
    )

    assert done.stdout.strip() == "(-9, 8) []"

"""The comparisons that verification uses: what passes, what fails, and the reported position of the worst element."""

from __future__ import annotations

import json
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_tensors import on_tensors
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts import rounding as rounding_layout
from trtllm_ct.verify.comparison import Comparison, compare_native, compare_numbers, compare_rounded, equal_bits

round_once = on_tensors(rounding_layout.round_once)

WIDE = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def native(got: Tensor, want: Tensor) -> Comparison:
    return compare_native(got.numpy(), want.numpy())


def rounded(got: Tensor, exact: Tensor, uncertainty: float = 0.0) -> Comparison:
    dtype = DType.from_torch(got.dtype)
    return compare_rounded(got.double().numpy(), exact.double().numpy(), dtype, uncertainty=uncertainty)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changed(values: Tensor, position: tuple[int, ...], value: float) -> Tensor:
    values = values.clone()
    values[position] = value
    return values


class TestNative:
    def test_equal_weights_are_good(self):
        comparison = native(random(4, 256), random(4, 256))

        assert comparison.good
        assert (comparison.error, comparison.differing) == (0.0, 0)

    @pytest.mark.parametrize(("off", "good"), [(0.9e-6, True), (1.1e-6, False)])
    def test_the_tolerance_is_a_millionth_of_the_largest_value_of_the_row(self, off: float, good: bool):
        want = torch.zeros(2, 8, dtype=torch.float64)
        want[0, 0], want[1, 0] = 1000.0, 2.0

        comparison = native(changed(want, (1, 5), 2 * off), want)

        assert comparison.good is good
        assert comparison.error == pytest.approx(off)
        assert comparison.position == (1, 5)

    @settings(max_examples=25)
    @given(st.integers(0, 3), st.integers(0, 299), st.sampled_from([nan, inf, -inf, 1e3]))
    def test_the_worst_element_is_found_wherever_it_is(self, row: int, column: int, value: float):
        """A NaN is found too, although another element differs as well."""
        want = random(4, 300)
        got = changed(want, (0, 0), float(want[0, 0]) + 1e-3)

        comparison = native(changed(got, (row, column), value), want)

        assert not comparison.good
        assert comparison.position == (row, column)
        assert comparison.block == f"row {row}, columns {column // 128 * 128}-{column // 128 * 128 + 127}"
        assert comparison.want == float(want[row, column])
        assert str(comparison.got) == str(value)
        assert comparison.error > 1

    @pytest.mark.parametrize("value", [nan, inf])
    def test_nan_and_inf_in_the_source_never_pass(self, value: float):
        odd = changed(random(2, 8), (1, 1), value)

        assert not native(odd, odd.clone()).good

    def test_a_row_of_zeros_allows_no_difference(self):
        want = torch.zeros(2, 8, dtype=torch.float64)

        assert native(want.clone(), want).good
        comparison = native(changed(want, (1, 3), 1e-300), want)
        assert not comparison.good
        assert (comparison.error, comparison.position, comparison.differing) == (inf, (1, 3), 1)

    def test_differing_counts_what_is_beyond_the_tolerance(self):
        want = random(3, 64)
        got = want.clone()
        got[0, :5] += 1
        got[1, :5] += 1e-9

        assert native(got, want).differing == 5


class TestNumbers:
    @pytest.mark.parametrize("value", [nan, inf, -inf, 0.0])
    def test_the_same_value_at_the_same_place_is_equal(self, value: float):
        odd = changed(random(2, 8), (1, 1), value)

        found = compare_numbers(odd.numpy(), odd.clone().numpy())

        assert (found.good, found.error, found.differing) == (True, 0.0, 0)

    @pytest.mark.parametrize(("got", "want"), [(nan, 1.0), (1.0, nan), (inf, -inf), (nan, inf), (inf, 1.0), (1.0, inf)])
    def test_other_values_are_infinitely_far(self, got: float, want: float):
        values = random(2, 8)

        found = compare_numbers(changed(values, (1, 1), got).numpy(), changed(values, (1, 1), want).numpy())

        assert (found.good, found.error, found.differing, found.position) == (False, inf, 1, (1, 1))

    @pytest.mark.parametrize("value", [nan, inf])
    def test_they_hide_no_difference_in_their_row(self, value: float):
        want = changed(torch.ones(2, 8, dtype=torch.float64), (1, 1), value)

        found = compare_numbers(changed(want, (1, 4), 1.5).numpy(), want.numpy())

        assert (found.good, found.error, found.differing, found.position) == (False, 0.5, 1, (1, 4))

    @pytest.mark.parametrize("value", [nan, inf])
    def test_a_scalar_has_no_row(self, value: float):
        scalar = torch.tensor(value, dtype=torch.float64)

        assert compare_numbers(scalar.numpy(), scalar.numpy()).error == 0
        assert compare_numbers(torch.tensor(1.0).double().numpy(), scalar.numpy()).error == inf


class TestRounded:
    @pytest.mark.parametrize("dtype", WIDE)
    def test_the_exact_value_rounded_once_is_good(self, dtype: torch.dtype):
        exact = random(8, 64)

        comparison = rounded(round_once(exact, dtype), exact)

        assert (comparison.good, comparison.error) == (True, 0.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_one_unit_in_the_last_place_is_bad(self, dtype: torch.dtype):
        exact = random(8, 64)
        integer = torch.int32 if dtype is torch.float32 else torch.int16
        got = round_once(exact, dtype)
        got.view(integer)[6, 60] += 1

        comparison = rounded(got, exact)

        assert not comparison.good
        assert (comparison.position, comparison.differing) == ((6, 60), 1)
        assert comparison.want == float(round_once(exact, dtype)[6, 60])

    def test_a_value_that_was_rounded_twice_is_bad(self):
        """1 + 2^-8 + 2^-40 is just above the midpoint of two bfloat16; rounding to float32 first gives the midpoint."""
        exact = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)

        assert rounded(torch.tensor([1 + 2.0**-7]).bfloat16(), exact).good
        assert not rounded(exact.float().bfloat16(), exact).good

    def test_nan_in_both_places_is_the_same_value(self):
        exact = changed(random(2, 4), (0, 1), nan)

        assert rounded(exact.bfloat16(), exact).good
        comparison = rounded(changed(exact, (1, 2), nan).bfloat16(), exact)
        assert (comparison.good, comparison.error, comparison.position) == (False, inf, (1, 2))

    @pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4)])
    def test_tensors_of_any_rank(self, shape: tuple[int, ...]):
        exact = random(*shape)
        comparison = rounded(exact.float() + 1, exact)

        assert not comparison.good
        assert comparison.block == f"element {list(comparison.position)}"
        assert len(comparison.position) == len(shape)

    @pytest.mark.parametrize("shape", [(0,), (0, 4)])
    def test_no_elements_are_equal(self, shape: tuple[int, ...]):
        comparison = rounded(torch.zeros(shape), torch.zeros(shape, dtype=torch.float64))

        assert (comparison.good, comparison.position) == (True, ())


class TestParts:
    """A tensor is compared in parts; the whole is as if it had been compared at once."""

    @pytest.mark.parametrize("worst", [(0, 0), (1, 7), (5, 2), (8, 7)])
    def test_parts_join_to_the_whole(self, worst: tuple[int, int]):
        want = random(9, 8)
        got = changed(changed(want, (4, 4), float(want[4, 4]) + 1e-3), worst, 1e3)

        parts = [native(got[first : first + 4], want[first : first + 4]).below(first) for first in (0, 4, 8)]

        assert parts[0].joined(parts[1]).joined(parts[2]) == native(got, want)

    def test_the_first_of_equal_errors_counts(self):
        parts = [native(torch.full((1, 2), 3.0).double(), torch.ones(1, 2).double()).below(row) for row in (0, 1)]

        assert parts[0].joined(parts[1]).position == (0, 0)
        assert parts[0].joined(parts[1]).differing == 4

    def test_equal_bits_are_equal_though_they_are_nan(self):
        bits = torch.tensor([[nan, 1.0]]).bfloat16().view(torch.int16).numpy()

        comparison = equal_bits(bits, bits.copy(), DType.BF16)

        assert comparison is not None
        assert comparison.good
        assert equal_bits(bits, bits ^ 1, DType.BF16) is None


def test_json_has_strings_for_nan_and_inf() -> None:
    comparison = native(changed(random(1, 4), (0, 2), nan), random(1, 4))

    document = comparison.to_dict()

    assert (document["got"], document["error"], document["position"]) == ("nan", "inf", [0, 2])
    assert json.loads(json.dumps(document, allow_nan=False)) == document


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
def test_tensors_without_elements_are_equal(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape).numpy()

    comparison = equal_bits(empty, empty.copy(), DType.F32)

    assert comparison is not None
    assert comparison.good
    assert comparison.position == ()

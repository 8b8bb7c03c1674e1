"""One scalar for the parts of a fused Linear: without changing any value, or not at all.

Group scales are the numbers of E4M3 from a table made here; that a shift loses nothing is shown with fractions.
"""

from __future__ import annotations

from ctypes import c_float
from fractions import Fraction
from itertools import permutations
from math import log2
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from quantized_weights import NVFP4, NVFP4_INPUT, ints
from stored_weights import described

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import QuantScheme, TensorSpec
from trtllm_ct.formats.nvfp4 import NVFP4 as NVFP4_FORMAT
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.layouts.e4m3 import exact_powers
from trtllm_ct.plan.equalize import Part, Replaced, equalize, powers_of_two_apart
from trtllm_ct.plan.models.sites import Site
from trtllm_ct.plan.probe import NO_PROBE, Probe
from trtllm_ct.plan.stored import StoredModule, Whole
from trtllm_ct.plan.weights import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.plan.equalize import Equalized

NAN, INFINITE = float("nan"), float("inf")
LINEAR = "model.layers.0.self_attn.qkv_proj"
EXPERT = "model.layers.0.mlp.experts.3.gate_up"
WEIGHT, INPUT, SCALE = "weight_global_scale", "input_global_scale", "weight_scale"

E4M3 = [(byte & 7) * Fraction(2) ** -9 for byte in range(8)]
E4M3 += [((byte & 7) + 8) * Fraction(2) ** ((byte >> 3) - 10) for byte in range(8, 0x7F)]
"""The numbers that are not negative, by their byte."""
NUMBERS = frozenset(E4M3)

SPECS = {
    "weight_packed": TensorSpec(DType.U8, (16, 8)),
    SCALE: TensorSpec(DType.F8_E4M3, (16, 1)),
    WEIGHT: TensorSpec(DType.F32, (1,)),
}
INT4 = {"weight_packed": TensorSpec(DType.I32, (16, 2)), SCALE: TensorSpec(DType.BF16, (16, 1))}
QUANTIZED = described(NVFP4_FORMAT, NVFP4, SPECS)


def parts(count: int, linear: str | None = LINEAR, inputs: QuantArgs | None = NVFP4_INPUT) -> list[Part]:
    """Members of one Linear, called `p0`, `p1` and so on; experts where it is a part of one."""
    weight = QuantizedWeight(stored=QUANTIZED, scheme=QuantScheme(weights=NVFP4, input_activations=inputs), group="g")
    owner, found = linear or LINEAR, []
    for name in [f"{owner.rpartition('.')[0]}.p{i}" for i in range(count)]:
        specs = {**SPECS, INPUT: SPECS[WEIGHT]}
        views = {local: Whole(name=f"{name}.{local}", spec=spec) for local, spec in specs.items()}
        site = Site(module=name, class_name="Linear", shape=(16, 16), shares=linear, expert=".experts." in owner)
        found.append(Part(site, StoredModule(name, views), weight))
    return found


def probe(
    members: Sequence[Part],
    weights: Sequence[float | None],
    inputs: Sequence[float | None] = (),
    scales: Sequence[bytes] = (),
) -> Probe:
    """Return a probe with the values of these members; None stands for a value that was not read."""
    scalars = {
        f"{part.site.module}.{local}": value
        for local, values in ((WEIGHT, weights), (INPUT, inputs or [1.0] * len(members)))
        for part, value in zip(members, values, strict=True)
        if value is not None
    }
    powers = {f"{part.site.module}.{SCALE}": exact_powers(own) for part, own in zip(members, scales, strict=False)}
    return Probe(scalars=scalars, powers=powers)


def equalized(
    weights: Sequence[float | None],
    inputs: Sequence[float | None] = (),
    scales: Sequence[bytes] = (),
    linear: str = LINEAR,
) -> list[Equalized | None]:
    """Return the replacement of each member, None if it keeps its scalars."""
    members = parts(len(weights), linear)
    found = equalize(members, probe(members, weights, inputs, scales))
    assert found.keys() <= {part.site.module for part in members}
    return [found.get(part.site.module) for part in members]


def fits(scales: bytes, power: int) -> bool:
    return all(E4M3[byte] * Fraction(2) ** power in NUMBERS for byte in scales)


ONE, SMALLEST, LARGEST = b"\x38", b"\x01", b"\x7e"
"""Group scales: 1, which can be shifted both ways, and others that can only be shifted up or down."""
SCALES = st.lists(st.integers(0, 0x7E), min_size=1, max_size=3).map(bytes)


class TestPowersOfTwo:
    @given(
        mantissa=st.floats(1, 1.75, width=32),
        powers=st.lists(st.integers(-20, 20), max_size=4),
        zeros=st.integers(0, 2),
    )
    def test_numbers_that_are_powers_of_two_apart_and_differ(
        self, mantissa: float, powers: list[int], zeros: int
    ) -> None:
        numbers = [mantissa * 2.0**power for power in powers]

        assert powers_of_two_apart([*numbers, *[0.0] * zeros]) is (len(set(powers)) > 1)
        assert not powers_of_two_apart([*numbers, mantissa * 1.125])

    @pytest.mark.parametrize("numbers", [[], [0.0], [0.0, 0.0], [3.0], [3.0, 3.0], [0.0, 3.0], [1.0, 3.0]])
    def test_numbers_that_are_equal_or_differ_otherwise(self, numbers: list[float]) -> None:
        assert not powers_of_two_apart(numbers)

    @given(stored=st.floats(2.0**-100, 2.0**100, width=32), power=st.integers(-20, 20))
    def test_a_replacement_knows_its_power(self, stored: float, power: int) -> None:
        assert Replaced(stored=stored, shared=stored * 2.0**power).power == power
        assert Replaced(stored=0.0, shared=stored).power == 0


class TestWeights:
    @settings(max_examples=80, deadline=None)
    @given(members=st.lists(st.tuples(st.integers(-5, 5), SCALES), min_size=1, max_size=3))
    def test_a_common_scalar_changes_no_value_and_as_few_parts_as_possible(
        self, members: list[tuple[int, bytes]]
    ) -> None:
        """The chosen scalar is compared with all possible ones."""
        own, scales = [2000 * 2.0**exponent for exponent, _ in members], [each for _, each in members]
        tried = [2000 * 2.0**exponent for exponent in range(-40, 40)]
        common = [
            scalar
            for scalar in tried
            if all(fits(each, round(log2(scalar / mine))) for mine, each in zip(own, scales, strict=True))
        ]

        found = equalized(own, scales=scales)

        if not common:
            assert all(each and WEIGHT in each.obstacle and each.weight is None for each in found)
            return
        taken = [each.weight if each else None for each in found]
        (scalar,) = {each.shared if each else mine for each, mine in zip(taken, own, strict=True)}
        assert scalar in common
        assert sum(map(bool, taken)) == min(sum(mine != other for mine in own) for other in common)
        for mine, each, codes in zip(own, taken, scales, strict=True):
            shifted = [E4M3[byte] * Fraction(2) ** (each.power if each else 0) for byte in codes]
            assert [number / Fraction(scalar) for number in shifted] == [E4M3[byte] / Fraction(mine) for byte in codes]

    def test_the_order_of_the_parts_does_not_matter(self) -> None:
        members = parts(3)
        told = probe(members, [8.0, 2.0, 4.0], scales=[ONE, ONE, ONE])
        first = equalize(members, told)

        assert first
        assert all(equalize(order, told) == first for order in permutations(members))

    def test_a_part_that_changes_has_a_reason(self) -> None:
        first, second = equalized([4.0, 8.0], scales=[ONE, SMALLEST])

        assert second is None
        assert first is not None
        assert first.weight == Replaced(stored=4.0, shared=8.0)
        assert first.reason == "group scales times a power of two, so that qkv_proj has one scalar"
        assert (first.note, first.obstacle) == ("", "")

    @pytest.mark.parametrize("scales", [(), (SMALLEST + LARGEST,) * 2], ids=["not probed", "of the whole range"])
    def test_scales_that_can_not_be_shifted_are_an_obstacle(self, scales: Sequence[bytes]) -> None:
        found = equalized([4.0, 8.0], scales=scales)

        words = "weight_global_scale is 4 in p0 and 8 in p1, and E4M3 group scales can't take up the difference"
        assert [each.obstacle if each else "" for each in found] == 2 * [
            f"the parts of qkv_proj share no scalar: {words}"
        ]

    def test_scalars_that_differ_otherwise_are_an_obstacle_for_all_parts_and_named(self) -> None:
        found = equalized([4.0, 8.0, 6.5], scales=[ONE] * 3)

        assert [each.obstacle if each else "" for each in found] == 3 * [
            (
                "the parts of qkv_proj share no scalar: weight_global_scale is 4 in p0 and 6.5 in p2, "
                "which do not differ by a power of two"
            )
        ]

    @pytest.mark.parametrize(("apart", "equal"), [(0, True), (1, False), (4, False)])
    def test_scalars_are_equal_bit_for_bit_or_not_at_all(self, apart: int, equal: bool) -> None:
        """A release of early 2026 asserts exact equality: one unit in the last place makes it raise."""
        assert (equalized([1100.0, 1100.0 + apart * 2.0**-13]) == [None, None]) is equal

    def test_divisors_with_one_multiplier_are_equal(self) -> None:
        """The engine compares what is delivered: 1 / divisor, rounded to float32."""
        divisors = [2002.0, 2002.0 + 2.0**-13]
        assert len({c_float(1 / divisor).value for divisor in divisors}) == 1
        assert equalized(divisors) == [None, None]

    @pytest.mark.parametrize("bad", [NAN, INFINITE, -4.0, 0.0, None], ids=str)
    def test_nothing_is_decided_from_scalars_that_are_refused_later_or_were_not_read(self, bad: float | None) -> None:
        assert equalized([4.0, bad], scales=[ONE, ONE]) == [None, None]
        assert equalized([4.0, 4.0], inputs=[3.0, bad]) == [None, None]


class TestWhoShares:
    def test_each_linear_is_decided_for_itself(self) -> None:
        first, second = parts(2), parts(2, EXPERT)
        told = [probe(first, [4.0, 8.0], scales=[ONE, ONE]), probe(second, [16.0, 16.0], scales=[ONE, ONE])]
        both = Probe(scalars={**told[0].scalars, **told[1].scalars}, powers={**told[0].powers, **told[1].powers})

        found = equalize([first[0], second[0], first[1], second[1]], both)

        assert found == equalize(first, told[0])
        assert found.keys() <= {part.site.module for part in first}

    def test_a_linear_that_is_not_fused_keeps_its_scalar(self) -> None:
        alone = parts(2, None)

        assert equalize(alone, probe(alone, [4.0, 6.5])) == {}

    def test_weights_without_a_global_scale_are_unchanged(self) -> None:
        weight = QuantizedWeight(stored=described(PACKED_INT, ints(4), INT4), scheme=QuantScheme(), group="g")
        members = [part._replace(weight=weight) for part in parts(2)]

        assert equalize(members, probe(members, [4.0, 6.5])) == {}

    def test_without_a_probe_nothing_is_decided(self) -> None:
        assert equalize(parts(3), NO_PROBE) == {}


class TestInputs:
    def test_take_the_largest_scale_which_is_the_smallest_divisor(self) -> None:
        """Their group scales are computed at run time, and under another one they might be cut off."""
        first, second, third = equalized([4.0] * 3, inputs=[96.0, 12.0, 24.0])

        assert second is None
        assert first is not None
        assert third is not None
        assert (first.input, third.input) == (Replaced(stored=96.0, shared=12.0), Replaced(stored=24.0, shared=12.0))
        assert first.weight is None
        assert first.reason == ""
        assert first.note == "the input scale is the largest of qkv_proj, a power of two above its own"

    def test_change_beside_weights(self) -> None:
        first, second = equalized([4.0, 8.0], inputs=[6.0, 3.0], scales=[ONE, SMALLEST])

        assert second is None
        assert first is not None
        assert (first.weight, first.input) == (Replaced(stored=4.0, shared=8.0), Replaced(stored=6.0, shared=3.0))
        assert first.reason
        assert first.note

    def test_scalars_that_differ_otherwise_are_an_obstacle(self) -> None:
        found = equalized([4.0, 4.0], inputs=[3.0, 5.0])

        assert {each.obstacle for each in found if each} == {
            (
                "the parts of qkv_proj share no scalar: input_global_scale is 3 in p0 and 5 in p1, "
                "which do not differ by a power of two"
            )
        }

    def test_of_two_obstacles_the_one_of_the_weight_is_reported(self) -> None:
        assert all(each and WEIGHT in each.obstacle for each in equalized([4.0, 6.5], inputs=[3.0, 5.0]))

    def test_do_not_matter_if_activations_stay_16_bit(self) -> None:
        members = parts(2, inputs=None)

        assert equalize(members, probe(members, [4.0, 4.0], inputs=[3.0, 5.0])) == {}


class TestExpertsWithoutCalibration:
    """A global scale of 0 means that the weight is zero, which it is under any scalar."""

    @pytest.mark.parametrize(("weights", "shared"), [([0.0, 5.0], 5.0), ([0.0, 2.0, 8.0], 8.0), ([0.0, 3.0, 0.0], 3.0)])
    def test_take_the_scalar_of_the_others(self, weights: list[float], shared: float) -> None:
        found = equalized(weights, scales=[ONE, ONE, SMALLEST], linear=EXPERT)

        for stored, member in zip(weights, found, strict=True):
            if stored == shared:
                assert member is None
                continue
            assert member is not None
            assert member.weight == Replaced(stored=stored, shared=shared)
            reason = "calibration never reached it" if stored == 0 else "group scales times a power"
            assert member.reason.startswith(reason)
            assert "scalar of gate_up" in member.reason or stored != 0

    @pytest.mark.parametrize("unreached", [0.0, INFINITE])
    def test_get_the_shared_input_scale_too(self, unreached: float) -> None:
        first, second = equalized([4.0, 4.0], inputs=[unreached, 3.0], linear=EXPERT)

        assert second is None
        assert first is not None
        assert (first.input, first.note, first.reason) == (Replaced(stored=unreached, shared=3.0), "", "")

    @pytest.mark.parametrize("unreached", [0.0, INFINITE])
    def test_are_unchanged_if_no_part_has_a_scalar(self, unreached: float) -> None:
        assert equalized([0.0, 0.0], inputs=[unreached] * 2, linear=EXPERT) == [None, None]

    def test_nothing_is_decided_from_an_infinite_scale_of_a_weight(self) -> None:
        assert equalized([INFINITE, 4.0], linear=EXPERT) == [None, None]

    def test_obstacles_name_the_expert_and_parts_that_have_one(self) -> None:
        (found, *_) = equalized([0.0, 4.0, 6.5], scales=[ONE] * 3, linear=EXPERT)

        assert found is not None
        assert found.obstacle == (
            "the parts of expert 3 share no scalar: weight_global_scale is 4 in p1 and 6.5 in p2, "
            "which do not differ by a power of two"
        )

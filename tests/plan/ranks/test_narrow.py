"""Plans of some rows of a weight: together they deliver the whole weight, and each reads only its rows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING, ClassVar
from unittest.mock import Mock

import hypothesis.strategies as st
import oracles
import pytest
import torch
from hypothesis import given, settings
from planned_modules import PADDED, delivered, plain_module, planned, raw_bytes

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import PayloadError
from trtllm_ct.base.schemes import Element, TensorSpec
from trtllm_ct.engine.requantization import FORMS
from trtllm_ct.formats.marlin_24 import MARLIN_24
from trtllm_ct.layouts.folds import Fold
from trtllm_ct.layouts.packing import packed_words
from trtllm_ct.plan import requantize_ops
from trtllm_ct.plan.ops import FoldTransform, Repack
from trtllm_ct.plan.plan import Delivery
from trtllm_ct.plan.ranks.narrow import can_narrow, narrow, row_unit, weight_rows, weight_rows_per_row
from trtllm_ct.plan.requantize_ops import RoundedCodes, RoundedScale
from trtllm_ct.plan.stored import Whole

if TYPE_CHECKING:
    from planned_modules import Planned
    from torch import Tensor

    from trtllm_ct.plan.plan import ModulePlan

# Each way of storing codes, scales and zero points.
KINDS = (
    "int4-g32",
    "int4-g64-asym",
    "int4-channel-asym",
    "int4-tensor-asym",
    "int4-plain-g64",
    "int4-g64-actorder",
    "int3-g64-asym",
    PADDED,
    "int8-channel-asym",
    "int8-plain-channel-asym",
    "w8a8-static-asym",
    "fp8-tensor-static",
    "fp8-tensor-token",
    "fp8-channel-token",
    "fp8-block",
    "nvfp4",
    "mxfp4a16",
    "mxfp6a8",
    "mxfp8",
)
# What belongs to all rows alike.
SHARED = {
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_global_scale",
    "input_scale",
    "input_zero_point",
}


def both(name: str) -> list[Planned]:
    """Dequantized with rows that fill no word, and in its mode with sizes of its kernel; the last block is not full."""
    if name == "fp8-block":
        return [planned(name, (300, 128), native=native, bias=True) for native in (False, True)]
    return [planned(name, (37, 128), bias=True), planned(name, (128, 128), native=True, bias=True)]


@cache
def whole_bytes(name: str) -> list[dict[str, bytes]]:
    """Return the delivered tensors."""
    return [{local: raw_bytes(tensor) for local, tensor in delivered(*each).items()} for each in both(name)]


def some_rows(data: st.DataObject, plan: ModulePlan) -> list[tuple[int, int]]:
    """Return bounds of parts that make the whole; there are several, unless the rows can't be divided."""
    rows, unit = weight_rows(plan), row_unit(plan)
    starts = range(unit, rows, unit)
    inner = data.draw(st.sets(st.sampled_from(starts), min_size=1, max_size=3)) if starts else set()
    return list(pairwise([0, *sorted(inner), rows]))


class TestParts:
    @pytest.mark.parametrize("name", KINDS)
    @settings(max_examples=2, deadline=None)
    @given(data=st.data())
    def test_the_parts_together_deliver_the_whole_module(self, name: str, data: st.DataObject) -> None:
        for (plan, stored), whole in zip(both(name), whole_bytes(name), strict=True):
            announced = {delivery.name: delivery.spec for delivery in plan.deliveries}
            parts = [delivered(narrow(plan, *bounds), stored) for bounds in some_rows(data, plan)]
            for local, want in whole.items():
                of_parts = [raw_bytes(part[local]) for part in parts]
                if announced[local].numel == 1 or local == "m.pre_quant_scale":
                    assert set(of_parts) == {want}, local
                else:
                    assert b"".join(of_parts) == want, local

    @pytest.mark.parametrize("name", KINDS)
    def test_all_rows_deliver_the_whole_module(self, name: str) -> None:
        for (plan, stored), whole in zip(both(name), whole_bytes(name), strict=True):
            part = narrow(plan, 0, weight_rows(plan))

            assert part.deliveries == plan.deliveries
            assert part.runs == plan.runs
            assert {local: raw_bytes(tensor) for local, tensor in delivered(part, stored).items()} == whole

    @pytest.mark.parametrize("name", KINDS)
    @settings(max_examples=3, deadline=None)
    @given(data=st.data())
    def test_each_element_is_read_by_one_part(self, name: str, data: st.DataObject) -> None:
        """Except elements that belong to all rows, which every part reads."""
        for plan, _ in both(name):
            parts = [narrow(plan, *bounds) for bounds in some_rows(data, plan)]
            for local, view in plan.views.items():
                runs = [part.views[local].runs[0] for part in parts]
                if local in SHARED or (local.startswith("weight_") and view.spec.numel == 1):
                    assert runs == [view.runs[0]] * len(parts), local
                else:
                    inner = [run.begin for run in runs[1:]]
                    assert [run.begin for run in runs] == [0, *inner], local
                    assert [run.end for run in runs] == [*inner, view.spec.numel], local

    @pytest.mark.parametrize("name", ["int4-g32-asym", PADDED, "int8-channel-asym", "fp8-channel-token", "nvfp4"])
    def test_a_part_reads_only_its_rows(self, name: str) -> None:
        """All other bytes are 0xff: NaN as a scale, and a code of -1."""
        plan, stored = planned(name, (80, 128))
        part = narrow(plan, 40, 80)
        spoilt = {}
        for run in part.runs:
            tensor = stored[run.name]
            read = slice(run.begin * tensor.itemsize, (run.end or 0) * tensor.itemsize)
            raw = bytearray(b"\xff" * tensor.nbytes)
            raw[read] = raw_bytes(tensor)[read]
            spoilt[run.name] = torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape)

        assert raw_bytes(delivered(part, spoilt)["m.weight"]) == raw_bytes(delivered(plan, stored)["m.weight"][40:])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
    def test_a_bad_scale_is_refused_by_the_part_that_has_its_row(self, bad: float) -> None:
        plan, stored = planned("int8-channel", (16, 32))
        scale = stored["m.weight_scale"].clone()
        scale[5] = bad
        refused = []
        for begin in range(0, 16, 4):
            try:
                delivered(narrow(plan, begin, begin + 4), stored | {"m.weight_scale": scale})
            except PayloadError:
                refused.append(begin)

        assert refused == [4]

    def test_weight_shape_is_compared_with_the_shape_of_the_whole_weight(self) -> None:
        plan, stored = planned("int4-g32", (37, 64))
        part = narrow(plan, 8, 16)

        assert part.weight is not None
        assert (part.weight.shape, part.weight.part_of) == ((8, 64), (37, 64))
        wrong = stored | {"m.weight_shape": torch.tensor([8, 64])}
        with pytest.raises(PayloadError, match=r"weight_shape: expected \[37, 64\]"):
            delivered(part, wrong)

    def test_a_part_without_rows_reads_no_row(self) -> None:
        plan, _ = planned("fp8-channel-token", (16, 32), bias=True)

        part = narrow(plan, 0, 0)

        assert {local: view.spec.shape for local, view in part.views.items()} == {
            "weight": (0, 32),
            "weight_scale": (0, 1),
            "bias": (0,),
        }
        assert [delivery.spec.shape for delivery in part.deliveries] == [(0, 32), (0,)]

    @pytest.mark.parametrize("form", [(16,), (16, 1), (1, 16)], ids=str)
    def test_a_scale_per_row_may_be_on_any_axis(self, form: tuple[int, ...]) -> None:
        plan, stored = planned("fp8-channel-token", (16, 32))
        spec = TensorSpec(DType.BF16, form)
        shaped = replace(plan, views={**plan.views, "weight_scale": Whole(name="m.weight_scale", spec=spec)})
        scale = stored["m.weight_scale"].reshape(form)

        found = delivered(narrow(shaped, 4, 9), stored | {"m.weight_scale": scale})

        assert raw_bytes(found["m.weight"]) == raw_bytes(delivered(plan, stored)["m.weight"][4:9])


def without_packed_zeros(plan: ModulePlan, stored: dict[str, Tensor]) -> Planned:
    """The same weight with its zero points as plain int8."""
    assert plan.weight is not None
    assert plan.weight.zero_point_packing is not None
    name, shape = "m.weight_zero_point", plan.weight.scale_shape
    plain = torch.from_numpy(oracles.unpack(stored[name], plan.weight.zero_point_packing, shape)).to(torch.int8)
    views = {**plan.views, "weight_zero_point": Whole(name=name, spec=TensorSpec(DType.I8, shape))}
    weight = replace(plan.weight, zero_point_packing=None)
    return replace(plan, views=views, weight=weight), stored | {name: plain}


class TestRequantized:
    """Rows of a weight that is rounded to a form have the codes and scales that they have in the whole weight."""

    # The shape and dtype of scales for weights of 300 rows and 128 columns.
    SCALES: ClassVar = {
        "nvfp4": TensorSpec(DType.F8_E4M3, (300, 8)),
        "mxfp4": TensorSpec(DType.U8, (300, 4)),
        "fp8-block": TensorSpec(DType.F32, (3, 1)),
        "fp8": TensorSpec(DType.F32, (300,)),
    }

    @pytest.mark.parametrize("form", SCALES)
    @pytest.mark.parametrize(
        ("scheme", "plain_zeros", "rows_of_a_word"),
        [
            ("int4-g32", False, 1),
            ("int4-g32-asym", False, 8),
            ("int4-g32-asym", True, 1),
            ("int4-channel-asym", False, 8),
            ("int4-channel-asym", True, 1),
        ],
    )
    def test_the_parts_together_deliver_the_whole_module(
        self, form: str, scheme: str, plain_zeros: bool, rows_of_a_word: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan, stored = planned(scheme, (300, 128))
        plan, stored = without_packed_zeros(plan, stored) if plain_zeros else (plan, stored)
        codes = TensorSpec(DType.U8, (300, 64))
        if FORMS[form].element is not Element.E2M1:
            codes = TensorSpec(DType.F8_E4M3, (300, 128))
        operations = {
            "m.weight": RoundedCodes(result=codes, form=FORMS[form]),
            "m.weight_scale": RoundedScale(result=self.SCALES[form], form=FORMS[form]),
        }
        plan = replace(plan, deliveries=tuple(Delivery(name=name, operation=made) for name, made in operations.items()))
        by_values = Mock(side_effect=requantize_ops._to_form)
        monkeypatch.setattr(requantize_ops, "_to_form", by_values)

        unit = row_unit(plan)
        bounds = pairwise([0, unit, 299 // unit * unit, 300])
        whole, parts = delivered(plan, stored), [delivered(narrow(plan, *each), stored) for each in bounds]

        assert unit == lcm(FORMS[form].row_unit, rows_of_a_word)
        assert not by_values.called
        for name, tensor in whole.items():
            assert b"".join(raw_bytes(part[name]) for part in parts) == raw_bytes(tensor), name


class TestPlain:
    @pytest.mark.parametrize("dtype", [DType.F32, DType.F16], ids=lambda dtype: dtype.name)
    @pytest.mark.parametrize(("rows", "bounds"), [(5, (1, 3)), (5, (4, 5)), (1, (0, 1)), (5, (2, 2))])
    def test_weight_and_bias_have_the_same_rows(self, rows: int, bounds: tuple[int, int], dtype: DType) -> None:
        plan, stored = plain_module(rows, dtype)
        whole = delivered(plan, stored)

        part = delivered(narrow(plan, *bounds), stored)

        assert {local: raw_bytes(tensor) for local, tensor in part.items()} == {
            local: raw_bytes(tensor[slice(*bounds)]) for local, tensor in whole.items()
        }
        assert (weight_rows(plan), row_unit(plan)) == (rows, 1)

    def test_other_parameters_stay_whole(self) -> None:
        plan, _ = plain_module(4)
        view = Whole(name="m.k_scale", spec=TensorSpec(DType.F32, (4,)))

        part = narrow(replace(plan, views={**plan.views, "k_scale": view}), 0, 2)

        assert part.views["k_scale"] is view


class TestUnits:
    @pytest.mark.parametrize(
        ("name", "native", "unit"),
        [
            ("int8-channel", False, 1),
            ("int4-g64", False, 1),
            ("int4-tensor-asym", False, 1),
            ("int4-g64-asym", False, 8),
            ("int4-channel-asym", False, 8),
            ("int8-g64-asym", False, 4),
            ("int8-plain-channel-asym", False, 1),
            # 32 codes of three bits fill three words; of padded ones ten fill one.
            ("int3-g64-asym", False, 32),
            (PADDED, False, 10),
            ("fp8-block", False, 128),
            ("fp8-channel-token", True, 1),
            ("fp8-block", True, 128),
            ("nvfp4", True, 1),
            # A byte of the engine's int4 holds two rows.
            ("int4-g64", True, 2),
            ("int4-g64-asym", True, 8),
            ("int3-g64", True, 2),
            ("int8-channel", True, 1),
        ],
    )
    def test_are_multiples_of_a_word_a_block_and_a_delivered_byte(self, name: str, native: bool, unit: int) -> None:
        plan, _ = planned(name, (256, 128), native=native)

        assert row_unit(plan) == unit

    def test_words_and_delivered_bytes_must_both_be_whole(self) -> None:
        """Ten rows fill a padded word, 32 make whole bytes of a dense stream of 3 bits: 160 do both."""
        plan, _ = planned(PADDED, (320, 64))
        assert plan.weight is not None
        dense = replace(plan, weight=replace(plan.weight, zero_point_packing=packed_words(3, 0)))
        blocks = replace(plan.weight, args=replace(plan.weight.args, block_structure=(16, 16)))

        assert row_unit(dense) == 32
        assert row_unit(replace(plan, weight=blocks)) == 80

    @pytest.mark.parametrize(
        ("name", "rows"),
        [
            ("fp8-block", {"weight": 1, "weight_scale": 128}),
            ("int4-g64", {"weight": 2, "weight_scale": 1, "pre_quant_scale": 1}),
            ("int8-channel", {"weight": 1, "weight_scale": 1}),
            ("fp8-tensor-static", {"weight": 1, "weight_scale": 1, "input_scale": 1}),
        ],
    )
    def test_a_delivered_row_has_this_number_of_rows(self, name: str, rows: dict[str, int]) -> None:
        plan, _ = planned(name, (256, 256), native=True)

        found = {
            each.name.rpartition(".")[2]: weight_rows_per_row(each.operation, plan.weight) for each in plan.deliveries
        }
        assert found == rows

    def test_codes_that_are_packed_along_columns_have_single_rows(self) -> None:
        plan, _ = planned("int4-g64", (64, 64))
        words = packed_words(4)

        repacked = Repack(result=TensorSpec(DType.I32, words.packed_shape((64, 64))), packing=words)
        assert weight_rows_per_row(repacked, plan.weight) == 1


class TestWhatCanNotBeParted:
    def test_rows_in_tiles_can_not_be_selected(self) -> None:
        plan, _ = planned("int4-g64", (64, 64))
        assert plan.weight is not None

        assert can_narrow(plan)
        assert not can_narrow(replace(plan, weight=replace(plan.weight, axes=MARLIN_24.axes)))

    @pytest.mark.parametrize(("axes", "possible"), [((), True), ((1,), True), ((0,), False), ((1, 0), False)])
    def test_rows_that_a_transform_mixes_can_not_be_selected(self, axes: tuple[int, ...], possible: bool) -> None:
        plan, _ = plain_module(4)
        folds = tuple(
            Fold(matrix=f"R{axis}", permutation=None, axis=axis, transposed=False, normalized=True) for axis in axes
        )
        folded = FoldTransform(result=TensorSpec(DType.BF16, (4, 3)), folds=folds)

        assert can_narrow(plan)
        assert can_narrow(replace(plan, deliveries=(Delivery(name="m.weight", operation=folded),))) is possible


@pytest.mark.parametrize(
    "name", ["int4-g32", "int4-g32-asym", "int8-channel-asym", "int8-plain-channel-asym", "fp8-channel-token"]
)
def test_no_rows_of_a_module_are_an_empty_part(name: str) -> None:
    plan, stored = planned(name, (16, 64))

    parts = delivered(narrow(plan, 16, 16), stored)

    assert all(0 in part.shape for part in parts.values())
    assert parts

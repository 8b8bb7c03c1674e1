"""int4 weights are rounded by their codes where these give what their values would give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from on_tensors import NATIVE, Codes, arrays, encode

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.base.schemes import QuantArgs, Strategy, TensorSpec
from trtllm_ct.engine.requantization import FORMS
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.plan import requantize_ops
from trtllm_ct.plan.ops import ModuleTensors
from trtllm_ct.plan.requantize_ops import RoundedCodes, RoundedScale

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NVFP4 = FORMS["nvfp4"]
SHAPE = (6, 64)
CODES = RoundedCodes(result=TensorSpec(DType.U8, (6, 32)), form=NVFP4)
SCALES = RoundedScale(result=TensorSpec(DType.F8_E4M3, (6, 4)), form=NVFP4)


# How zero points are stored, of those that the format writes and plain ones.
STORED_ZEROS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "packed": lambda packed, _: packed,
    # Writers 0.9.4 to 0.10.2 add columns where rows don't fill the last word.
    "with more columns": lambda packed, _: torch.cat([packed, torch.full_like(packed, 0x12345678)], dim=1),
    "plain": lambda _, plain: plain,
    "in bfloat16": lambda _, plain: plain.bfloat16(),
}


def int4_module(
    scale: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    zero_point: int | Tensor | None = None,
    zeros: str = "packed",
    shape: tuple[int, int] = SHAPE,
) -> ModuleTensors:
    """A weight in groups; its scales are those given, else of an ordinary size, in bfloat16.

    Zero points are those given, or random ones of which the last is the one given.
    """
    torch.manual_seed(0)
    strategy = Strategy.CHANNEL if group_size is None else Strategy.GROUP
    args = QuantArgs(num_bits=bits, strategy=strategy, group_size=group_size, symmetric=zero_point is None)
    grid = (shape[0], 1 if group_size is None else -(-shape[1] // group_size))
    given = (torch.rand(grid) * 0.01 + 0.01).bfloat16() if scale is None else scale.expand(grid).contiguous()
    codes = Codes(
        values=torch.randint(-8, 8, shape, dtype=torch.int8),
        packing=INT8_PLAIN,
        shape=shape,
        scale=given,
        zero_point=None if zero_point is None else zero_points(grid, zero_point),
    )
    stored = encode(PACKED_INT, codes, args)
    if codes.zero_point is not None:
        stored["weight_zero_point"] = STORED_ZEROS[zeros](stored["weight_zero_point"], codes.zero_point)
    specs = {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()}
    weight = PACKED_INT.describe("lin", args, specs, shape, FaultCollector())
    return ModuleTensors(arrays(stored), weight, NATIVE.entry)


def zero_points(grid: tuple[int, int], given: int | Tensor) -> Tensor:
    """Zero points that differ by rows and groups, the last of them the one given; or those given."""
    if not isinstance(given, int):
        return given.to(torch.int8).expand(grid).contiguous()
    made = torch.randint(-8, 8, grid, dtype=torch.int8)
    made[-1, -1] = given
    return made


BY_CODES = ("int4_to_e2m1_groups", "int4_to_e2m1_exponents", "int4_to_e4m3_blocks")


@pytest.fixture
def from_codes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the words that were requantized without being dequantized."""
    seen: list[tuple[int, ...]] = []
    for name in BY_CODES:
        monkeypatch.setattr(requantize_ops, name, _spied(getattr(requantize_ops, name), seen))
    return seen


def _spied(real: Callable[..., object], seen: list[tuple[int, ...]]) -> Callable[..., object]:
    def spied(words: np.ndarray, *rest: object, **options: object) -> object:
        seen.append(words.shape)
        return real(words, *rest, **options)

    return spied


def small(count: int) -> Tensor:
    """Scales of which as many as that are small."""
    scale = torch.full((6, 2), 0.01)
    scale.view(-1)[:count] = 1e-4
    return scale.bfloat16()


ALL = frozenset({"nvfp4", "mxfp4", "fp8-block", "fp8"})


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize(
    ("module", "direct"),
    [
        pytest.param({}, ALL, id="groups of 32"),
        pytest.param({"group_size": 16}, ALL - {"mxfp4"}, id="groups of 16"),
        pytest.param({"group_size": None}, ALL, id="a scale for each row"),
        pytest.param({"scale": small(1)}, ALL, id="a small scale"),
        pytest.param({"scale": small(6)}, ALL, id="many small scales"),
        pytest.param({"group_size": 48}, frozenset(), id="a smaller group at the end of rows"),
        pytest.param({"group_size": 8}, frozenset(), id="groups of 8"),
        pytest.param({"bits": 8}, frozenset(), id="8 bits"),
        pytest.param({"zero_point": 3}, ALL, id="zero points"),
        pytest.param({"zero_point": -8, "group_size": None}, ALL, id="a zero point for each row"),
        pytest.param({"zero_point": 7, "zeros": "with more columns"}, ALL, id="zero points with more columns"),
        pytest.param({"zero_point": -8, "zeros": "plain"}, ALL, id="plain zero points"),
        pytest.param({"zero_point": 7, "zeros": "in bfloat16"}, ALL, id="zero points in bfloat16"),
        pytest.param({"zero_point": torch.tensor(0)}, ALL, id="zero points that are all 0"),
        pytest.param({"zero_point": 8, "zeros": "plain"}, frozenset(), id="a zero point above all codes"),
        pytest.param({"zero_point": -9, "zeros": "plain"}, frozenset(), id="a zero point below all codes"),
        pytest.param({"scale": torch.tensor(1.3125).bfloat16()}, ALL, id="the largest scale of NVFP4"),
        # A number may be 15 with zero points, though it is at most 8 with these: values are at most 10.5 in NVFP4.
        pytest.param(
            {"zero_point": torch.tensor(0), "scale": torch.tensor(179 / 256).bfloat16()},
            ALL,
            id="zero points, the largest scale of NVFP4",
        ),
        pytest.param(
            {"zero_point": torch.tensor(0), "scale": torch.tensor(180 / 256).bfloat16()},
            ALL - {"nvfp4"},
            id="zero points, larger scales",
        ),
        pytest.param({"scale": torch.tensor(0.01)}, frozenset(), id="scales in float32"),
        pytest.param({"scale": torch.tensor(0.01).half()}, frozenset(), id="scales in float16"),
        pytest.param({"scale": torch.tensor(-0.01).bfloat16()}, frozenset(), id="negative scales"),
    ],
)
def test_codes_and_scales_are_those_of_the_values(
    name: str,
    module: dict[str, object],
    direct: frozenset[str],
    from_codes: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = requantize_ops._round("lin.weight", int4_module(**module), FORMS[name])
    assert from_codes == ([(6, 8)] if name in direct else [])

    monkeypatch.setattr(requantize_ops, "_is_rounded_by_codes", lambda *_: False)
    by_values = requantize_ops._round("lin.weight", int4_module(**module), FORMS[name])
    for one, other in zip(found, by_values, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-block"])
@pytest.mark.parametrize("shape", [(0, 64), (4, 0)], ids=["no rows", "no columns"])
@pytest.mark.parametrize("group_size", [32, None], ids=["groups", "a scale for each row"])
@pytest.mark.parametrize("zeros", [None, "packed", "plain"], ids=["symmetric", "zero points", "plain zero points"])
def test_an_empty_weight_is_not_rounded_by_its_codes(
    name: str, shape: tuple[int, int], group_size: int | None, zeros: str | None, from_codes: list[tuple[int, ...]]
) -> None:
    with_zeros = {} if zeros is None else {"zero_point": torch.tensor(0), "zeros": zeros}
    module = int4_module(shape=shape, group_size=group_size, **with_zeros)

    assert not requantize_ops._is_rounded_by_codes(module, FORMS[name])
    assert not from_codes


@pytest.mark.parametrize("name", sorted(ALL - {"nvfp4"}))
@pytest.mark.parametrize("zero_point", [None, 3], ids=["symmetric", "zero points"])
def test_very_large_and_very_small_scales_are_dequantized(
    name: str, zero_point: int | None, from_codes: list[tuple[int, ...]]
) -> None:
    """Squared errors may be beyond the range of float32 there."""
    for scale in (2.0**41, 2.0**-41):
        module = int4_module(torch.tensor(scale).bfloat16(), zero_point=zero_point)
        requantize_ops._round("lin.weight", module, FORMS[name])

    assert not from_codes


@pytest.mark.parametrize("zero_point", [None, 3], ids=["symmetric", "zero points"])
def test_codes_and_scales_are_rounded_once_and_delivered_as_they_are(
    zero_point: int | None, from_codes: list[tuple[int, ...]]
) -> None:
    tensors = int4_module(zero_point=zero_point)
    codes, scales = requantize_ops._round("lin.weight", int4_module(zero_point=zero_point), NVFP4)
    from_codes.clear()

    assert np.array_equal(CODES.run("lin.weight", tensors).elements, codes)
    assert np.array_equal(SCALES.run("lin.weight_scale", tensors).elements, scales)
    assert len(from_codes) == 1


@pytest.mark.parametrize(
    ("scale", "found"),
    [(2.0, "14"), (float("nan"), "nan"), (float("inf"), "inf"), (2.0**-20, "7.62939e-06")],
    ids=["too large", "NaN", "infinite", "too small"],
)
@pytest.mark.parametrize("zero_point", [None, torch.tensor(0)], ids=["symmetric", "zero points"])
def test_what_values_are_refused_for_is_refused(
    scale: float, found: str, zero_point: Tensor | None, from_codes: list[tuple[int, ...]]
) -> None:
    module = int4_module(torch.tensor(scale).bfloat16(), zero_point=zero_point)

    with pytest.raises(PayloadError, match=r"lin\.weight") as caught:
        CODES.run("lin.weight", module)

    assert found in caught.value.faults[0].found
    assert not from_codes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_value_that_is_not_finite_is_refused_for_every_form(value: float) -> None:
    """Of two infinite values of both signs, whose sum is no number, too."""
    scale = torch.full((6, 2), 0.01)
    scale[4, 1] = value
    codes = RoundedCodes(result=TensorSpec(DType.F8_E4M3, SHAPE), form=FORMS["fp8-block"])

    with pytest.raises(PayloadError, match=r"lin\.weight\[4, 32\]"):
        codes.run("lin.weight", int4_module(scale.bfloat16()))

"""int4 weights become NVFP4 from their codes where their values would give the same, and only there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from on_tensors import NATIVE, Codes, arrays, encode

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.base.schemes import QuantArgs, Strategy, TensorSpec
from trtllm_ct.engine.requantization import FORMS, NVFP4_GLOBAL_SCALE
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.layouts.requantize import to_e2m1_groups
from trtllm_ct.plan import requantize_ops
from trtllm_ct.plan.ops import ModuleTensors
from trtllm_ct.plan.requantize_ops import RoundedCodes, RoundedScale

if TYPE_CHECKING:
    from torch import Tensor

NVFP4 = FORMS["nvfp4"]
SHAPE = (6, 64)
CODES = RoundedCodes(result=TensorSpec(DType.U8, (6, 32)), form=NVFP4)
SCALES = RoundedScale(result=TensorSpec(DType.F8_E4M3, (6, 4)), form=NVFP4)


def int4_module(
    scale: Tensor | None = None, *, bits: int = 4, group_size: int | None = 32, zero_point: int | None = None
) -> ModuleTensors:
    """A weight [6, 64] in groups; its scales are those given, else of an ordinary size, in bfloat16."""
    torch.manual_seed(0)
    strategy = Strategy.CHANNEL if group_size is None else Strategy.GROUP
    args = QuantArgs(num_bits=bits, strategy=strategy, group_size=group_size, symmetric=zero_point is None)
    grid = (SHAPE[0], 1 if group_size is None else SHAPE[1] // group_size)
    given = (torch.rand(grid) * 0.01 + 0.01).bfloat16() if scale is None else scale.expand(grid).contiguous()
    codes = Codes(
        values=torch.randint(-8, 8, SHAPE, dtype=torch.int8),
        packing=INT8_PLAIN,
        shape=SHAPE,
        scale=given,
        zero_point=None if zero_point is None else torch.full(grid, zero_point, dtype=torch.int8),
    )
    stored = encode(PACKED_INT, codes, args)
    specs = {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()}
    weight = PACKED_INT.describe("lin", args, specs, SHAPE, FaultCollector())
    return ModuleTensors(arrays(stored), weight, NATIVE.entry)


@pytest.fixture
def from_codes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the words that were requantized without being dequantized."""
    seen: list[tuple[int, ...]] = []
    real = requantize_ops.int4_to_e2m1_groups

    def spied(words: np.ndarray, *rest: object) -> object:
        seen.append(words.shape)
        return real(words, *rest)

    monkeypatch.setattr(requantize_ops, "int4_to_e2m1_groups", spied)
    return seen


def small(count: int) -> Tensor:
    """Scales of which as many as that are small."""
    scale = torch.full((6, 2), 0.01)
    scale.view(-1)[:count] = 1e-4
    return scale.bfloat16()


@pytest.mark.parametrize(
    ("module", "direct"),
    [
        pytest.param({}, True, id="groups of 32"),
        pytest.param({"group_size": 16}, True, id="groups of 16"),
        pytest.param({"group_size": None}, True, id="a scale for each row"),
        pytest.param({"scale": small(1)}, True, id="a small scale"),
        pytest.param({"scale": small(2)}, False, id="many small scales"),
        pytest.param({"group_size": 8}, False, id="groups of 8"),
        pytest.param({"bits": 8}, False, id="8 bits"),
        pytest.param({"zero_point": 3}, False, id="zero points"),
        pytest.param({"scale": torch.tensor(0.01)}, False, id="scales in float32"),
        pytest.param({"scale": torch.tensor(0.01).half()}, False, id="scales in float16"),
        pytest.param({"scale": torch.tensor(-0.01).bfloat16()}, False, id="negative scales"),
    ],
)
def test_codes_and_scales_are_those_of_the_values(
    module: dict[str, object], direct: bool, from_codes: list[tuple[int, ...]]
) -> None:
    tensors = int4_module(**module)
    pairs, scales = to_e2m1_groups(tensors.dequantize(DType.F32).elements, 16, NVFP4_GLOBAL_SCALE)

    assert np.array_equal(CODES.run("lin.weight", tensors).elements, pairs)
    assert np.array_equal(SCALES.run("lin.weight_scale", tensors).elements, scales)

    assert from_codes == ([(6, 8)] if direct else [])


@pytest.mark.parametrize(
    ("scale", "found"),
    [(2.0, "14"), (float("nan"), "nan"), (float("inf"), "inf"), (2.0**-20, "7.62939e-06")],
    ids=["too large", "NaN", "infinite", "too small"],
)
def test_what_values_are_refused_for_is_refused(scale: float, found: str, from_codes: list[tuple[int, ...]]) -> None:
    module = int4_module(torch.tensor(scale).bfloat16())

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

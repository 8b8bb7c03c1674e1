from __future__ import annotations

import math

import hypothesis.strategies as st
import oracles
import pytest
import torch
import torch_twins
from hypothesis import given, settings
from on_tensors import tensor_module

from trtllm_ct.layouts import rounding

round_once = tensor_module(rounding).round_once

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float32]
BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
INTEGERS = {16: torch.int16, 32: torch.int32}


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether all numbers are equal, with equal signs of zero; NaN equals NaN."""
    return torch.equal(got.isnan(), want.isnan()) and bool(
        ((got == want) & (got.signbit() == want.signbit()) | got.isnan()).all()
    )


@st.composite
def near_ties(draw: st.DrawFn, dtype: torch.dtype) -> float:
    """Draw the midpoint of two neighbouring numbers of a dtype, or a number very close to it."""
    bits = BITS[dtype]
    pattern = draw(st.integers(0, 2 ** (bits - 1) - 2))
    lower, upper = torch.tensor([pattern, pattern + 1]).to(INTEGERS[bits]).view(dtype).double().tolist()
    if not math.isfinite(upper):
        return draw(st.sampled_from([lower, -lower, math.inf, math.nan]))
    middle = (lower + upper) / 2
    distance = middle * draw(st.floats(1, 2)) * 2.0 ** -draw(st.integers(20, 60))
    return draw(st.sampled_from([-1, 1])) * (middle + draw(st.sampled_from([-1, 0, 1])) * distance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_float64_is_rounded_once(dtype: torch.dtype, data: st.DataObject) -> None:
    numbers = st.one_of(near_ties(dtype), st.floats(width=64), st.floats(width=16))
    values = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=20)), dtype=torch.float64)
    before = values.clone()
    rounded = round_once(values, dtype)
    assert rounded.dtype is dtype
    assert same(rounded.double(), oracles.round_once(values, dtype))
    assert same(rounded, torch_twins.round_once(values, dtype))
    assert same(values, before)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_float32_is_rounded_once(dtype: torch.dtype, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert same(round_once(tensor, dtype).double(), oracles.round_once(tensor, dtype))
    assert same(round_once(tensor, dtype), torch_twins.round_once(tensor, dtype))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("dtype", "value", "rounded"),
    [
        pytest.param(torch.bfloat16, 1 + 2**-8, 1.0, id="bf16 tie to even"),
        pytest.param(torch.bfloat16, 1 + 3 * 2**-8, 1 + 2**-6, id="bf16 tie to even, upwards"),
        pytest.param(torch.bfloat16, 1 + 2**-8 + 2**-40, 1 + 2**-7, id="bf16 above a tie by less than float32 sees"),
        pytest.param(torch.bfloat16, 1 + 2**-8 + 3 * 2**-25, 1 + 2**-7, id="bf16 above a tie by 3/4 of float32's step"),
        pytest.param(torch.bfloat16, 1 + 3 * 2**-8 - 2**-40, 1 + 2**-7, id="bf16 below a tie"),
        pytest.param(torch.float16, 1 + 2**-11 + 2**-40, 1 + 2**-10, id="f16 above a tie"),
        pytest.param(torch.float16, 2.0**-25, 0.0, id="f16 half of the smallest subnormal"),
        pytest.param(torch.float16, 2.0**-25 * (1 + 2**-40), 2.0**-24, id="f16 above half of the smallest subnormal"),
        pytest.param(torch.float16, 65519.999999999, 65504.0, id="f16 below the edge to infinity"),
        pytest.param(torch.float16, 65520.0, math.inf, id="f16 the edge to infinity"),
        pytest.param(torch.bfloat16, 1e300, math.inf, id="bf16 far beyond float32"),
        pytest.param(torch.bfloat16, 1e-300, 0.0, id="bf16 far below float32"),
        pytest.param(torch.bfloat16, 0.0, 0.0, id="zero keeps its sign"),
    ],
)
def test_worked_values(dtype: torch.dtype, value: float, rounded: float, sign: float) -> None:
    got = round_once(torch.tensor([sign * value], dtype=torch.float64), dtype)
    assert same(got.double(), torch.tensor([sign * rounded], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert round_once(torch.ones(shape, dtype=torch.float64), torch.bfloat16).shape == shape

"""Tests of what MXFP4, MXFP6 and MXFP8 have in common: groups of 32 columns with power-of-two scales."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from float_modules import (
    MXFP4_ARGS,
    MXFP6_ARGS,
    MXFP8_ARGS,
    assert_one_fault,
    describe,
    described,
    exact_values,
    random_module,
    specs_of,
)
from hypothesis import given, settings
from on_tensors import NATIVE, decode, encode
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import QuantArgs, TensorSpec

ALL_ARGS = [MXFP4_ARGS, MXFP6_ARGS, MXFP8_ARGS]
every_format = pytest.mark.parametrize("args", ALL_ARGS, ids=QuantArgs.label)


def module_of(args: QuantArgs, columns: int = 64) -> dict[str, Tensor]:
    return random_module(args, (6, columns), seed=2)


@every_format
def test_stored_tensors_are_returned_without_a_copy(args: QuantArgs) -> None:
    stored = module_of(args)
    weight = described(args, stored, (6, 64))
    codes = decode(weight, stored)
    assert weight.shape == (6, 64)
    assert weight.scale_shape == (6, 2)
    assert weight.divisor is None
    assert weight.consumed == tuple(stored)
    assert codes.values.data_ptr() == stored[weight.codes].data_ptr()
    assert codes.scale.data_ptr() == stored["weight_scale"].data_ptr()
    assert codes.element is weight.element


@settings(max_examples=60, deadline=None)
@given(
    args=st.sampled_from(ALL_ARGS),
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 4, 31, 32, 33, 64, 70]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_every_element_is_the_exact_value(
    args: QuantArgs, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    """The sizes include some that fill no byte and no group; NaN codes of float8 stay NaN."""
    stored = random_module(args, (rows, columns), seed)
    values = NATIVE.dequantize(described(args, stored, (rows, columns)), stored, dtype)
    assert values.dtype is dtype
    exact = exact_values(stored, args, columns, dtype)
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(args=st.sampled_from(ALL_ARGS), rows=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_encoding_inverts_decoding(args: QuantArgs, rows: int, groups: int, seed: int) -> None:
    stored = random_module(args, (rows, 32 * groups), seed)
    weight = described(args, stored)
    encoded = encode(weight.format, decode(weight, stored), args)
    assert encoded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert encoded[name].dtype is tensor.dtype
        assert torch.equal(encoded[name].view(torch.uint8), tensor.view(torch.uint8)), name


@every_format
def test_scales_stored_as_e8m0_are_the_same_bytes(args: QuantArgs) -> None:
    """The library treats this dtype as numbers, and gives wrong values without an error."""
    stored = module_of(args)
    typed = stored | {"weight_scale": stored["weight_scale"].view(torch.float8_e8m0fnu)}
    weight = described(args, typed)
    assert torch.equal(decode(weight, typed).scale, stored["weight_scale"])


@pytest.mark.parametrize("exponent", [0, 1, 126, 127, 128, 254])
@every_format
def test_each_exponent_has_its_power_of_two(args: QuantArgs, exponent: int) -> None:
    """Exponent 0 is 2^-127, a subnormal number of float32; results beyond the range of float32 need float64."""
    stored = module_of(args)
    stored["weight_scale"].fill_(exponent)
    values = NATIVE.dequantize(described(args, stored), stored, torch.float64)
    exact = exact_values(stored, args, 64, torch.float64)
    torch.testing.assert_close(values, exact, rtol=0, atol=0, equal_nan=True)


@every_format
def test_a_leftover_zero_point_is_consumed(args: QuantArgs) -> None:
    weight = described(args, module_of(args) | {"weight_zero_point": torch.zeros(6, 2, dtype=torch.int8)})
    assert "weight_zero_point" in weight.consumed
    assert not weight.has_zero_point


FAULTS = {
    "a global scale": (
        {"weight_global_scale": (DType.F32, (1,))},
        ("lin.weight_global_scale", "no scale for the whole tensor", "float32 [1]", "NVFP4 has such a scale"),
    ),
    "groups of 16": (
        {"weight_scale": (DType.U8, (6, 4))},
        ("lin.weight_scale", "uint8 or float8_e8m0fnu [6, 2]", "[6, 4]", "contradict each other"),
    ),
    "scales of another weight": (
        {"weight_scale": (DType.U8, (3, 4))},
        ("lin.weight_scale", "one for each row and group of 32 columns", "[3, 4]", "contradict each other"),
    ),
}


@pytest.mark.parametrize(("changes", "words"), FAULTS.values(), ids=FAULTS.keys())
@every_format
def test_a_contradiction_is_named_with_its_remedy(
    args: QuantArgs, changes: dict[str, tuple[DType, tuple[int, ...]]], words: tuple[str, str, str, str]
) -> None:
    specs = specs_of(module_of(args)) | {name: TensorSpec(*entry) for name, entry in changes.items()}
    _, faults = describe(args, specs, (6, 64))
    assert_one_fault(faults, *words)


@pytest.mark.parametrize("args", [MXFP4_ARGS, MXFP6_ARGS], ids=QuantArgs.label)
def test_a_packed_weight_without_scales_is_a_fault(args: QuantArgs) -> None:
    specs = specs_of(module_of(args))
    del specs["weight_scale"]
    _, faults = describe(args, specs, (6, 64))
    assert_one_fault(faults, "lin.weight_scale", "uint8", "no such tensor", "Fetch the shard")


@every_format
def test_arguments_of_another_group_size_are_a_fault(args: QuantArgs) -> None:
    weight, faults = describe(replace(args, group_size=64), specs_of(module_of(args)), (6, 64))
    assert weight is None
    assert_one_fault(faults, "lin", "group_size 32", "group 64", "config group targets this module")


@every_format
def test_other_sizes_than_the_model_are_a_fault(args: QuantArgs) -> None:
    _, faults = describe(args, specs_of(module_of(args)), (6, 128))
    assert_one_fault(faults, "lin", "[6, 128] (out, in)", "[6, 64]", "correct num_bits in config_groups")

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from float_modules import (
    NVFP4_ARGS,
    assert_one_fault,
    describe,
    described,
    exact_values,
    random_module,
    specs_of,
)
from hypothesis import given, settings
from on_tensors import NATIVE, decode, encode, on_tensors
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.nvfp4 import NVFP4
from trtllm_ct.layouts import packing as packing_layout
from trtllm_ct.layouts.floats import E2M1_PACKED

unpack_fields = on_tensors(packing_layout.unpack_fields)

THIRD_PARTY_ARGS = replace(NVFP4_ARGS, strategy=Strategy.GROUP, scale_dtype=None)
MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.fixture
def module() -> dict[str, Tensor]:
    """Six rows of 32 columns."""
    return random_module(NVFP4_ARGS, (6, 32), seed=1)


def test_worked_bytes() -> None:
    """Bytes of compressed-tensors 0.20 with local and global scale 448; the global scale divides."""
    stored = {
        "weight_packed": torch.tensor([list(bytes.fromhex("1032547690badcfe"))], dtype=torch.uint8),
        "weight_scale": torch.tensor([[0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor(list(bytes.fromhex("0000e043")), dtype=torch.uint8).view(torch.float32),
    }
    weight = described(NVFP4_ARGS, stored, (1, 16))
    values = [*MAGNITUDES, *(-value for value in MAGNITUDES)]
    assert NATIVE.dequantize(weight, stored, torch.float32).tolist() == [values]


@pytest.mark.parametrize("args", [NVFP4_ARGS, THIRD_PARTY_ARGS], ids=["tensor_group", "group"])
def test_a_whole_weight_is_described_by_its_headers(args: QuantArgs, module: dict[str, Tensor]) -> None:
    weight = described(args, module, (6, 32))
    assert weight.format is NVFP4
    assert weight.shape == (6, 32)
    assert (weight.codes, weight.packing, weight.element) == ("weight_packed", E2M1_PACKED, Element.E2M1)
    assert weight.divisor == "weight_global_scale"
    assert weight.scale_shape == (6, 2)
    assert weight.consumed == ("weight_packed", "weight_scale", "weight_global_scale")


def test_the_scale_of_the_input_is_not_consumed_by_the_weight(module: dict[str, Tensor]) -> None:
    weight = described(NVFP4_ARGS, module | {"input_global_scale": torch.ones(1)})
    assert "input_global_scale" not in weight.consumed


def test_codes_and_scales_are_returned_without_a_copy(module: dict[str, Tensor]) -> None:
    codes = decode(described(NVFP4_ARGS, module), module)
    assert codes.values.data_ptr() == module["weight_packed"].data_ptr()
    assert codes.scale.data_ptr() == module["weight_scale"].data_ptr()
    assert codes.divisor is not None
    assert torch.equal(codes.divisor, module["weight_global_scale"])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 15, 16, 17, 32, 41, 48]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_every_element_is_the_exact_value_rounded_once(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    """The sizes include some that fill no byte and no group."""
    stored = random_module(NVFP4_ARGS, (rows, columns), seed)
    weight = described(NVFP4_ARGS, stored, (rows, columns))
    values = NATIVE.dequantize(weight, stored, dtype)
    assert values.dtype is dtype
    assert torch.equal(values.double(), exact_values(stored, NVFP4_ARGS, columns, dtype))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_encoding_inverts_decoding(rows: int, groups: int, seed: int) -> None:
    stored = random_module(NVFP4_ARGS, (rows, 16 * groups), seed)
    encoded = encode(NVFP4, decode(described(NVFP4_ARGS, stored), stored), NVFP4_ARGS)
    assert encoded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert encoded[name].dtype is tensor.dtype
        assert torch.equal(encoded[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_encoding_takes_codes_of_another_packing(module: dict[str, Tensor]) -> None:
    plain = Packing(bits=4, container=DType.U8, axis=0, offset_binary=False)
    codes = decode(described(NVFP4_ARGS, module), module)
    fields = unpack_fields(codes.values, E2M1_PACKED, codes.shape)
    pairs = fields[::2] | fields[1::2] << 4
    encoded = encode(NVFP4, replace(codes, values=pairs, packing=plain), NVFP4_ARGS)
    assert torch.equal(encoded["weight_packed"], module["weight_packed"])


def test_local_scales_stored_as_plain_bytes_are_e4m3_all_the_same(module: dict[str, Tensor]) -> None:
    """The library treats such bytes as integers, and gives wrong values without an error."""
    as_bytes = module | {"weight_scale": module["weight_scale"].view(torch.uint8)}
    for args in (NVFP4_ARGS, THIRD_PARTY_ARGS):
        weight = described(args, as_bytes)
        assert decode(weight, as_bytes).scale.dtype is torch.float8_e4m3fn
        assert torch.equal(
            NATIVE.dequantize(weight, as_bytes, torch.bfloat16),
            NATIVE.dequantize(described(NVFP4_ARGS, module), module, torch.bfloat16),
        )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_global_scale_comes_in_any_shape_and_wide_dtype(
    shape: tuple[int, ...], dtype: torch.dtype, module: dict[str, Tensor]
) -> None:
    module["weight_global_scale"] = torch.full(shape, 788, dtype=dtype)
    codes = decode(described(NVFP4_ARGS, module), module)
    assert codes.divisor is not None
    assert (codes.divisor.dtype, codes.divisor.tolist()) == (torch.float32, [788])


def test_an_expert_without_calibration_is_zero(module: dict[str, Tensor]) -> None:
    """Its global scale is 0; dividing by it would give NaN."""
    module["weight_global_scale"].zero_()
    weight = described(NVFP4_ARGS, module)
    assert not NATIVE.dequantize(weight, module, torch.bfloat16).any()
    assert torch.equal(encode(NVFP4, decode(weight, module), NVFP4_ARGS)["weight_global_scale"], torch.zeros(1))


def test_a_leftover_zero_point_is_consumed(module: dict[str, Tensor]) -> None:
    """It is not used in any computation; loading checks that it is zero."""
    weight = described(NVFP4_ARGS, module | {"weight_zero_point": torch.zeros(6, 2)})
    assert "weight_zero_point" in weight.consumed
    assert not weight.has_zero_point


E4M3, U8 = DType.F8_E4M3, DType.U8
FAULTS = {
    "no global scale": (
        {"weight_global_scale": None},
        ("lin.weight_global_scale", "one float32 element", "no such tensor", "factor of hundreds"),
    ),
    "a global scale for each row": (
        {"weight_global_scale": (DType.F32, (6, 1))},
        ("lin.weight_global_scale", "one float32 element", "[6, 1]", "factor of hundreds"),
    ),
    "an integer for a global scale": (
        {"weight_global_scale": (DType.I32, (1,))},
        ("lin.weight_global_scale", "one float32 element", "int32", "factor of hundreds"),
    ),
    "no local scale": (
        {"weight_scale": None},
        ("lin.weight_scale", "float8_e4m3fn or uint8 [6, 2]", "no such tensor", "Fetch the shard"),
    ),
    "a wide local scale": (
        {"weight_scale": (DType.BF16, (6, 2))},
        ("lin.weight_scale", "float8_e4m3fn or uint8 [6, 2]", "bfloat16", "another format"),
    ),
    "groups of 32": (
        {"weight_scale": (E4M3, (6, 1))},
        ("lin.weight_scale", "one for each row and group of 16 columns", "[6, 1]", "contradict each other"),
    ),
    "bytes for groups of 32": (
        {"weight_scale": (U8, (6, 1))},
        ("lin.weight_scale", "one for each row and group of 16 columns", "[6, 1]", "contradict each other"),
    ),
    "codes are no matrix": (
        {"weight_packed": (U8, (2, 6, 16))},
        ("lin.weight_packed", "uint8 matrix", "[2, 6, 16]", "config_groups"),
    ),
    "other sizes than the model": (
        {"weight_packed": (U8, (6, 24)), "weight_scale": (E4M3, (6, 3))},
        ("lin", "[6, 32] (out, in)", "[6, 48]", "Take config.json from where the weights were published"),
    ),
}


@pytest.mark.parametrize(("changes", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_a_contradiction_is_named_with_its_remedy(
    changes: dict[str, tuple[DType, tuple[int, ...]] | None],
    words: tuple[str, str, str, str],
    module: dict[str, Tensor],
) -> None:
    kept = {name: tensor for name, tensor in module.items() if name not in changes}
    specs = specs_of(kept) | {name: TensorSpec(*entry) for name, entry in changes.items() if entry is not None}
    _, faults = describe(NVFP4_ARGS, specs, (6, 32))
    assert_one_fault(faults, *words)


def test_arguments_of_another_group_size_are_a_fault(module: dict[str, Tensor]) -> None:
    """The tensors are those of NVFP4, so the wrong config group targets the module."""
    weight, faults = describe(replace(THIRD_PARTY_ARGS, group_size=32), specs_of(module), (6, 32))
    assert weight is None
    assert_one_fault(faults, "lin", "group_size 16", "fp4 group 32", "config group targets this module")

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import NATIVE, Codes, decode, encode, on_tensors
from stored_weights import Sized, assert_fault, described, payload_faults, specs_of
from stored_weights import values as decoded

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import CompressionFormat, NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.plain_codes import FLOAT8, INT8
from trtllm_ct.layouts import packing as packing_layout
from trtllm_ct.layouts.packing import INT8_PLAIN, packed_words

if TYPE_CHECKING:
    from trtllm_ct.formats.base import StoredSpecs, WeightFormat

pack_codes = on_tensors(packing_layout.pack_codes)

INT8_CHANNEL = QuantArgs(num_bits=8, strategy=Strategy.CHANNEL)
INT8_GROUP = QuantArgs(num_bits=8, strategy=Strategy.GROUP, group_size=4)
FP8_TENSOR = QuantArgs(num_bits=8, type=NumberType.FLOAT)
FP8_CHANNEL = replace(FP8_TENSOR, strategy=Strategy.CHANNEL)


def specs(**tensors: Sized | None) -> StoredSpecs:
    """Headers of an int8 weight [6, 12] with one scale per row, with changes; None leaves a tensor out."""
    whole = {"weight": (DType.I8, (6, 12)), "weight_scale": (DType.BF16, (6, 1))} | tensors
    return {name: TensorSpec(*entry) for name, entry in whole.items() if entry is not None}


# From compressed-tensors 0.20: stored bytes, scale, zero point, and the values that they stand for.
WORKED = {
    "int8 channel": (INT8, INT8_CHANNEL, "02fc077f", 0.5, None, [1, -2, 3.5, 63.5]),
    "int8 tensor asymmetric": (INT8, QuantArgs(num_bits=8, symmetric=False), "fff90411", 0.5, -3, [1, -2, 3.5, 10]),
    "fp8 tensor": (FLOAT8, FP8_TENSOR, "38c0467e", 1.0, None, [1, -2, 3.5, 448]),
    "fp8 tensor, inexact": (FLOAT8, FP8_TENSOR, "1d00807e", 1.0, None, [0.1015625, 0, -0.0, 448]),
    "fp8 channel": (FLOAT8, FP8_CHANNEL, "25", 0.5, None, [0.1015625]),
}


@pytest.mark.parametrize(
    ("entry", "args", "stored", "scale", "zero_point", "values"), WORKED.values(), ids=WORKED.keys()
)
def test_worked_bytes(
    entry: WeightFormat, args: QuantArgs, stored: str, scale: float, zero_point: int | None, values: list[float]
) -> None:
    raw = torch.tensor([list(bytes.fromhex(stored))], dtype=torch.uint8)
    tensors = {
        "weight": raw.view(torch.int8 if entry is INT8 else torch.float8_e4m3fn),
        "weight_scale": torch.tensor([scale], dtype=torch.bfloat16),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = torch.tensor([zero_point], dtype=torch.int8)
    weight = described(entry, args, specs_of(tensors))
    assert NATIVE.dequantize(weight, tensors, torch.float32).tolist() == [values]


@pytest.mark.parametrize("form", [(6,), (6, 1), (1, 6)], ids=str)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
@pytest.mark.parametrize("entry", [INT8, FLOAT8], ids=["int8", "fp8"])
def test_row_scales_come_in_any_shape(entry: WeightFormat, form: tuple[int, ...], dtype: DType) -> None:
    args, codes = (INT8_CHANNEL, DType.I8) if entry is INT8 else (FP8_CHANNEL, DType.F8_E4M3)
    stored = specs(weight=(codes, (6, 12)), weight_scale=(dtype, form))
    assert described(entry, args, stored).scale_shape == (6, 1)


@pytest.mark.parametrize("form", [(), (1,), (1, 1)], ids=str)
def test_a_tensor_scale_comes_in_any_shape(form: tuple[int, ...]) -> None:
    stored = specs(weight=(DType.F8_E4M3, (6, 12)), weight_scale=(DType.F32, form))
    assert described(FLOAT8, FP8_TENSOR, stored).scale_shape == (1, 1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero_point", [None, -1], ids=["symmetric", "asymmetric"])
def test_narrow_integers_lie_one_in_a_byte(bits: int, zero_point: int | None) -> None:
    """W4A8 and W4AFP8 store them like this, unlike weight-only int4."""
    half = 1 << (bits - 1)
    tensors = {"weight": torch.arange(-half, half, dtype=torch.int8)[None], "weight_scale": torch.tensor([[0.5]])}
    if zero_point is not None:
        tensors["weight_zero_point"] = torch.tensor([[zero_point]], dtype=torch.int8)
    weight = described(INT8, replace(INT8_CHANNEL, num_bits=bits), specs_of(tensors))
    exact = (torch.arange(-half, half, dtype=torch.float64) - (zero_point or 0)) * 0.5
    assert torch.equal(decoded(weight, tensors)[0], exact)


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (3, 4), (7, -65), (1, 1)])
def test_a_code_beyond_its_width_is_a_fault(bits: int, code: int) -> None:
    tensors = {"weight": torch.zeros(6, 12, dtype=torch.int8), "weight_scale": torch.ones(6, 1)}
    tensors["weight"][4, 7] = code
    weight = described(INT8, replace(INT8_CHANNEL, num_bits=bits), specs_of(tensors))
    (fault,) = payload_faults(weight, tensors)
    half = 1 << (bits - 1)
    expected = f"codes of {bits} bits, from {-half} to {half - 1}"
    assert_fault(fault, "lin.weight", expected, f"from {min(code, 0)} to {max(code, 0)}", "num_bits")


@pytest.mark.parametrize("form", [(6, 1), (6,), (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_zero_points_that_early_writers_left_beside_float_codes_are_zero(
    form: tuple[int, ...], dtype: torch.dtype
) -> None:
    """They count as consumed and change nothing; any number but 0 is a fault."""
    tensors = {
        "weight": torch.ones(6, 12).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(6, 1),
        "weight_zero_point": torch.zeros(form).to(dtype),
    }
    weight = described(FLOAT8, FP8_CHANNEL, specs_of(tensors))
    assert not weight.has_zero_point
    assert weight.consumed == ("weight", "weight_scale", "weight_zero_point")
    assert decode(weight, tensors).zero_point is None
    assert (decoded(weight, tensors) == 1).all()

    tensors["weight_zero_point"] = torch.ones(form).to(dtype)
    (fault,) = payload_faults(weight, tensors)
    count = tensors["weight_zero_point"].numel()
    found = f"{count} of {count} elements that are not zero"
    assert_fault(fault, "lin.weight_zero_point", "zeros only", found, "quantize the model again")


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_a_zero_point_of_integers_counts_whatever_symmetric_says(number: int, dtype: torch.dtype) -> None:
    tensors = {
        "weight": torch.ones(6, 12, dtype=torch.int8),
        "weight_scale": torch.ones(6, 1),
        "weight_zero_point": torch.full((6, 1), number).to(dtype),
    }
    weight = described(INT8, INT8_CHANNEL, specs_of(tensors))
    assert weight.has_zero_point
    assert (decoded(weight, tensors) == 1 - number).all()


def test_codes_are_returned_without_a_copy() -> None:
    tensors = {"weight": torch.zeros(6, 12, dtype=torch.int8), "weight_scale": torch.ones(6, 1)}
    codes = decode(described(INT8, INT8_CHANNEL, specs_of(tensors)), tensors)
    assert codes.values.data_ptr() == tensors["weight"].data_ptr()
    assert codes.packing == INT8_PLAIN


def test_the_last_group_may_be_short() -> None:
    stored = specs(weight=(DType.I8, (6, 10)), weight_scale=(DType.BF16, (6, 3)))
    assert described(INT8, INT8_GROUP, stored).scale_shape == (6, 3)


@settings(max_examples=60, deadline=None)
@given(
    entry=st.sampled_from([INT8, FLOAT8]),
    grouping=st.sampled_from([Strategy.TENSOR, Strategy.CHANNEL, 1, 4, 7]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 15)),
    zero_point=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_decoding_inverts_encoding(
    entry: WeightFormat, grouping: Strategy | int, shape: tuple[int, int], zero_point: bool, seed: int
) -> None:
    strategy, size = (Strategy.GROUP, grouping) if isinstance(grouping, int) else (grouping, None)
    number = NumberType.INT if entry is INT8 else NumberType.FLOAT
    args = QuantArgs(num_bits=8, type=number, strategy=strategy, group_size=size)
    grid = (1, 1) if strategy is Strategy.TENSOR else (shape[0], -(-shape[1] // (size or shape[1])))
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes = Codes(
        values=raw.view(torch.int8 if entry is INT8 else torch.float8_e4m3fn),
        packing=INT8_PLAIN if entry is INT8 else None,
        shape=shape,
        scale=torch.rand(grid, generator=generator),
        zero_point=torch.ones(grid, dtype=torch.int8) if zero_point and entry is INT8 else None,
    )
    stored = encode(entry, codes, args)
    decoded = decode(described(entry, args, specs_of(stored), shape), stored)
    assert torch.equal(decoded.values.view(torch.uint8), raw)
    assert torch.equal(decoded.scale, codes.scale)
    assert (decoded.zero_point is None) is (codes.zero_point is None)
    assert encode(entry, decoded, args).keys() == stored.keys()


def test_encoding_unpacks_codes_of_another_packing() -> None:
    plain = torch.randint(-128, 128, (6, 12), dtype=torch.int8)
    words = pack_codes(plain, packed_words(8))
    codes = Codes(values=words, packing=packed_words(8), shape=(6, 12), scale=torch.ones(6, 1))
    assert torch.equal(encode(INT8, codes, INT8_CHANNEL)["weight"], plain)


@pytest.mark.parametrize("entry", [INT8, FLOAT8], ids=["int8", "fp8"])
def test_writers_of_2024_called_both_naive_quantized(entry: WeightFormat) -> None:
    assert CompressionFormat.NAIVE_QUANTIZED in entry.declared_as


FAULTS = {
    "codes are no matrix": (
        INT8_CHANNEL,
        {"weight": (DType.I8, (2, 6, 12))},
        ("lin.weight", "int8 matrix", "[2, 6, 12]", "config_groups"),
    ),
    "other sizes than the model": (
        INT8_CHANNEL,
        {"weight": (DType.I8, (6, 16))},
        ("lin", "[6, 12] (out, in)", "[6, 16]", "Take config.json from where the weights were published"),
    ),
    "no scale": (
        INT8_CHANNEL,
        {"weight_scale": None},
        ("lin.weight_scale", "[6, 1] for strategy channel", "no such tensor", "Fetch the shard"),
    ),
    "integer scale": (
        INT8_CHANNEL,
        {"weight_scale": (DType.I32, (6, 1))},
        ("lin.weight_scale", "bfloat16, float16 or float32", "int32", "another format"),
    ),
    "one scale for all": (
        INT8_CHANNEL,
        {"weight_scale": (DType.BF16, (1,))},
        ("lin.weight_scale", "[6, 1]", "[1]", "Check strategy"),
    ),
    "other group size": (
        INT8_GROUP,
        {"weight_scale": (DType.BF16, (6, 2))},
        ("lin.weight_scale", "[6, 3]", "[6, 2]", "may be of group_size 6"),
    ),
    "packed zero point": (
        INT8_CHANNEL,
        {"weight_zero_point": (DType.I32, (2, 1))},
        ("lin.weight_zero_point", "int8 [6, 1]", "int32", "Check strategy and group_size"),
    ),
}


@pytest.mark.parametrize(("args", "changes", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_a_contradiction_is_named_with_its_remedy(
    args: QuantArgs, changes: dict[str, Sized | None], words: tuple[str, str, str, str]
) -> None:
    faults = FaultCollector()
    INT8.describe("lin", args, specs(**changes), (6, 12), faults)
    (fault,) = faults.faults
    where, expected, found, remedy = words
    assert fault.where == where
    assert expected in fault.expected
    assert found in fault.found
    assert remedy in fault.remedy

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import NATIVE, Codes, decode, encode, on_tensors
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.layouts import packing as packing_layout
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, packed_words

if TYPE_CHECKING:
    from trtllm_ct.formats.base import StoredSpecs, StoredWeight

pack_codes = on_tensors(packing_layout.pack_codes)
unpack_codes = on_tensors(packing_layout.unpack_codes)

GROUP_32 = QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=32)
GROUP_32_ASYM = replace(GROUP_32, symmetric=False)
CHANNEL = QuantArgs(num_bits=4, strategy=Strategy.CHANNEL)
ONE_GROUP = replace(GROUP_32, group_size=64)
TENSOR = QuantArgs(num_bits=4, strategy=Strategy.TENSOR)

Sized = tuple[DType, tuple[int, ...]]
WORDS = (DType.I32, (10, 8))
SCALE = (DType.BF16, (10, 2))
SHAPE = (DType.I64, (2,))


def specs(**tensors: Sized | None) -> StoredSpecs:
    """Headers of a weight of 10 rows and 64 columns in groups of 32, with changes; None leaves a tensor out."""
    whole = {"weight_packed": WORDS, "weight_scale": SCALE, "weight_shape": SHAPE} | tensors
    return {name: TensorSpec(*entry) for name, entry in whole.items() if entry is not None}


def describe(
    args: QuantArgs, stored: StoredSpecs, expected: tuple[int, int] | None = (10, 64)
) -> tuple[StoredWeight | None, FaultCollector]:
    faults = FaultCollector()
    return PACKED_INT.describe("model.layers.0.mlp.up_proj", args, stored, expected, faults, (0, 20, 0)), faults


def described(args: QuantArgs, stored: StoredSpecs, expected: tuple[int, int] | None = (10, 64)) -> StoredWeight:
    weight, faults = describe(args, stored, expected)
    assert not faults.faults
    assert weight is not None
    return weight


def tensors_of(args: QuantArgs, shape: tuple[int, int], *, zero_point: bool, seed: int = 0) -> dict[str, Tensor]:
    """The tensors that `encode` returns for random codes."""
    half = 1 << (args.num_bits - 1)
    generator = torch.Generator().manual_seed(seed)
    group = args.group_size or shape[1]
    grid = (1, 1) if args.strategy is Strategy.TENSOR else (shape[0], -(-shape[1] // group))
    codes = Codes(
        values=torch.randint(-half, half, shape, generator=generator, dtype=torch.int8),
        packing=INT8_PLAIN,
        shape=shape,
        scale=torch.rand(grid, generator=generator),
        zero_point=torch.randint(-half, half, grid, generator=generator, dtype=torch.int8) if zero_point else None,
    )
    return encode(PACKED_INT, codes, args)


def specs_of(tensors: dict[str, Tensor]) -> StoredSpecs:
    return {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_a_whole_weight_is_described_by_its_headers() -> None:
    weight = described(GROUP_32, specs())
    assert weight.shape == (10, 64)
    assert (weight.codes, weight.packing) == ("weight_packed", packed_words(4))
    assert weight.scale_shape == (10, 2)
    assert not weight.has_zero_point
    assert weight.consumed == ("weight_packed", "weight_scale", "weight_shape")


@pytest.mark.parametrize("expected", [(10, 64), (10, 57), None])
def test_the_last_word_need_not_be_full_if_the_model_gives_the_columns(expected: tuple[int, int] | None) -> None:
    """8 words hold 57 to 64 codes; headers alone can't show how many, so by default all words count as full."""
    assert described(CHANNEL, specs(weight_scale=(DType.BF16, (10, 1))), expected).shape == (expected or (10, 64))


@pytest.mark.parametrize("bits", [4, 8])
def test_both_widths_give_their_own_number_of_columns(bits: int) -> None:
    args = replace(CHANNEL, num_bits=bits)
    weight = described(args, specs(weight_scale=(DType.F32, (10,))), (10, 256 // bits))
    assert weight.shape == (10, 256 // bits)


@pytest.mark.parametrize(
    ("args", "form"),
    [
        *((TENSOR, form) for form in ((), (1,), (1, 1))),
        *((CHANNEL, form) for form in ((10,), (10, 1), (1, 10))),
        *((ONE_GROUP, form) for form in ((10,), (10, 1), (1, 10))),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
def test_one_scale_for_a_tensor_or_a_row_comes_in_any_shape(
    args: QuantArgs, form: tuple[int, ...], dtype: DType
) -> None:
    stored = tensors_of(args, (10, 64), zero_point=False)
    stored["weight_scale"] = stored["weight_scale"].reshape(form).to(dtype.torch_dtype)
    weight = described(args, specs_of(stored))
    codes = decode(weight, stored)
    assert codes.scale.dtype is dtype.torch_dtype
    assert torch.equal(codes.scale.flatten(), stored["weight_scale"].flatten())
    assert tuple(codes.scale.shape) == weight.scale_shape


@pytest.mark.parametrize("shape_tensor", [(DType.I64, (2,)), (DType.I32, (2,)), None], ids=str)
def test_weight_shape_may_be_int32_or_missing(shape_tensor: Sized | None) -> None:
    weight = described(GROUP_32, specs(weight_shape=shape_tensor))
    assert weight.shape == (10, 64)
    assert ("weight_shape" in weight.consumed) is (shape_tensor is not None)


@pytest.mark.parametrize("args", [GROUP_32, GROUP_32_ASYM], ids=["symmetric", "asymmetric"])
def test_a_stored_zero_point_counts_whatever_symmetric_says(args: QuantArgs) -> None:
    weight = described(args, specs(weight_zero_point=(DType.I32, (2, 2))))
    assert weight.has_zero_point
    assert weight.zero_point_packing == packed_words(4, axis=0)
    assert "weight_zero_point" in weight.consumed


def test_plain_zero_points_of_old_writers_equal_packed_ones() -> None:
    stored = tensors_of(GROUP_32_ASYM, (10, 64), zero_point=True)
    packed = decode(described(GROUP_32_ASYM, specs_of(stored)), stored).plain_zero_point
    assert packed is not None
    plain = stored | {"weight_zero_point": packed}
    weight = described(GROUP_32_ASYM, specs_of(plain))
    assert weight.zero_point_packing is None
    plain_zero_point = decode(weight, plain).plain_zero_point
    assert plain_zero_point is not None
    assert torch.equal(plain_zero_point, packed)


def test_surplus_columns_of_packed_zero_points_are_left_out() -> None:
    """Writers 0.9.4 to 0.10.2 turned (10, 2) into (2, 8): the first two columns are valid, the others garbage."""
    stored = tensors_of(GROUP_32_ASYM, (10, 64), zero_point=True)
    clean = NATIVE.dequantize(described(GROUP_32_ASYM, specs_of(stored)), stored, torch.float32)
    garbage = torch.randint(-(2**31), 2**31 - 1, (2, 6), dtype=torch.int32)
    stored["weight_zero_point"] = torch.cat([stored["weight_zero_point"], garbage], dim=1)
    weight = described(GROUP_32_ASYM, specs_of(stored))
    assert torch.equal(NATIVE.dequantize(weight, stored, torch.float32), clean)


def test_words_of_marlin_24_have_another_format() -> None:
    """They have the same name and dtype; only `scale_packed` distinguishes them."""
    stored = specs()
    assert PACKED_INT.accepts(GROUP_32, stored)
    assert not PACKED_INT.accepts(GROUP_32, {**stored, "scale_packed": TensorSpec(DType.F16, (2, 10))})


def test_words_stay_packed_when_decoded() -> None:
    stored = tensors_of(GROUP_32, (10, 64), zero_point=False)
    codes = decode(described(GROUP_32, specs_of(stored)), stored)
    assert codes.values.data_ptr() == stored["weight_packed"].data_ptr()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    grouping=st.sampled_from([Strategy.TENSOR, Strategy.CHANNEL, 1, 5, 8, 32]),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    zero_point=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_decoding_inverts_encoding(
    bits: int, grouping: Strategy | int, shape: tuple[int, int], zero_point: bool, seed: int
) -> None:
    """Holds for any size, odd ones included; encoding the decoded codes gives the same bytes."""
    strategy, size = (Strategy.GROUP, grouping) if isinstance(grouping, int) else (grouping, None)
    args = QuantArgs(num_bits=bits, strategy=strategy, group_size=size, symmetric=not zero_point)
    stored = tensors_of(args, shape, zero_point=zero_point, seed=seed)
    weight = described(args, specs_of(stored), shape)
    codes = decode(weight, stored)
    encoded = encode(PACKED_INT, codes, args)
    assert encoded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(encoded[name], tensor), name
        assert encoded[name].dtype is tensor.dtype, name
    assert stored["weight_shape"].tolist() == list(shape)


@pytest.mark.parametrize("packing", [INT8_PLAIN, INT4_ROW_PAIRS, packed_words(4)], ids=str)
def test_encoding_takes_codes_in_any_packing(packing: object) -> None:
    plain = torch.randint(-8, 8, (10, 64), dtype=torch.int8)
    codes = Codes(values=pack_codes(plain, packing), packing=packing, shape=(10, 64), scale=torch.ones(10, 2))
    words = encode(PACKED_INT, codes, GROUP_32)["weight_packed"]
    assert torch.equal(unpack_codes(words, packed_words(4), (10, 64)), plain)


def test_a_tensor_wide_zero_point_is_stored_plain() -> None:
    """The library packs zero points for the strategies group and channel only."""
    zero_point = tensors_of(replace(TENSOR, symmetric=False), (10, 64), zero_point=True)["weight_zero_point"]
    assert (zero_point.dtype, zero_point.numel()) == (torch.int8, 1)


FAULTS = {
    "codes are no matrix": (
        GROUP_32,
        {"weight_packed": (DType.I32, (4, 10, 8))},
        ("up_proj.weight_packed", "int32 matrix", "[4, 10, 8]", "config_groups"),
    ),
    "other sizes than the model": (
        GROUP_32,
        {"weight_packed": (DType.I32, (12, 8)), "weight_scale": (DType.BF16, (12, 2))},
        ("up_proj", "[10, 64] (out, in)", "[12, 64]", "Take config.json from where the weights were published"),
    ),
    "no scale": (
        GROUP_32,
        {"weight_scale": None},
        ("up_proj.weight_scale", "[10, 2] for strategy group and group_size 32", "no such tensor", "Fetch the shard"),
    ),
    "scale of another format": (
        GROUP_32,
        {"weight_scale": (DType.F8_E4M3, (10, 2))},
        ("up_proj.weight_scale", "bfloat16, float16 or float32", "float8_e4m3fn", "another format"),
    ),
    "other group size": (
        GROUP_32,
        {"weight_scale": (DType.BF16, (10, 4))},
        ("up_proj.weight_scale", "group_size 32 over 64 inputs", "[10, 4]", "may be of group_size 16"),
    ),
    "scale of other rows": (
        GROUP_32,
        {"weight_scale": (DType.BF16, (5, 4))},
        ("up_proj.weight_scale", "[10, 2]", "[5, 4]", "Check strategy and group_size"),
    ),
    "groups along the wrong axis": (
        GROUP_32,
        {"weight_scale": (DType.BF16, (2, 10))},
        ("up_proj.weight_scale", "[10, 2]", "[2, 10]", "Check strategy and group_size"),
    ),
    "grouped scale for a channel strategy": (
        CHANNEL,
        {},
        ("up_proj.weight_scale", "[10, 1] for strategy channel", "[10, 2]", "may be of group_size 32"),
    ),
    "packed zero point of other groups": (
        GROUP_32_ASYM,
        {"weight_zero_point": (DType.I32, (2, 1))},
        ("up_proj.weight_zero_point", "int32 [2, 2]", "[2, 1]", "group_size and num_bits"),
    ),
    "zero point packed along columns": (
        GROUP_32_ASYM,
        {"weight_zero_point": (DType.I32, (10, 1))},
        ("up_proj.weight_zero_point", "packed along the rows", "[10, 1]", "group_size and num_bits"),
    ),
    "plain zero point of other groups": (
        GROUP_32_ASYM,
        {"weight_zero_point": (DType.I8, (10, 4))},
        ("up_proj.weight_zero_point", "int8 [10, 2]", "[10, 4]", "Check strategy and group_size"),
    ),
    "zero point of another dtype": (
        GROUP_32_ASYM,
        {"weight_zero_point": (DType.U8, (10, 2))},
        ("up_proj.weight_zero_point", "int8 [10, 2]", "uint8", "Check strategy and group_size"),
    ),
}


@pytest.mark.parametrize(("args", "changes", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_a_contradiction_is_named_with_its_remedy(
    args: QuantArgs, changes: dict[str, Sized | None], words: tuple[str, str, str, str]
) -> None:
    _, faults = describe(args, specs(**changes))
    (fault,) = faults.faults
    where, expected, found, remedy = words
    assert fault.where == f"model.layers.0.mlp.{where}"
    assert expected in fault.expected
    assert found in fault.found
    assert remedy in fault.remedy


def test_all_contradictions_of_a_module_are_reported_together() -> None:
    broken = specs(weight_packed=(DType.I32, (12, 8)), weight_scale=None, weight_zero_point=(DType.I32, (9, 9)))
    _, faults = describe(GROUP_32_ASYM, broken)
    assert [fault.where.rpartition(".")[2] for fault in faults.faults] == [
        "up_proj",
        "weight_scale",
        "weight_zero_point",
    ]

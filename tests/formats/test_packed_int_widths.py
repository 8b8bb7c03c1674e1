"""`pack-quantized` with every width: the two layouts of 3, 5, 6 and 7 bits, and all forms of zero points."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import oracles
import pytest
import torch
from builders import config_group, int_weights, quantization_block
from hypothesis import given, settings
from on_tensors import Codes, decode, encode, on_tensors
from stored_weights import (
    NEWEST,
    assert_fault,
    described,
    exact_values,
    header_faults,
    payload_faults,
    specs_of,
    values,
)
from torch import Tensor

from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import QuantArgs, Strategy
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.layouts import packing as packing_layout
from trtllm_ct.layouts.packing import INT8_PLAIN, packed_words
from trtllm_ct.plan.models.sites import Site
from trtllm_ct.plan.stored import StoredModule, Whole
from trtllm_ct.plan.weights import WeightReader

if TYPE_CHECKING:
    from trtllm_ct.formats.base import StoredWeight, Version

unpack_codes = on_tensors(packing_layout.unpack_codes)

ODD = (3, 5, 6, 7)
CHANNEL = QuantArgs(num_bits=4, strategy=Strategy.CHANNEL)
OLD: Version = (0, 17, 1)

# Bytes that compressed-tensors 0.20 and 0.10 store for twelve codes of one row, which count up from the lowest code.
EVEN_BYTES = {1: "aa0a0000", 2: "e4e4e400", 8: "808182838485868788898a8b"}
EVEN_CODES = {1: [-1, 0] * 6, 2: [-2, -1, 0, 1] * 3, 8: list(range(12))}
DENSE_BYTES = {
    3: "88c6fa8806000000",
    5: "2088418a3928a905",
    6: "40200c44611c48a22c000000",
    7: "8080604028180e8884620100",
}
PADDED_BYTES = {
    3: "88c6fa081a000000",
    5: "2088410ae6a0a416",
    6: "40200c0485712009ca020000",
    7: "808060008482e10088846201",
}


def counting(bits: int) -> list[int]:
    """The twelve codes of the bytes above: from the lowest up, starting over after the highest."""
    return [i % (1 << bits) - (1 << (bits - 1)) for i in range(12)]


def words(hexadecimal: str, rows: int = 1) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.int32).reshape(rows, -1).clone()


def one_row(bits: int, packed: str) -> tuple[QuantArgs, dict[str, Tensor]]:
    return replace(CHANNEL, num_bits=bits), {"weight_packed": words(packed), "weight_scale": torch.ones(1, 1)}


def codes_of(weight: StoredWeight, tensors: dict[str, Tensor]) -> Tensor:
    codes = decode(weight, tensors)
    assert codes.packing is not None
    return unpack_codes(codes.values, codes.packing, codes.shape)


@pytest.mark.parametrize("bits", EVEN_BYTES)
@pytest.mark.parametrize("version", [(), OLD, NEWEST], ids=str)
def test_widths_that_divide_a_word_have_one_layout(bits: int, version: Version) -> None:
    args, tensors = one_row(bits, EVEN_BYTES[bits])
    weight = described(PACKED_INT, args, specs_of(tensors), (1, 12), version)
    assert weight.packing == packed_words(bits)
    assert values(weight, tensors).tolist() == [EVEN_CODES[bits]]


@pytest.mark.parametrize("bits", ODD)
@pytest.mark.parametrize(
    ("version", "dense"),
    [((), False), ((0,), False), (OLD, False), ((0, 18), True), ((0, 18, 0), True), (NEWEST, True), ((1, 0), True)],
    ids=str,
)
def test_the_version_decides_where_both_layouts_take_the_same_words(bits: int, version: Version, dense: bool) -> None:
    """Twelve codes do; releases since 0.18 pack them densely, and older ones did not always store their version."""
    args, tensors = one_row(bits, (DENSE_BYTES if dense else PADDED_BYTES)[bits])
    weight = described(PACKED_INT, args, specs_of(tensors), (1, 12), version)
    assert weight.packing == packed_words(bits, dense=dense)
    assert values(weight, tensors).tolist() == [counting(bits)]


@pytest.mark.parametrize(("version", "dense"), [(None, False), ("0.17.1", False), ("0.18.0", True), ("0.20.0", True)])
def test_the_version_is_that_of_the_configuration(version: str | None, dense: bool) -> None:
    groups = {"group_0": config_group(int_weights(3, "channel"))}
    config = CompressedTensorsConfigReader().read(quantization_block(groups, version=version))
    _, tensors = one_row(3, (DENSE_BYTES if dense else PADDED_BYTES)[3])
    reader = WeightReader(config, FaultCollector())
    site = Site(module="lin", class_name="Linear", shape=(1, 12))
    views = {local: Whole(name=f"lin.{local}", spec=spec) for local, spec in specs_of(tensors).items()}
    weight = reader.read(StoredModule("lin", views), site)
    assert weight is not None
    assert values(weight.stored, tensors).tolist() == [counting(3)]


@pytest.mark.parametrize("bits", ODD)
@pytest.mark.parametrize("version", [(), OLD, NEWEST], ids=str)
@pytest.mark.parametrize("columns", [32, 96, 128, 4096])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "padded"])
def test_the_packed_width_shows_the_layout_for_real_models(
    bits: int, version: Version, columns: int, dense: bool
) -> None:
    """Holds for every K that is a multiple of 32, whatever the version is."""
    packing = packed_words(bits, dense=dense)
    stored = specs_of(
        {
            "weight_packed": torch.empty(packing.packed_shape((4, columns)), dtype=torch.int32),
            "weight_scale": torch.empty(4, 1),
        }
    )
    weight = described(PACKED_INT, replace(CHANNEL, num_bits=bits), stored, (4, columns), version)
    assert weight.packing == packing
    assert weight.shape == (4, columns)


@pytest.mark.parametrize("bits", ODD)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "padded"])
def test_packed_zero_points_show_the_layout_if_the_words_of_the_weight_do_not(bits: int, dense: bool) -> None:
    packing = packed_words(bits, dense=dense)
    zero_points = torch.empty(replace(packing, axis=0).packed_shape((64, 1)), dtype=torch.int32)
    stored = specs_of(
        {
            "weight_packed": torch.empty(packing.packed_shape((64, 12)), dtype=torch.int32),
            "weight_scale": torch.empty(64, 1),
            "weight_zero_point": zero_points,
        }
    )
    args = replace(CHANNEL, num_bits=bits, symmetric=False)
    contrary: Version = OLD if dense else NEWEST
    weight = described(PACKED_INT, args, stored, (64, 12), contrary)
    assert (weight.packing, weight.zero_point_packing) == (packing, replace(packing, axis=0))


@pytest.mark.parametrize("bits", ODD)
def test_dense_words_are_never_read_as_padded_ones(bits: int) -> None:
    """The highest bits of padded words are unused, so they show a wrong or missing version."""
    args, tensors = one_row(bits, DENSE_BYTES[bits])
    weight = described(PACKED_INT, args, specs_of(tensors), (1, 12), ())
    (fault,) = payload_faults(weight, tensors)
    used = bits * (32 // bits)
    assert_fault(fault, "lin.weight_packed", f"padded to {used} used bits", "words that use more", "set `version`")


def test_words_of_neither_layout_contradict_the_model() -> None:
    stored = specs_of({"weight_packed": torch.empty(4, 14, dtype=torch.int32), "weight_scale": torch.empty(4, 1)})
    (fault,) = header_faults(PACKED_INT, replace(CHANNEL, num_bits=3), stored, (4, 128))
    assert_fault(fault, "lin", "[4, 128] (out, in)", "[4, 149]", "correct num_bits in config_groups")


@pytest.mark.parametrize(("bits", "group_size", "groups", "columns"), [(4, 20, 3, 60), (3, 64, 2, 128), (8, 5, 3, 15)])
def test_full_groups_give_the_columns_if_the_model_does_not(
    bits: int, group_size: int, groups: int, columns: int
) -> None:
    args = QuantArgs(num_bits=bits, strategy=Strategy.GROUP, group_size=group_size)
    packed = torch.empty(packed_words(bits).packed_shape((4, columns)), dtype=torch.int32)
    stored = specs_of({"weight_packed": packed, "weight_scale": torch.empty(4, groups)})
    assert described(PACKED_INT, args, stored).shape == (4, columns)


@pytest.mark.parametrize(("version", "columns"), [(OLD, 130), (NEWEST, 138)], ids=str)
def test_words_count_as_full_if_the_columns_are_unknown(version: Version, columns: int) -> None:
    stored = specs_of({"weight_packed": torch.empty(4, 13, dtype=torch.int32), "weight_scale": torch.empty(4, 1)})
    assert described(PACKED_INT, replace(CHANNEL, num_bits=3), stored, None, version).shape == (4, columns)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(1, 8),
    dense=st.booleans(),
    grouping=st.sampled_from([Strategy.TENSOR, Strategy.CHANNEL, 1, 5, 32]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    zero_point=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_width_and_layout_has_the_values_of_plain_arithmetic(
    bits: int, dense: bool, grouping: Strategy | int, shape: tuple[int, int], zero_point: bool, seed: int
) -> None:
    """Words packed by plain arithmetic are decoded exactly; encoding gives the words that 0.18 and later write."""
    size = grouping if isinstance(grouping, int) else None
    strategy = Strategy.GROUP if isinstance(grouping, int) else grouping
    args = QuantArgs(num_bits=bits, strategy=strategy, group_size=size, symmetric=not zero_point)
    grid = (1, 1) if strategy is Strategy.TENSOR else (shape[0], -(-shape[1] // (size or shape[1])))
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(grid, generator=generator) + 0.5
    zeros = torch.randint(-half, half, grid, generator=generator, dtype=torch.int8)
    tensors = {
        "weight_packed": oracles.pack(codes.long().numpy(), packed_words(bits, dense=dense)),
        "weight_scale": scale,
    }
    if zero_point:
        along_rows = packed_words(bits, axis=0, dense=dense)
        plain = strategy is Strategy.TENSOR
        tensors["weight_zero_point"] = zeros if plain else oracles.pack(zeros.long().numpy(), along_rows)

    weight = described(PACKED_INT, args, specs_of(tensors), shape, NEWEST if dense else OLD)

    assert torch.equal(codes_of(weight, tensors), codes)
    block = (shape[0] if strategy is Strategy.TENSOR else 1, size or shape[1])
    assert torch.equal(values(weight, tensors), exact_values(codes, scale, zeros if zero_point else None, block=block))
    encoded = encode(PACKED_INT, decode(weight, tensors), args)
    assert torch.equal(encoded["weight_packed"], oracles.pack(codes.long().numpy(), packed_words(bits)))
    assert encoded["weight_shape"].tolist() == list(shape)


ZERO_POINT_BYTES = {
    "4 bits, 10 rows": (4, [*range(-8, 0), 0, 7], "10325476f8000000", NEWEST),
    "4 bits, 16 rows": (4, list(range(-8, 8)), "1032547698badcfe", NEWEST),
    "3 bits dense": (3, counting(3), DENSE_BYTES[3], NEWEST),
    "3 bits padded": (3, counting(3), PADDED_BYTES[3], OLD),
}


@pytest.mark.parametrize(("bits", "numbers", "packed", "version"), ZERO_POINT_BYTES.values(), ids=ZERO_POINT_BYTES)
def test_zero_points_are_packed_along_the_rows(bits: int, numbers: list[int], packed: str, version: Version) -> None:
    """The library wrote these bytes; zero points of 3, 5, 6 and 7 bits have the layout of their weight."""
    rows = len(numbers)
    args = replace(CHANNEL, num_bits=bits, symmetric=False)
    layout = packed_words(bits, dense=version == NEWEST)
    tensors = {
        "weight_packed": oracles.pack(torch.zeros(rows, 32).long().numpy(), layout),
        "weight_scale": torch.ones(rows, 1),
        "weight_zero_point": words(packed, rows=2),
    }
    weight = described(PACKED_INT, args, specs_of(tensors), (rows, 32), version)
    assert values(weight, tensors)[:, 0].tolist() == [-number for number in numbers]


def asymmetric(zero_point: Tensor) -> tuple[StoredWeight, dict[str, Tensor]]:
    """Four rows of 16 zero codes in groups of 8 with this plain zero point."""
    args = QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=8, symmetric=False)
    zeros = Codes(
        values=torch.zeros(4, 16, dtype=torch.int8), packing=INT8_PLAIN, shape=(4, 16), scale=torch.ones(4, 2)
    )
    tensors = encode(PACKED_INT, zeros, args) | {"weight_zero_point": zero_point}
    return described(PACKED_INT, args, specs_of(tensors), (4, 16)), tensors


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_plain_zero_points_may_be_floats_that_are_integers(dtype: torch.dtype) -> None:
    """Early writers store int8, forks of MoE-Quant store floats."""
    numbers = torch.arange(-8, 8, 2).reshape(4, 2)
    weight, tensors = asymmetric(numbers.to(dtype))
    zero_point = decode(weight, tensors).plain_zero_point
    assert zero_point is not None
    assert zero_point.dtype is torch.int8
    assert torch.equal(values(weight, tensors)[:, ::8], -numbers.double())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0.5, ("integers", "0.5 (8 of 8 are no integers)", "mean something else")),
        (float("nan"), ("integers", "nan (8 of 8", "mean something else")),
        (float("inf"), ("integers", "inf (8 of 8", "mean something else")),
        (8.0, ("[-8, 7]", "from 8 to 8", "unsigned")),
    ],
    ids=str,
)
def test_plain_zero_points_are_signed_integers(number: float, words: tuple[str, str, str]) -> None:
    weight, tensors = asymmetric(torch.full((4, 2), number))
    (fault,) = payload_faults(weight, tensors)
    assert_fault(fault, "lin.weight_zero_point", *words)


@pytest.mark.parametrize(
    ("args", "plain"),
    [
        (QuantArgs(num_bits=4, symmetric=False), True),
        (QuantArgs(num_bits=4, symmetric=False, strategy=Strategy.BLOCK, block_structure=(2, 8)), True),
        (replace(CHANNEL, symmetric=False), False),
        (QuantArgs(num_bits=4, symmetric=False, strategy=Strategy.GROUP, group_size=8), False),
    ],
    ids=lambda value: value.label() if isinstance(value, QuantArgs) else None,
)
def test_zero_points_are_packed_for_groups_and_channels_only(args: QuantArgs, plain: bool) -> None:
    grid = {Strategy.TENSOR: (1, 1), Strategy.BLOCK: (5, 2), Strategy.CHANNEL: (10, 1), Strategy.GROUP: (10, 2)}
    zero_point = torch.ones(grid[args.strategy], dtype=torch.int8)
    codes = Codes(
        values=torch.zeros(10, 16, dtype=torch.int8),
        packing=INT8_PLAIN,
        shape=(10, 16),
        scale=torch.ones(grid[args.strategy]),
        zero_point=zero_point,
    )
    tensors = encode(PACKED_INT, codes, args)
    assert tensors["weight_zero_point"].dtype is (torch.int8 if plain else torch.int32)
    weight = described(PACKED_INT, args, specs_of(tensors), (10, 16))
    assert torch.equal(values(weight, tensors), torch.full((10, 16), -1.0, dtype=torch.float64))

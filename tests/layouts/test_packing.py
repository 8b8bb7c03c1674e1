from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import numpy as np
import oracles
import pytest
import torch
import torch_twins
from hypothesis import given, settings
from on_tensors import on_tensors
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing
from trtllm_ct.layouts import packing as module_under_test
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, packed_words

pack_codes, repack, unpack_codes = (
    on_tensors(function)
    for function in (module_under_test.pack_codes, module_under_test.repack, module_under_test.unpack_codes)
)

PACKINGS = [
    Packing(bits=bits, container=container, axis=axis, offset_binary=offset_binary, dense=dense)
    for bits, container, axis, offset_binary, dense in product(
        range(1, 9), (DType.U8, DType.I8, DType.I32), (0, 1), (False, True), (False, True)
    )
]
FIXED = [
    (packed_words(4), INT4_ROW_PAIRS),
    (packed_words(8), INT8_PLAIN),
    (packed_words(4), INT8_PLAIN),
    (packed_words(8), packed_words(8, axis=0)),
]

# Codes along K, and the bytes of the int32 words that compressed-tensors 0.20 writes for them.
PACKED_WORDS = {
    "int4 rising": (4, range(-8, 8), "1032547698badcfe"),
    "int4 falling": (4, range(7, -9, -1), "efcdab8967452301"),
    "int8": (8, range(-128, -116), "000102030405060708090a0b"),
    "int2, last word half full": (2, (-2, -1, 0, 1) * 3, "e4e4e400"),
    "int1, last word half full": (1, (-1, 0) * 6, "aa0a0000"),
    "int3": (3, (*range(-4, 4), *range(-4, 0)), "88c6fa8806000000"),
    "int5": (5, range(-16, -4), "2088418a3928a905"),
    "int6": (6, range(-32, -20), "40200c44611c48a22c000000"),
    "int7": (7, range(-64, -52), "8080604028180e8884620100"),
}
# The same codes as releases up to 0.17.1 write them: 10, 6, 5 or 4 codes per word, the highest bits unused.
PADDED_WORDS = {
    "int3": (3, (*range(-4, 4), *range(-4, 0)), "88c6fa081a000000"),
    "int5": (5, range(-16, -4), "2088410ae6a0a416"),
    "int6": (6, range(-32, -20), "40200c0485712009ca020000"),
    "int7": (7, range(-64, -52), "808060008482e10088846201"),
}
PACKED_ZERO_POINTS = {
    "10 rows": (range(-8, 2), "10325476 98000000"),
    "10 rows with a jump": ((*range(-8, 0), 0, 7), "10325476 f8000000"),
    "16 rows": (range(-8, 8), "10325476 98badcfe"),
}
ENGINE_ROWS = torch.tensor(
    [range(-8, 0), range(8), (7, -8, 0, 1, -1, 2, -2, 3), (1, 1, 1, 1, -1, -1, -1, -1)], dtype=torch.int8
)
ENGINE_WORDS = [0x76543210, 0xFEDCBA98, 0xB6A7980F, 0x77779999]
ENGINE_BYTES = ["08192a3b4c5d6e7f", "17181011fff2fef3"]


def random_codes(shape: tuple[int, int], bits: int, seed: int) -> Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    codes.view(-1)[0] = -half  # errors in offsets and signs show at the ends of the range
    codes.view(-1)[-1] = half - 1
    return codes


def in_file(tensor: Tensor) -> str:
    """Return the bytes of a tensor in a file, as hexadecimal digits."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


@pytest.mark.parametrize(("bits", "codes", "stored"), PACKED_WORDS.values(), ids=PACKED_WORDS.keys())
def test_words_have_the_bytes_that_the_library_writes(bits: int, codes: range, stored: str) -> None:
    plain = torch.tensor([list(codes)], dtype=torch.int8)
    words = pack_codes(plain, packed_words(bits))
    assert in_file(words) == stored
    assert torch.equal(unpack_codes(words, packed_words(bits), plain.shape), plain)


@pytest.mark.parametrize(("bits", "codes", "stored"), PADDED_WORDS.values(), ids=PADDED_WORDS.keys())
def test_older_releases_left_the_highest_bits_of_a_word_unused(bits: int, codes: range, stored: str) -> None:
    plain = torch.tensor([list(codes)], dtype=torch.int8)
    packing = packed_words(bits, dense=False)
    assert in_file(pack_codes(plain, packing)) == stored
    assert torch.equal(unpack_codes(pack_codes(plain, packing), packing, plain.shape), plain)


@pytest.mark.parametrize(("codes", "stored"), PACKED_ZERO_POINTS.values(), ids=PACKED_ZERO_POINTS.keys())
def test_zero_points_are_packed_along_rows(codes: range, stored: str) -> None:
    plain = torch.tensor(list(codes), dtype=torch.int8).unsqueeze(1)
    words = pack_codes(plain, packed_words(4, axis=0))
    assert words.shape == (-(-len(codes) // 8), 1)
    assert in_file(words) == stored.replace(" ", "")
    assert torch.equal(unpack_codes(words, packed_words(4, axis=0), plain.shape), plain)


def test_row_pairs_have_the_bytes_that_the_engine_reads() -> None:
    words = torch.tensor(ENGINE_WORDS, dtype=torch.uint32).view(torch.int32).unsqueeze(1)
    pairs = repack(words, packed_words(4), INT4_ROW_PAIRS, (4, 8))
    assert [in_file(row) for row in pairs] == ENGINE_BYTES
    assert torch.equal(unpack_codes(words, packed_words(4), (4, 8)), ENGINE_ROWS)
    assert torch.equal(unpack_codes(pairs, INT4_ROW_PAIRS, (4, 8)), ENGINE_ROWS)


@settings(max_examples=150, deadline=None)
@given(
    packing=st.sampled_from(PACKINGS), rows=st.integers(1, 19), columns=st.integers(1, 19), seed=st.integers(0, 2**31)
)
def test_packing_equals_the_slow_reference(packing: Packing, rows: int, columns: int, seed: int) -> None:
    codes = random_codes((rows, columns), packing.bits, seed)
    packed = pack_codes(codes, packing)
    assert packed.shape == packing.packed_shape((rows, columns))
    assert packed.is_contiguous()
    assert torch.equal(packed, oracles.pack(codes.long().numpy(), packing))
    assert torch.equal(packed, torch_twins.pack_codes(codes, packing))
    unpacked = unpack_codes(packed, packing, (rows, columns))
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)
    assert torch.equal(unpacked, torch_twins.unpack_codes(packed, packing, (rows, columns)))
    assert np.array_equal(unpacked.numpy(), oracles.unpack(packed, packing, (rows, columns)))


@settings(max_examples=50, deadline=None)
@given(packing=st.sampled_from(PACKINGS), surplus=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=st.integers(0))
def test_surplus_elements_of_a_container_are_ignored(packing: Packing, surplus: tuple[int, int], seed: int) -> None:
    """Releases 0.9.4 to 0.10.2 write surplus columns of garbage beside packed zero points."""
    codes = random_codes((10, 3), packing.bits, seed % 2**31)
    packed = pack_codes(codes, packing)
    wider = torch.full((packed.shape[0] + surplus[0], packed.shape[1] + surplus[1]), 77, dtype=packed.dtype)
    wider[: packed.shape[0], : packed.shape[1]] = packed
    assert torch.equal(unpack_codes(wider, packing, (10, 3)), codes)


@settings(max_examples=150, deadline=None)
@given(
    packings=st.one_of(
        st.sampled_from(FIXED),
        st.sampled_from((1, 2, 4, 8)).flatmap(
            lambda bits: st.tuples(*[st.sampled_from([entry for entry in PACKINGS if entry.bits == bits])] * 2)
        ),
    ),
    rows=st.integers(1, 19),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_repacking_there_and_back_changes_nothing(
    packings: tuple[Packing, Packing], rows: int, columns: int, seed: int
) -> None:
    source, target = packings
    shape = (rows, columns)
    codes = random_codes(shape, min(source.bits, target.bits), seed)
    packed = pack_codes(codes, source)
    before = packed.clone()
    repacked = repack(packed, source, target, shape)
    assert torch.equal(repacked, oracles.pack(codes.long().numpy(), target))
    assert repacked.is_contiguous()
    assert torch.equal(repack(repacked, target, source, shape), packed)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("packing", [packed_words(4), INT4_ROW_PAIRS, INT8_PLAIN], ids=str)
def test_repacking_to_the_same_packing_returns_the_input(packing: Packing) -> None:
    packed = pack_codes(random_codes((4, 8), packing.bits, seed=2), packing)
    assert repack(packed, packing, packing, (4, 8)) is packed


@pytest.mark.parametrize("packing", [packing for packing in PACKINGS if packing.dense], ids=str)
def test_codes_may_be_strided_and_are_not_changed(packing: Packing) -> None:
    codes = random_codes((8, 16), packing.bits, seed=3)
    before = codes.clone()
    assert torch.equal(pack_codes(codes.T, packing), pack_codes(codes.T.contiguous(), packing))
    assert torch.equal(codes, before)

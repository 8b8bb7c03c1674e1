"""Integers of every width and float8 blocks, written by the library with random legal arguments, are read alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import LIBRARY, NATIVE, Codes, decode, encode, on_tensors
from stored_weights import described, payload_faults, specs_of
from torch import Tensor

from trtllm_ct.base.schemes import QuantArgs, Strategy
from trtllm_ct.config.arguments import read_weight_args
from trtllm_ct.config.json_object import Findings, JsonObject
from trtllm_ct.formats import format_for
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.layouts import packing as packing_layout
from trtllm_ct.layouts.packing import INT8_PLAIN, packed_words

pack_codes = on_tensors(packing_layout.pack_codes)
unpack_codes = on_tensors(packing_layout.unpack_codes)

pytestmark = pytest.mark.library

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Arguments that the library accepts, and a weight for them; `grid` is the shape of the scale."""

    compression: str
    arguments: dict[str, Any]
    shape: Shape
    grid: tuple[int, ...]
    dtype: torch.dtype
    seed: int


@st.composite
def integer_cases(draw: st.DrawFn, compression: str) -> Case:
    """Cases of any width, strategy and symmetry, with full groups only: the library accepts no other groups."""
    strategy = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = draw(st.sampled_from([1, 3, 8, 32, 64]))
    rows = draw(st.integers(1, 40))
    columns = size * draw(st.integers(1, 3)) if strategy == "group" else draw(st.integers(1, 80))
    arguments = {
        "num_bits": draw(st.integers(1, 8)),
        "type": "int",
        "strategy": strategy,
        "symmetric": draw(st.booleans()),
        "group_size": size if strategy == "group" else None,
    }
    grid = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // size)}[strategy]
    return Case(
        compression=compression,
        arguments=arguments,
        shape=(rows, columns),
        grid=grid,
        dtype=draw(DTYPES),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def block_cases(draw: st.DrawFn) -> Case:
    """Cases of float8 blocks of any size, including blocks larger than the weight or cut off at its edges."""
    rows, columns = shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    height, width = block = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    return Case(
        compression=draw(st.sampled_from(["float-quantized", "naive-quantized"])),
        arguments={"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(block)},
        shape=shape,
        grid=(-(-rows // height), -(-columns // width)),
        dtype=draw(DTYPES),
        seed=draw(st.integers(0, 2**31)),
    )


def compressed(case: Case) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """What the library stores for a random weight, what it decompresses from it, and the scale and zero point used."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator = torch.Generator().manual_seed(case.seed)
    bits, symmetric = case.arguments["num_bits"], case.arguments.get("symmetric", True)
    half = 1 << (bits - 1)
    top = 448 if case.arguments["type"] == "float" else half
    given = {"weight_scale": (0.01 + torch.rand(case.grid, generator=generator)).to(case.dtype)}
    if not symmetric:
        given["weight_zero_point"] = torch.randint(-half, half, case.grid, generator=generator, dtype=torch.int8)
    # Some weights exceed the range of the codes, so that the lowest and the highest code occur.
    weight = (torch.randn(case.shape, generator=generator) * top * 0.5).to(case.dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**case.arguments))
    compressor = BaseCompressor.get_value_from_registry(case.compression)
    # Contiguous, as if read from a file: the library can't read its own zero points of one word as a transposed view.
    stored = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in compressor.compress({"weight": weight, **given}, scheme).items()
    }
    return stored, compressor.decompress(stored, scheme)["weight"], given


def raw(tensor: Tensor) -> Tensor:
    """The bytes as a file has them; a transposed tensor of one element counts as contiguous, yet can't be viewed so."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_read_alike(case: Case) -> None:
    """Both codecs give the codes, scale, zero point and plain weights; encoding gives the library's bytes."""
    stored, dense, given = compressed(case)
    args = read_weight_args(JsonObject(case.arguments, "weights", Findings()))
    assert args is not None
    entry = format_for(args, specs_of(stored))
    assert entry is not None
    weight = described(entry, args, specs_of(stored), case.shape)
    assert payload_faults(weight, stored) == []
    codes = decode(weight, stored)
    assert torch.equal(codes.scale, given["weight_scale"].reshape(weight.scale_shape))
    zero_point = codes.plain_zero_point
    assert (zero_point is None) is ("weight_zero_point" not in given)
    if zero_point is not None:
        assert torch.equal(zero_point, given["weight_zero_point"].reshape(weight.scale_shape))
    for codec in (NATIVE, LIBRARY):
        assert torch.equal(codec.dequantize(weight, stored, dense.dtype), dense)
    plain = LIBRARY.decode(weight, stored)
    if codes.packing is not None and plain.packing is not None:
        assert torch.equal(
            unpack_codes(codes.values, codes.packing, codes.shape),
            unpack_codes(plain.values, plain.packing, plain.shape),
        )
    again = encode(entry, codes, args)
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype is tensor.dtype
        assert torch.equal(raw(again[name].reshape(tensor.shape)), raw(tensor)), name


@pytest.mark.newest_library
@settings(max_examples=80, deadline=None)
@given(case=integer_cases("pack-quantized"))
def test_packed_integers(case: Case) -> None:
    assert_read_alike(case)


@settings(max_examples=60, deadline=None)
@given(case=integer_cases("int-quantized"))
def test_integers_in_bytes(case: Case) -> None:
    """The codes have eight bits, or fewer bits as W4A8 stores them."""
    assert_read_alike(case)


@pytest.mark.newest_library
@settings(max_examples=60, deadline=None)
@given(case=block_cases())
def test_float8_blocks(case: Case) -> None:
    assert_read_alike(case)


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([3, 4, 5, 6, 7]),
    deviation=st.sampled_from(["padded", "index", "ragged"]),
    seed=st.integers(0, 2**31),
)
def test_the_library_codec_leaves_what_the_library_misreads_to_the_native_codec(
    bits: int, deviation: str, seed: int
) -> None:
    """The library silently misreads padded words and group indices, and refuses a last group that is not full."""
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    args = QuantArgs(num_bits=bits, strategy=Strategy.GROUP, group_size=24 if deviation == "ragged" else 32)
    codes = Codes(
        values=torch.randint(-half, half, (6, 64), generator=generator, dtype=torch.int8),
        packing=INT8_PLAIN,
        shape=(6, 64),
        scale=torch.rand(6, 3 if deviation == "ragged" else 2, generator=generator),
        group_index=torch.randint(0, 2, (64,), generator=generator) if deviation == "index" else None,
    )
    stored = encode(PACKED_INT, codes, args)
    if deviation == "padded":
        stored["weight_packed"] = pack_codes(codes.values, packed_words(bits, dense=False))
    weight = described(PACKED_INT, args, specs_of(stored), (6, 64))
    ours = NATIVE.dequantize(weight, stored, torch.float32)
    assert torch.equal(LIBRARY.dequantize(weight, stored, torch.float32), ours)
    group = torch.arange(64) // (args.group_size or 1) if codes.group_index is None else codes.group_index
    assert torch.equal(ours, codes.values * codes.scale[:, group])

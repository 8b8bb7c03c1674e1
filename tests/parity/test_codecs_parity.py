"""Codecs compared with the library that writes the files: equal codes, scales, zero points and plain weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from builders import fp8_weights, int_weights
from hypothesis import given, settings
from on_tensors import LIBRARY, NATIVE, Codes, decode, encode, on_tensors
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.arguments import read_weight_args
from trtllm_ct.config.json_object import Findings, JsonObject
from trtllm_ct.formats import format_for
from trtllm_ct.layouts import packing as packing_layout

if TYPE_CHECKING:
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.formats.codecs import Codec

unpack_codes = on_tensors(packing_layout.unpack_codes)

pytestmark = pytest.mark.library

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GROUP = "group"
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 group": ("pack-quantized", int_weights(4, GROUP)),
    "int4 group asymmetric": ("pack-quantized", int_weights(4, GROUP, symmetric=False)),
    "int4 channel": ("pack-quantized", int_weights(4, "channel")),
    "int4 channel asymmetric": ("pack-quantized", int_weights(4, "channel", symmetric=False)),
    "int4 tensor": ("pack-quantized", int_weights(4, "tensor")),
    "int4 tensor asymmetric": ("pack-quantized", int_weights(4, "tensor", symmetric=False)),
    "int8 packed group": ("pack-quantized", int_weights(8, GROUP)),
    "int8 packed channel": ("pack-quantized", int_weights(8, "channel")),
    "int8 packed channel asymmetric": ("pack-quantized", int_weights(8, "channel", symmetric=False)),
    "int8 plain group": ("int-quantized", int_weights(8, GROUP)),
    "int8 plain channel": ("int-quantized", int_weights(8, "channel")),
    "int8 plain channel asymmetric": ("int-quantized", int_weights(8, "channel", symmetric=False)),
    "int8 plain tensor asymmetric": ("int-quantized", int_weights(8, "tensor", symmetric=False)),
    "fp8 tensor": ("float-quantized", fp8_weights("tensor")),
    "fp8 tensor naive": ("naive-quantized", fp8_weights("tensor")),
    "fp8 channel": ("float-quantized", fp8_weights("channel")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The codes and scales that the library was given, the tensors that it stored, and its own decompressed weights."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    stored: dict[str, Tensor]
    dense: Tensor


def write(
    compression: str, arguments: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> Written:
    """Compress and decompress random weights with random scales and zero points, with the library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    generator = torch.Generator().manual_seed(seed)
    groups = shape[1] // args.group_size if args.group_size else 1
    grid = (1,) if args.strategy == "tensor" else (shape[0], groups)
    spread = 2.0 ** torch.randint(-6, 3, grid, generator=generator)
    scale = ((0.5 + torch.rand(grid, generator=generator)) * spread).to(dtype)
    half = 1 << (args.num_bits - 1)
    zero_point = None
    if not args.symmetric:
        zero_point = torch.randint(-half, half, grid, generator=generator, dtype=torch.int8)
    # Some weights exceed the range of the codes, so that the lowest and the highest code occur.
    top = 448 if args.type == "float" else half
    weight = (torch.randn(shape, generator=generator) * top * scale.double().mean() * 0.5).to(dtype)
    state = {"weight": weight, "weight_scale": scale} | (
        {} if zero_point is None else {"weight_zero_point": zero_point}
    )
    compressor = BaseCompressor.get_value_from_registry(compression)
    stored = compressor.compress(state, scheme)
    code_dtype = torch.int8 if args.type == "int" else torch.float8_e4m3fn
    return Written(
        codes=quantize(x=weight, scale=scale, zero_point=zero_point, args=args, dtype=code_dtype),
        scale=scale,
        zero_point=zero_point,
        stored=stored,
        dense=compressor.decompress(stored, scheme)["weight"],
    )


def describe(arguments: dict[str, Any], stored: dict[str, Tensor], shape: tuple[int, int]) -> StoredWeight:
    args = read_weight_args(JsonObject(arguments, "weights", Findings()))
    assert args is not None
    specs = {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()}
    entry = format_for(args, specs)
    assert entry is not None
    faults = FaultCollector()
    weight = entry.describe("lin", args, specs, shape, faults)
    assert not faults.faults
    assert weight is not None
    return weight


def plain_codes(codes: Codes) -> Tensor:
    return codes.values if codes.packing is None else unpack_codes(codes.values, codes.packing, codes.shape)


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor, for comparisons that distinguish NaN codes and signed zeros."""
    return tensor.flatten().view(torch.uint8)


def assert_reads(codec: Codec, arguments: dict[str, Any], stored: dict[str, Tensor], written: Written) -> None:
    shape = (written.codes.shape[0], written.codes.shape[1])
    weight = describe(arguments, stored, shape)
    codes = codec.decode(weight, stored)
    assert torch.equal(bits(plain_codes(codes)), bits(written.codes))
    assert torch.equal(codes.scale.flatten(), written.scale.flatten())
    assert codes.scale.dtype is written.scale.dtype
    zero_point = codes.plain_zero_point
    assert (zero_point is None) is (written.zero_point is None)
    if zero_point is not None and written.zero_point is not None:
        assert torch.equal(zero_point, written.zero_point.reshape(zero_point.shape))
    dense = codec.dequantize(weight, stored, written.dense.dtype)
    assert dense.dtype is written.dense.dtype
    assert torch.equal(dense, written.dense)


@pytest.mark.parametrize(("compression", "arguments"), SCHEMES.values(), ids=SCHEMES.keys())
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 21),
    columns=st.integers(1, 40),
    group_size=st.sampled_from([1, 3, 8, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_both_codecs_read_what_the_library_writes(
    compression: str,
    arguments: dict[str, Any],
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Sizes include rows and columns that do not fill a word; plain weights have the library's output dtype."""
    if arguments["strategy"] == GROUP:
        arguments = arguments | {"group_size": group_size}
        columns = group_size * (1 + columns % 3)  # the library takes whole groups only
        rows += 8  # and fails on zero points that fill less than two words
    written = write(compression, arguments, (rows, columns), dtype, seed)
    for codec in (NATIVE, LIBRARY):
        assert_reads(codec, arguments, written.stored, written)


@pytest.mark.parametrize(("compression", "arguments"), SCHEMES.values(), ids=SCHEMES.keys())
def test_encoding_gives_the_very_tensors_that_the_library_writes(compression: str, arguments: dict[str, Any]) -> None:
    """Names, dtypes and bytes; a scale may have one axis more."""
    written = write(compression, arguments, (10, 64), torch.bfloat16, seed=1)
    weight = describe(arguments, written.stored, (10, 64))
    encoded = encode(weight.format, decode(weight, written.stored), weight.args)
    assert encoded.keys() == written.stored.keys()
    for name, tensor in written.stored.items():
        assert encoded[name].dtype is tensor.dtype
        assert torch.equal(bits(encoded[name].reshape(tensor.shape)), bits(tensor)), name


def surplus_columns(stored: dict[str, Tensor]) -> None:
    stored["weight_zero_point"] = torch.nn.functional.pad(stored["weight_zero_point"], (0, 5), value=12345)


def plain_zero_point(stored: dict[str, Tensor]) -> None:
    """Store the zero point plain, as releases up to 0.9.3 do."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    stored["weight_zero_point"] = unpack_from_int32(
        stored["weight_zero_point"], 4, torch.Size([10, 1]), packed_dim=0
    ).contiguous()


def flat_scale(stored: dict[str, Tensor]) -> None:
    stored["weight_scale"] = stored["weight_scale"].flatten()


def lying_scale(stored: dict[str, Tensor]) -> None:
    stored["weight_scale"] = stored["weight_scale"].reshape(1, -1)


def no_shape(stored: dict[str, Tensor]) -> None:
    del stored["weight_shape"]


@pytest.mark.parametrize("codec", [NATIVE, LIBRARY], ids=["native", "library"])
@pytest.mark.parametrize("deviate", [surplus_columns, plain_zero_point, flat_scale, lying_scale, no_shape])
def test_both_codecs_read_the_variants_of_other_writers(deviate: Any, codec: Codec) -> None:
    """The library without this package refuses or misreads these variants."""
    compression, arguments = SCHEMES["int4 channel asymmetric"]
    written = write(compression, arguments, (10, 64), torch.bfloat16, seed=2)
    deviating = dict(written.stored)
    deviate(deviating)
    assert_reads(codec, arguments, deviating, written)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantizing_to_another_dtype_starts_from_exact_values(dtype: torch.dtype) -> None:
    """The library rounds to the dtype of the scale first; this package rounds once, so its error is never larger."""
    compression, arguments = SCHEMES["int8 packed group"]
    written = write(compression, arguments, (10, 64), torch.bfloat16, seed=3)
    weight = describe(arguments, written.stored, (10, 64))
    scale = written.scale.double().repeat_interleave(32, dim=1)
    exact = written.codes.double() * scale
    native = (NATIVE.dequantize(weight, written.stored, dtype).double() - exact).abs()
    library = (LIBRARY.dequantize(weight, written.stored, dtype).double() - exact).abs()
    assert (native <= library).all()

"""Small floats against the library that writes them: equal codes, scales and bytes; dense values as near as it gets.

The library computes NVFP4 in float32 and rounds to bfloat16 at the end, and MX in bfloat16 throughout, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from float_modules import MXFP4_ARGS, MXFP6_ARGS, MXFP8_ARGS, NVFP4_ARGS, described, random_module
from hypothesis import given, settings
from on_tensors import LIBRARY, NATIVE, decode, encode, on_tensors
from torch import Tensor
from torch_twins import power_of_two

from trtllm_ct.base.schemes import QuantArgs, Strategy
from trtllm_ct.layouts import floats as floats_layout
from trtllm_ct.layouts import packing as packing_layout

if TYPE_CHECKING:
    from on_tensors import Codes

element_values = on_tensors(floats_layout.element_values)
unpack_fields = on_tensors(packing_layout.unpack_fields)

pytestmark = pytest.mark.library

MX = {"mxfp4-pack-quantized": MXFP4_ARGS, "mxfp6-pack-quantized": MXFP6_ARGS, "mxfp8-quantized": MXFP8_ARGS}
FORMATS = {"nvfp4-pack-quantized": NVFP4_ARGS} | MX
every_format = pytest.mark.parametrize(("name", "args"), FORMATS.items(), ids=FORMATS.keys())
every_mx_format = pytest.mark.parametrize(("name", "args"), MX.items(), ids=MX.keys())


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The codes and scales that the library made of a weight, the tensors that it stored, and what it decompressed."""

    codes: Tensor
    scale: Tensor
    stored: dict[str, Tensor]
    dense: Tensor


def scheme_of(args: QuantArgs) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=args.num_bits,
        type=args.type,
        strategy=args.strategy,
        group_size=args.group_size,
        scale_dtype=args.scale_dtype,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def compressor_of(name: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(name)


def write(name: str, args: QuantArgs, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Written:
    """Compress and decompress random weights, calibrated by minimum and maximum, with the library."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = scheme_of(args)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-8, 3, (shape[0], 1), generator=generator)
    weight = rows.to(dtype)
    low, high = weight.reshape(shape[0], -1, scheme.weights.group_size).aminmax(dim=-1)
    divisor = generate_gparam(weight.min(), weight.max()) if args.group_size == 16 else None
    scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=divisor)
    state = {"weight": weight, "weight_scale": scale}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    stored = compressor_of(name).compress(state, scheme)
    return Written(
        codes=quantize(x=weight, scale=scale, zero_point=None, args=scheme.weights, global_scale=divisor),
        scale=scale,
        stored=stored,
        dense=compressor_of(name).decompress(stored, scheme)["weight"],
    )


def numbers(codes: Codes) -> tuple[Tensor, Tensor]:
    """Codes and scales as float64."""
    if codes.packing is None:
        values = codes.values.double()
    else:
        values = element_values(unpack_fields(codes.values, codes.packing, codes.shape), codes.element).double()
    scale = codes.scale
    return values, power_of_two(scale, torch.float64) if scale.dtype is torch.uint8 else scale.double()


def half_a_step(values: Tensor) -> Tensor:
    """Half the distance between neighbouring bfloat16 numbers, which have eight bits of precision."""
    _, exponent = torch.frexp(values)
    return torch.ldexp(torch.ones_like(values), exponent - 9)


@pytest.mark.newest_library
@every_format
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_both_codecs_read_what_the_library_writes(
    name: str, args: QuantArgs, rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    shape = (rows, groups * (args.group_size or 1))
    written = write(name, args, shape, dtype, seed)
    weight = described(args, written.stored, shape)
    assert weight.format.name == name
    for codec in (NATIVE, LIBRARY):
        decoded = codec.decode(weight, written.stored)
        values, scale = numbers(decoded)
        assert torch.equal(values, written.codes.double())
        assert torch.equal(scale, written.scale.double())
        assert torch.equal(decoded.values.view(torch.uint8), written.stored[weight.codes].view(torch.uint8))
    assert torch.equal(LIBRARY.dequantize(weight, written.stored, torch.bfloat16), written.dense)
    # float32 is wrong by 2^-23 at most, so what it rounds to lies beside the nearest bfloat16 only when that is a tie.
    exact = NATIVE.dequantize(weight, written.stored, torch.float64)
    error = (written.dense.double() - exact).abs()
    assert (error <= half_a_step(exact) * (1 + 2**-12)).all()


@pytest.mark.newest_library
@every_mx_format
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_dense_values_of_mx_are_equal(name: str, args: QuantArgs, rows: int, groups: int, seed: int) -> None:
    """The bytes include NaN codes of float8 and signed zeros."""
    stored = random_module(args, (rows, 32 * groups), seed)
    dense = compressor_of(name).decompress(stored, scheme_of(args))["weight"]
    ours = NATIVE.dequantize(described(args, stored), stored, torch.bfloat16)
    assert dense.dtype is torch.bfloat16
    torch.testing.assert_close(ours, dense, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit()[~ours.isnan()], dense.signbit()[~ours.isnan()])


@pytest.mark.newest_library
@every_mx_format
def test_every_exponent_but_nan_is_read_as_the_library_reads_it(name: str, args: QuantArgs) -> None:
    """Products reach both ends of bfloat16. 255 is NaN by the standard, but the library reads it as infinity."""
    stored = random_module(args, (256, 32), seed=6)
    stored["weight_scale"] = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    dense = compressor_of(name).decompress(stored, scheme_of(args))["weight"]
    ours = NATIVE.dequantize(described(args, stored), stored, torch.bfloat16)
    torch.testing.assert_close(ours[:255], dense[:255], rtol=0, atol=0, equal_nan=True)
    assert ours[255].isnan().all()
    assert dense[255].isinf().any()


@pytest.mark.newest_library
@every_format
def test_encoding_gives_the_very_tensors_that_the_library_writes(name: str, args: QuantArgs) -> None:
    written = write(name, args, (10, 64), torch.bfloat16, seed=1)
    weight = described(args, written.stored)
    encoded = encode(weight.format, decode(weight, written.stored), args)
    assert encoded.keys() == written.stored.keys()
    for local, tensor in written.stored.items():
        assert encoded[local].dtype is tensor.dtype
        assert torch.equal(encoded[local].view(torch.uint8), tensor.view(torch.uint8)), local


def scalar_global_scale(stored: dict[str, Tensor]) -> None:
    """Store a scalar global scale; the library then divides in bfloat16."""
    stored["weight_global_scale"] = stored["weight_global_scale"].reshape(())


def scale_bytes(stored: dict[str, Tensor]) -> None:
    """Store the E4M3 scales as uint8; the library treats these bytes as integers."""
    stored["weight_scale"] = stored["weight_scale"].view(torch.uint8)


@pytest.mark.parametrize("deviate", [scalar_global_scale, scale_bytes])
def test_both_codecs_read_what_the_library_gets_wrong(deviate: Any) -> None:
    name, args = "nvfp4-pack-quantized", NVFP4_ARGS
    written = write(name, args, (10, 64), torch.bfloat16, seed=2)
    deviating = dict(written.stored)
    deviate(deviating)
    alone = compressor_of(name).decompress(deviating, scheme_of(args))["weight"]
    assert not torch.equal(alone, written.dense)
    weight = described(args, deviating)
    assert torch.equal(LIBRARY.dequantize(weight, deviating, torch.bfloat16), written.dense)
    exact = NATIVE.dequantize(described(args, written.stored), written.stored, torch.float64)
    assert torch.equal(NATIVE.dequantize(weight, deviating, torch.float64), exact)


@pytest.mark.newest_library
@every_mx_format
def test_both_codecs_read_exponents_of_the_dtype_that_the_library_gets_wrong(name: str, args: QuantArgs) -> None:
    stored = random_module(args, (10, 64), seed=3)
    dense = NATIVE.dequantize(described(args, stored), stored, torch.bfloat16)
    typed = stored | {"weight_scale": stored["weight_scale"].view(torch.float8_e8m0fnu)}
    alone = compressor_of(name).decompress(typed, scheme_of(args))["weight"]
    assert not torch.allclose(alone, dense, equal_nan=True)
    for codec in (NATIVE, LIBRARY):
        ours = codec.dequantize(described(args, typed), typed, torch.bfloat16)
        torch.testing.assert_close(ours, dense, rtol=0, atol=0, equal_nan=True)


def test_third_parties_call_the_strategy_group() -> None:
    args = QuantArgs(num_bits=4, type=NVFP4_ARGS.type, strategy=Strategy.GROUP, group_size=16)
    written = write("nvfp4-pack-quantized", NVFP4_ARGS, (10, 64), torch.bfloat16, seed=4)
    weight = described(args, written.stored)
    assert torch.equal(LIBRARY.dequantize(weight, written.stored, torch.bfloat16), written.dense)


def test_an_expert_without_calibration_is_zero_for_both() -> None:
    """The library without this package divides zero by zero."""
    stored = random_module(NVFP4_ARGS, (6, 64), seed=5) | {"weight_global_scale": torch.zeros(1)}
    weight = described(NVFP4_ARGS, stored)
    for codec in (NATIVE, LIBRARY):
        assert not codec.dequantize(weight, stored, torch.bfloat16).any()


@every_format
def test_a_last_group_that_is_not_full_is_left_to_the_native_codec(name: str, args: QuantArgs) -> None:
    """No release writes such a group, and the library refuses it."""
    columns = (args.group_size or 0) + 7
    stored = random_module(args, (3, columns), seed=7)
    weight = described(args, stored, (3, columns))
    assert weight.format.name == name
    torch.testing.assert_close(
        LIBRARY.dequantize(weight, stored, torch.float32),
        NATIVE.dequantize(weight, stored, torch.float32),
        rtol=0,
        atol=0,
        equal_nan=True,
    )

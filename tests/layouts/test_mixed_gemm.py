"""The order of codes that kernels for narrow weights read: the published vectors, and laws of the order."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import pytest
import torch
from engine_codes import codes_in_stream, stream_of
from on_tensors import on_tensors

from trtllm_ct.layouts import mixed_gemm
from trtllm_ct.layouts.mixed_gemm import KernelOrder

in_kernel_order = on_tensors(mixed_gemm.in_kernel_order)

if TYPE_CHECKING:
    from typing import Literal

# (bits of a code, bits of an input, SM, number of rows, first 24 bytes, CRC-32 of all bytes)
INT4 = "8091d5e62a3b7f80c4d5192a6e7fb3c4a2b3f7084c5d91a2"
INT4_ON_FP8 = "a0b1f506e4f5394a28397d8e6c7db1c2c2d3172806175b6c"
INT8 = "0038073f0e46154d1c54235b2a62316971a978b07fb786be"
VECTORS = [
    (4, 16, 80, 128, INT4, "eb6cc4d9"),
    (4, 16, 90, 128, INT4, "7e6d6328"),
    (4, 8, 89, 256, INT4_ON_FP8, "9c7ce716"),
    (4, 8, 90, 256, INT4_ON_FP8, "611f49d3"),
    (8, 16, 80, 128, INT8, "cf0546d7"),
    (8, 16, 90, 128, INT8, "234cbc1b"),
]
BUNDLES = {(4, 80): 4, (4, 90): 1, (8, 80): 2, (8, 90): 1}


def vector_codes(bits: int, in_: int) -> np.ndarray:
    """The codes [in, 8] of the published vectors."""
    k, n = np.arange(in_)[:, None], np.arange(8)[None]
    if bits == 4:
        return (5 * k + 3 * n + k // 16) % 16 - 8
    return (7 * k + 31 * n + k // 16) % 256 - 128


def made(codes: np.ndarray, bits: Literal[4, 8], bundle: int) -> bytes:
    """The bytes that the package makes of codes [in, out]."""
    rows = torch.from_numpy(codes.T.astype(np.int8).copy())
    return in_kernel_order(rows, KernelOrder(bits=bits, bundle=bundle)).numpy().tobytes()


@pytest.mark.parametrize(("bits", "inputs", "sm", "in_", "first", "checksum"), VECTORS)
def test_the_decoder_of_tests_agrees_with_the_published_vectors(
    bits: int, inputs: int, sm: int, in_: int, first: str, checksum: str
) -> None:
    codes = vector_codes(bits, in_)
    stream = stream_of(codes, bits=bits, inputs=inputs, sm=sm)

    assert (stream[:24].hex(), f"{crc32(stream):08x}") == (first, checksum)
    assert np.array_equal(codes_in_stream(stream, in_, 8, bits=bits, inputs=inputs, sm=sm), codes)


@pytest.mark.parametrize(
    ("bits", "sm", "in_", "first", "checksum"),
    [(bits, sm, in_, first, checksum) for bits, inputs, sm, in_, first, checksum in VECTORS if inputs == 16],
)
def test_the_package_agrees_with_the_published_vectors(
    bits: Literal[4, 8], sm: int, in_: int, first: str, checksum: str
) -> None:
    stream = made(vector_codes(bits, in_), bits, BUNDLES[bits, sm])

    assert (stream[:24].hex(), f"{crc32(stream):08x}") == (first, checksum)


@pytest.mark.parametrize(("bits", "sm"), BUNDLES)
@pytest.mark.parametrize("shape", [(64, 8), (192, 40), (320, 24)], ids=str)
def test_every_code_is_found_where_the_description_has_it(bits: Literal[4, 8], sm: int, shape: tuple[int, int]) -> None:
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, shape)

    stream = made(codes, bits, BUNDLES[bits, sm])

    assert np.array_equal(codes_in_stream(stream, *shape, bits=bits, inputs=16, sm=sm), codes)


@pytest.mark.parametrize(("bits", "sm"), BUNDLES)
def test_rows_and_columns_of_a_part_are_a_part_of_the_bytes(bits: Literal[4, 8], sm: int) -> None:
    """Ranks and parts of fused Linears are cut from what is delivered: by bundles of rows and tiles of columns."""
    order = KernelOrder(bits=bits, bundle=BUNDLES[bits, sm])
    codes = torch.randint(-8, 8, (24, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(1))

    whole = in_kernel_order(codes, order)

    width = whole.shape[1] // 4
    assert torch.equal(in_kernel_order(codes[8:16], order), whole[8 // order.bundle : 16 // order.bundle])
    assert torch.equal(in_kernel_order(codes[:, 64:128].contiguous(), order), whole[:, width : 2 * width])

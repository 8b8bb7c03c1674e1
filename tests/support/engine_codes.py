"""The codes of engine-build checkpoints, read as the description of the format has it; the product is not used.

The order in which kernels for narrow weights read codes is made step by step. A stream is decoded by the position that
each code has in it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KERNEL_BITS", "codes_in_stream", "e2m1_values", "positions", "stream_of"]

KERNEL_BITS = {"W4A16_GPTQ": 4, "W8A16_GPTQ": 8}
"""The algorithms whose files have codes in the order of a kernel, and the bits of a code."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

SHUFFLES = {
    (16, 8): "0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15",
    (16, 4): "0 1 8 9 16 17 24 25 2 3 10 11 18 19 26 27 4 5 12 13 20 21 28 29 6 7 14 15 22 23 30 31",
    (8, 4): "0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31",
}
"""By bits of an input and of a code: the row of a block that each new row takes."""
REGISTERS = {4: "0 2 4 6 1 3 5 7", 8: "0 2 1 3"}


@cache
def positions(in_: int, out: int, *, bits: int, inputs: int, sm: int) -> np.ndarray:
    """The number k * out + n of the code [k, n] at each place of the stream."""
    codes = np.arange(in_ * out).reshape(in_, out)
    block = 128 // bits
    shuffle = [int(row) for row in SHUFFLES[inputs, bits].split()]
    rows = [base + row for base in range(0, in_, block) for row in shuffle]
    streams = codes[rows].T
    if 75 <= sm < 90:
        bundle, tile = inputs // bits, 1024 // inputs
        tiles = [
            streams[first + channel, begin : begin + tile]
            for first in range(0, out, bundle)
            for begin in range(0, in_, tile)
            for channel in range(bundle)
        ]
        streams = np.concatenate(tiles)
    run = [int(element) for element in REGISTERS[bits].split()]
    return streams.reshape(-1, len(run))[:, run].reshape(-1)


def stream_of(codes: np.ndarray, *, bits: int, inputs: int, sm: int) -> bytes:
    """The bytes of signed codes [in, out]."""
    in_, out = codes.shape
    unsigned = codes.reshape(-1)[positions(in_, out, bits=bits, inputs=inputs, sm=sm)] + 2 ** (bits - 1)
    if bits == 4:
        unsigned = unsigned[0::2] + 16 * unsigned[1::2]
    return unsigned.astype(np.uint8).tobytes()


def codes_in_stream(stream: bytes, in_: int, out: int, *, bits: int, inputs: int, sm: int) -> np.ndarray:
    """The signed codes [in, out] of a stream."""
    unsigned = np.frombuffer(stream, np.uint8).astype(np.int64)
    if bits == 4:
        unsigned = np.stack([unsigned % 16, unsigned // 16], axis=1).reshape(-1)
    codes = np.empty(in_ * out, np.int64)
    codes[positions(in_, out, bits=bits, inputs=inputs, sm=sm)] = unsigned - 2 ** (bits - 1)
    return codes.reshape(in_, out)


def e2m1_values(packed: Tensor) -> Tensor:
    """Two FP4 numbers of each byte, the even column in the low half."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return table[halves.long()]

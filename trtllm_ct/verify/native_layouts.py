"""How rows of each native layout are read: the table `NATIVE_LAYOUTS`, in plain numpy.

It shares no code with `layouts/`, which made the converted directory, nor with the torch code of the reference engine;
tests compare both with this table. Before tensors are read here, their names, dtypes and shapes are checked by the
rules of the reference engine.
Axis letters: `N` output features, `K` input features, `g` group size. All scales are multipliers.
Sources: TensorRT-LLM `_torch/modules/linear.py` (main, September 2026) and the exports of ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.verify.native_numbers import e2m1_pairs_in_e4m3, float64_of, powers_of_two
from trtllm_ct.verify.source.coded import Coded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtllm_ct.base.dtypes import DType

__all__ = ["NATIVE_LAYOUTS", "Part", "unpack_row_pairs"]

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a delivered tensor that belongs to some rows: its elements as stored, and their dtype."""

    stored: NDArray[Any]
    dtype: DType

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The elements in float64."""
        return float64_of(self.stored, self.dtype)


Parts = Mapping[str, Part]


def unpack_row_pairs(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Unpack bytes [n/2, K] to signed codes [n, K] of 4 bits; byte (i, k) has row 2i in its low nibble, then 2i + 1."""
    codes = np.empty((2 * len(packed), packed.shape[1]), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[0::2])
    np.floor_divide(packed, 0x10, out=codes[1::2])
    # The sign bit counts -8. Flipped, it makes every code 8 larger, which the subtraction takes back.
    codes ^= 8
    codes -= 8
    return codes.view(np.int8)


def _one_scale(parts: Parts) -> Coded:
    """Codes [n, K] with one scale for the whole tensor."""
    return _coded(parts["weight"].stored, parts["weight_scale"].numbers.reshape(1, 1))


def _row_scales(parts: Parts) -> Coded:
    """Codes [n, K] with one scale per row, [n] or [n, 1]."""
    return _coded(parts["weight"].stored, parts["weight_scale"].numbers.reshape(-1, 1))


def _block_scales(parts: Parts) -> Coded:
    """Codes [n, K] with one scale per block of 128 x 128 codes, on two axes or four; the last blocks may be partial."""
    codes, scale = parts["weight"].stored, parts["weight_scale"].numbers
    rows = scale.reshape(len(scale), -1).repeat(_BLOCK, axis=0)[: len(codes)]
    return Coded(codes=codes, scale=rows, width=_BLOCK)


def _int4_row_scales(parts: Parts) -> Coded:
    """Row pairs of int4 codes with one scale per row, [n]."""
    return _coded(_int4_codes(parts), parts["weight_scale"].numbers.reshape(-1, 1))


def _int4_group_scales(parts: Parts) -> Coded:
    """Row pairs of int4 codes with one scale per group of g columns, [n, K/g]."""
    return _coded(_int4_codes(parts), parts["weight_scale"].numbers)


def _int4_groups_with_zero(parts: Parts) -> Coded:
    """Row pairs of int4 codes with group scales and an offset `weight_zero` [n, K/g] that is added after scaling."""
    return replace(_int4_group_scales(parts), offset=parts["weight_zero"].numbers)


def _nvfp4(parts: Parts) -> Coded:
    """Column pairs of E2M1 codes with an E4M3 scale per 16 columns, and one scale for the whole tensor."""
    scale = parts["weight_scale"].numbers * parts["weight_scale_2"].numbers
    return _coded(_e2m1_codes(parts), scale)


def _mxfp4(parts: Parts) -> Coded:
    """Column pairs of E2M1 codes with a power of two per 32 columns, stored as its exponent."""
    return _coded(_e2m1_codes(parts), _powers_of_two(parts))


def _mxfp8(parts: Parts) -> Coded:
    """E4M3 codes with a power of two per 32 columns, stored as its exponent."""
    return _coded(parts["weight"].stored, _powers_of_two(parts))


def _int4_codes(parts: Parts) -> NDArray[np.int8]:
    return unpack_row_pairs(parts["weight"].stored.view(np.uint8))


def _e2m1_codes(parts: Parts) -> NDArray[np.uint8]:
    """Column pairs as E4M3, which has all numbers of E2M1."""
    return e2m1_pairs_in_e4m3(parts["weight"].stored)


def _powers_of_two(parts: Parts) -> NDArray[np.float64]:
    return powers_of_two(parts["weight_scale"].stored)


def _coded(codes: NDArray[Any], scale: NDArray[np.float64]) -> Coded:
    """Codes [n, K] with scales [n, G] of groups of equal width."""
    return Coded(codes=codes, scale=scale, width=codes.shape[1] // scale.shape[1])


NATIVE_LAYOUTS: Mapping[QuantAlgo, Callable[[Parts], Coded]] = {
    QuantAlgo.W4A16: _int4_row_scales,
    QuantAlgo.W4A16_AWQ: _int4_group_scales,
    QuantAlgo.W4A16_GPTQ: _int4_groups_with_zero,
    # Scales are divided by `weight_scale_2`, and products multiplied by it.
    QuantAlgo.W4A8_AWQ: _int4_group_scales,
    QuantAlgo.W8A16: _row_scales,
    QuantAlgo.FP8: _one_scale,
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: _row_scales,
    QuantAlgo.FP8_BLOCK_SCALES: _block_scales,
    QuantAlgo.NVFP4: _nvfp4,
    QuantAlgo.W4A16_NVFP4: _nvfp4,
    QuantAlgo.MXFP8: _mxfp8,
    QuantAlgo.W4A16_MXFP4: _mxfp4,
    QuantAlgo.W4A8_MXFP4_MXFP8: _mxfp4,
}
"""How the weight of each algorithm is read, given its parts by their names in the rules of the reference engine."""

"""int4 weights become the same NVFP4 from their codes as from their values, and are dequantized where they don't."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.layouts.requantize import LARGEST_OF_NVFP4, to_e2m1_groups
from trtllm_ct.layouts.requantize_int4 import int4_to_e2m1_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

GLOBAL = 2.0**-8
LARGEST_SCALE = LARGEST_OF_NVFP4 * GLOBAL / 8


def packed(codes: NDArray[np.int64]) -> NDArray[np.int32]:
    """Words of eight codes in offset binary, the first one in the lowest bits."""
    fields = (codes + 8).reshape(codes.shape[0], -1, 8)
    return (fields << 4 * np.arange(8)).sum(-1).astype(np.uint32).view(np.int32)


def bfloat16(scale: NDArray[np.float64]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """The bits of scales, rounded to bfloat16 by torch, and their numbers."""
    rounded = torch.from_numpy(scale).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16), rounded.float().numpy()


def check(codes: NDArray[np.int64], scale: NDArray[np.float64]) -> None:
    """Compare with what values give that are computed here."""
    bits, numbers = bfloat16(scale)
    values = codes.astype(np.float32) * np.repeat(numbers, codes.shape[1] // scale.shape[1], axis=1)

    pairs, scales = int4_to_e2m1_groups(packed(codes), bits, GLOBAL)

    expected_pairs, expected_scales = to_e2m1_groups(values, 16, GLOBAL)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(pairs, expected_pairs)
    assert pairs.dtype == scales.dtype == np.uint8


@pytest.mark.parametrize("groups", [1, 2, 16], ids=["a row", "half a row", "each 16 columns"])
@pytest.mark.parametrize("spread", [0.2, 3.0], ids=["alike", "of all sizes"])
def test_the_result_is_that_of_the_values(groups: int, spread: float) -> None:
    random = np.random.default_rng(groups)
    codes = random.integers(-8, 8, (300, 256))
    scale = np.exp(random.normal(-5, spread, (300, groups))).clip(1e-7, LARGEST_SCALE)

    check(codes, scale)


def test_every_mantissa_and_every_largest_magnitude() -> None:
    """All kinds of groups occur, each with several exponents of the scale, down to candidates that are subnormal."""
    mantissas, largest = np.meshgrid(np.arange(128), np.arange(9), indexing="ij")
    random = np.random.default_rng(0)
    for exponent in (-14, -12, -10, -7, -3, 0):
        scale = ((1 + mantissas.ravel() / 128) * 2.0**exponent)[:, None].clip(0, LARGEST_SCALE)
        limit = largest.ravel()[:, None]
        codes = np.clip(random.integers(-8, 8, (limit.size, 16)), -limit, np.minimum(limit, 7))
        codes[:, :1] = -limit
        check(codes, scale)


@given(st.lists(st.integers(-8, 7), min_size=16, max_size=16), st.floats(2.0**-20, LARGEST_SCALE))
@settings(max_examples=300, deadline=None)
def test_any_group(codes: list[int], scale: float) -> None:
    check(np.array([codes]), np.array([[scale]]))


@pytest.mark.parametrize("code", [0, -8, 7], ids=str)
def test_a_constant_weight(code: int) -> None:
    check(np.full((3, 32), code), np.full((3, 2), 0.01))


def test_words_need_not_be_aligned_or_contiguous() -> None:
    """Words in a file lie at multiples of four bytes, and rows of a slice have gaps."""
    codes = np.random.default_rng(1).integers(-8, 8, (4, 64))
    bits, _ = bfloat16(np.full((4, 4), 0.01))
    words = packed(codes)
    shifted = np.frombuffer(b"----" + words.tobytes(), np.int32)[1:].reshape(words.shape)
    gaps = np.concatenate([words, words], axis=1)[:, : words.shape[1]]

    expected = int4_to_e2m1_groups(words, bits, GLOBAL)

    for given_words in (shifted, gaps):
        found = int4_to_e2m1_groups(given_words, bits, GLOBAL)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))

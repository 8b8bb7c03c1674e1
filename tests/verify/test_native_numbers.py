"""The numbers in delivered tensors: every bit pattern, as torch reads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_ct.base.dtypes import DType
from trtllm_ct.verify.native_numbers import e2m1_pairs_in_e4m3, float64_of, powers_of_two

BYTES = np.arange(256, dtype=np.uint8)
WORDS = np.arange(1 << 16, dtype=np.uint16)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def bits_of(values: np.ndarray) -> list[int]:
    """The bits of numbers, so that zeros have signs; every NaN counts as the same."""
    return np.where(np.isnan(values), np.nan, values).view(np.uint64).tolist()


@pytest.mark.parametrize(
    ("dtype", "stored", "signed"),
    [(DType.F8_E4M3, BYTES, np.int8), (DType.BF16, WORDS, np.int16), (DType.F16, WORDS.view(np.float16), np.float16)],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN that signals
def test_every_float_of_16_bits_or_less(dtype: DType, stored: np.ndarray, signed: type) -> None:
    expected = torch.from_numpy(stored.view(signed)).view(dtype.torch_dtype).double().numpy()

    assert bits_of(float64_of(stored, dtype)) == bits_of(expected)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F64])
def test_wider_floats_stay_what_they_are(dtype: DType) -> None:
    stored = np.array([[1.1, -0.0], [np.inf, np.nan]], np.float32 if dtype is DType.F32 else np.float64)

    assert bits_of(float64_of(stored, dtype)) == bits_of(stored.astype(np.float64))


def test_every_power_of_two() -> None:
    expected = torch.from_numpy(BYTES).view(torch.float8_e8m0fnu).double().numpy()

    assert bits_of(powers_of_two(BYTES)) == bits_of(expected)
    assert powers_of_two(np.array([[127, 0]], np.uint8)).tolist() == [[1.0, 2.0**-127]]


def test_every_pair_of_e2m1_codes_has_the_first_in_the_low_nibble() -> None:
    values = [*E2M1, *(-value for value in E2M1)]
    expected = [number for byte in range(256) for number in (values[byte & 15], values[byte >> 4])]

    codes = e2m1_pairs_in_e4m3(BYTES.reshape(16, 16))

    assert codes.shape == (16, 32)
    assert bits_of(float64_of(codes.ravel(), DType.F8_E4M3)) == bits_of(np.array(expected))

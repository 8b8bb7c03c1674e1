"""Stored tensors as numpy arrays: the same numbers as torch reads, and scales that are judged by their bits."""

from __future__ import annotations

from itertools import product
from math import inf, nan

import numpy as np
import pytest
import torch

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.layouts.packing import pack_codes, packed_words
from trtllm_ct.layouts.stored_array import StoredArray, scalar, unpack_along_rows
from trtllm_ct.layouts.torch_tensors import array_of, tensor_of

FLOATS = [DType.F8_E4M3, DType.F8_E5M2, DType.BF16, DType.F16, DType.F32, DType.F64]


def every_number(dtype: DType) -> torch.Tensor:
    """All bit patterns of a float of 16 bits or less."""
    bits = torch.arange(1 << dtype.bits)
    return bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype.torch_dtype)


def scale(dtype: DType, *numbers: float) -> StoredArray:
    return array_of(torch.tensor(numbers, dtype=torch.float64).to(dtype.torch_dtype))


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0, DType.BF16, DType.F16])
def test_every_bit_pattern_is_the_number_that_torch_reads(dtype: DType) -> None:
    expected = every_number(dtype).float().numpy()

    numbers = array_of(every_number(dtype)).numbers

    assert np.array_equal(numbers.astype(np.float32), expected, equal_nan=True)
    zeros = expected == 0
    assert np.array_equal(np.signbit(numbers[zeros]), np.signbit(expected[zeros]))


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5)], ids=str)
def test_bytes_and_tensors_make_the_same_array(dtype: DType, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(15)[: TensorSpec(dtype, shape).numel].reshape(shape).to(dtype.torch_dtype)
    data = memoryview(bytearray(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()))

    arrays = StoredArray.of_bytes(data, TensorSpec(dtype, shape)), array_of(tensor)

    assert [array.elements.shape for array in arrays] == [shape, shape]
    assert arrays[0].elements.dtype == arrays[1].elements.dtype
    assert np.array_equal(arrays[0].numbers, arrays[1].numbers)
    assert arrays[0].spec == TensorSpec(dtype, shape)
    for array in arrays:
        made = tensor_of(array)
        assert (made.dtype, tuple(made.shape), made.is_contiguous()) == (tensor.dtype, shape, True)
        assert torch.equal(made.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_tensor_that_is_not_contiguous_is_read_in_its_order() -> None:
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3).T

    assert array_of(tensor).elements.tolist() == tensor.tolist()


def test_memory_is_shared_with_a_tensor() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    array = array_of(tensor)

    tensor[2] = 1

    assert array.numbers.tolist() == [0, 0, 1, 0]
    assert tensor_of(array).data_ptr() == tensor.data_ptr()


def test_a_tensor_keeps_the_memory_of_its_array_alive() -> None:
    tensor = tensor_of(StoredArray(np.full(1000, 0x3F80, np.uint16), DType.BF16))
    others = [np.full(1000, 7, np.uint16) for _ in range(20)]

    assert tensor.tolist() == [1.0] * 1000
    assert len(others) == 20


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("number", [0, 1])
def test_filling(dtype: DType, number: int) -> None:
    filled = StoredArray.filled(TensorSpec(dtype, (2, 3)), number)

    expected = torch.full((2, 3), number, dtype=torch.float32)
    # E8M0 has no zero: its least exponent stands for it.
    expected = expected if number or dtype is not DType.F8_E8M0 else torch.full((2, 3), 2.0**-127)
    assert torch.equal(tensor_of(filled).float(), expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype is not DType.F8_E4M3])
def test_infinity_and_nan_are_told_from_numbers(dtype: DType) -> None:
    numbers = array_of(torch.tensor([1.0, inf, -inf, nan, -0.0], dtype=torch.float64).to(dtype.torch_dtype))

    assert numbers.is_infinite.tolist() == [False, True, True, False, False]
    assert [numbers[i : i + 1].is_finite for i in range(5)] == [True, False, False, False, True]
    assert numbers[:0].is_finite


@pytest.mark.parametrize("dtype", FLOATS)
def test_magnitudes_have_the_order_of_absolute_values(dtype: DType) -> None:
    array = array_of(torch.tensor([0.0, -0.0, 0.5, -2.0, 2.0, nan], dtype=torch.float64).to(dtype.torch_dtype))

    zero, minus_zero, half, minus_two, two, unknown = array.magnitudes.tolist()
    assert zero == minus_zero < half < minus_two == two < unknown
    assert (array[:5].largest, array[:0].largest) == (2.0, 0.0)
    assert np.isnan(array.largest)


@pytest.mark.parametrize("number", [0.0, 1.5, 1e300, inf])
def test_scalars_are_rounded_to_float32(number: float) -> None:
    assert scalar(number).spec == TensorSpec(DType.F32, (1,))
    assert float(scalar(number)) == torch.tensor(number, dtype=torch.float64).float().item()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("numbers", "allowed", "positive"),
    [
        ((1.0, 0.5, 2.0), True, True),
        ((1.0, 0.0), True, False),
        ((1.0, -0.5), False, False),
        ((1.0, nan), False, False),
        ((nan,), False, False),
        ((1.0, -0.0), False, False),
        ((), False, False),
    ],
)
def test_scales_are_judged_by_their_bits(
    dtype: DType, numbers: tuple[float, ...], allowed: bool, positive: bool
) -> None:
    array = scale(dtype, *numbers)

    assert array.is_finite_scale(zero_allowed=True) is allowed
    assert array.is_finite_scale(zero_allowed=False) is positive


def test_bits_of_integers_show_nothing() -> None:
    array = StoredArray(np.array([3, 0, -1], np.int32), DType.I32)

    assert not array.is_finite_scale(zero_allowed=True)
    assert array.zeros == 1


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype is not DType.F8_E4M3])
@pytest.mark.parametrize("number", [inf, -inf])
def test_infinity_is_no_scale(dtype: DType, number: float) -> None:
    assert not scale(dtype, 1.0, number).is_finite_scale(zero_allowed=True)


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0, DType.BF16, DType.F16])
def test_no_bit_pattern_is_judged_wrongly(dtype: DType) -> None:
    for element in np.array_split(array_of(every_number(dtype)).elements, 256):
        for index in {0, len(element) - 1}:
            array = StoredArray(element[index : index + 1], dtype)
            (number,) = array.numbers.tolist()
            fits = 0 <= number < inf and not np.signbit(number)
            assert array.is_finite_scale(zero_allowed=True) is fits
            assert array.is_finite_scale(zero_allowed=False) is (fits and number > 0)
            assert array.zeros == (number == 0)


def test_bytes_can_be_read_as_another_dtype() -> None:
    array = StoredArray(np.array([0x38, 0x7F], np.uint8), DType.U8)

    assert array.read_as(DType.F8_E4M3).numbers.tolist()[0] == 1.0
    assert array.read_as(DType.F8_E8M0).numbers.tolist() == [2.0 ** (0x38 - 127), 1.0]
    assert array.read_as(DType.F8_E8M0).zeros == 0


@pytest.mark.parametrize(("bits", "dense"), list(product(range(1, 9), (True, False))))
@pytest.mark.parametrize("shape", [(1, 1), (33, 3), (64, 2)], ids=str)
def test_codes_along_rows_are_unpacked_as_they_were_packed(bits: int, dense: bool, shape: tuple[int, int]) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packing = packed_words(bits, axis=0, dense=dense)
    words = torch.from_numpy(pack_codes(codes.numpy(), packing))
    surplus = torch.cat((words, words[:, :1]), dim=1)

    for stored in (words, surplus):
        assert unpack_along_rows(stored.numpy(), packing, shape).tolist() == codes.tolist()

"""Reading the bytes of small tensors without torch, checked against torch and against a slow packer of codes."""

from __future__ import annotations

import math
from itertools import product

import oracles
import pytest
import torch
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing
from trtllm_ct.layouts.raw_bytes import is_contiguous_index, is_zero, is_zero_packed, read_integers, read_scalar

SCALARS = [DType.F32, DType.F16, DType.BF16]
INTEGERS = [DType.I32, DType.I64]
WIDE = [*SCALARS, DType.F64]
ZERO_POINTS = [
    Packing(bits=bits, container=DType.I32, axis=0, offset_binary=True, dense=dense)
    for bits, dense in product(range(1, 9), (True, False))
]


def in_file(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor in a file."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class TestNumber:
    @pytest.mark.parametrize("dtype", SCALARS, ids=str)
    @given(data=st.data())
    def test_any_bits_are_read_as_torch_reads_them(self, dtype: DType, data: st.DataObject) -> None:
        """Also infinity, NaN and subnormal numbers; the sign of zero stays."""
        stored = data.draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize))
        want = torch.frombuffer(bytearray(stored), dtype=dtype.torch_dtype).item()

        value_read = read_scalar(stored, dtype)

        assert (
            math.isnan(value_read)
            if math.isnan(want)
            else (value_read, math.copysign(1, value_read)) == (want, math.copysign(1, want))
        )

    @pytest.mark.parametrize("dtype", SCALARS, ids=str)
    @pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, 2.0**-14])
    def test_special_values(self, dtype: DType, value: float) -> None:
        value_read = read_scalar(in_file(torch.tensor(value, dtype=dtype.torch_dtype)), dtype)

        assert (value_read, math.copysign(1, value_read)) == (value, math.copysign(1, value))


class TestIntegers:
    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @given(data=st.data())
    def test_all_elements_are_read(self, dtype: DType, data: st.DataObject) -> None:
        top = 1 << (dtype.bits - 1)
        values = data.draw(st.lists(st.integers(-top, top - 1), max_size=8))

        assert read_integers(in_file(torch.tensor(values, dtype=dtype.torch_dtype)), dtype) == tuple(values)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_elements_are_in_row_major_order(self, dtype: DType) -> None:
        stored = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=dtype.torch_dtype)

        assert read_integers(in_file(stored), dtype) == (1, -2, 3, 4, 5, -6)


class TestIsZero:
    @pytest.mark.parametrize("dtype", DType, ids=str)
    @pytest.mark.parametrize("count", [0, 1, 7])
    def test_zeros_of_every_dtype(self, dtype: DType, count: int) -> None:
        assert is_zero(bytes(count * dtype.itemsize), dtype)

    @pytest.mark.parametrize("dtype", DType, ids=str)
    def test_any_single_bit_makes_it_nonzero(self, dtype: DType) -> None:
        """Except the sign bit of a float, because -0.0 is zero."""
        zeros = bytes(3 * dtype.itemsize)
        for bit in range(8 * len(zeros)):
            data = bytearray(zeros)
            data[bit // 8] |= 1 << bit % 8

            is_sign = dtype in WIDE and bit % dtype.bits == dtype.bits - 1
            assert is_zero(bytes(data), dtype) is is_sign, bit

    @pytest.mark.parametrize("dtype", WIDE, ids=str)
    @pytest.mark.parametrize(
        ("values", "zero"),
        [
            ([0.0, -0.0], True),
            ([-0.0, -0.0, -0.0], True),
            ([0.0, math.nan], False),
            ([-math.nan], False),
            ([math.inf], False),
            ([0.0, -1.0], False),
        ],
        ids=str,
    )
    def test_special_values_of_floats(self, dtype: DType, values: list[float], zero: bool) -> None:
        assert is_zero(in_file(torch.tensor(values, dtype=dtype.torch_dtype)), dtype) is zero

    @pytest.mark.parametrize("dtype", [DType.I8, DType.U8, DType.I32], ids=str)
    def test_the_smallest_integer_is_not_negative_zero(self, dtype: DType) -> None:
        assert not is_zero(bytes(dtype.itemsize - 1) + b"\x80", dtype)

    @pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.I8, DType.I32], ids=str)
    @given(data=st.data())
    def test_any_bytes_are_zero_if_torch_says_so(self, dtype: DType, data: st.DataObject) -> None:
        byte = st.sampled_from([0, 0, 0, 0x80, 1])
        count = data.draw(st.integers(1, 3))
        stored = bytes(data.draw(st.lists(byte, min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)))

        tensor = torch.frombuffer(bytearray(stored), dtype=dtype.torch_dtype)

        assert is_zero(stored, dtype) is bool((tensor == 0).all())


class TestIsZeroPacked:
    @pytest.mark.parametrize("rows", [1, 7, 8, 10, 31, 32, 33, 64, 70])
    @pytest.mark.parametrize("packing", ZERO_POINTS, ids=str)
    def test_one_nonzero_code_is_seen_anywhere(self, packing: Packing, rows: int) -> None:
        """In the first row, in the last row, and where a code straddles two words."""
        codes = torch.zeros(rows, 3, dtype=torch.int64).numpy()

        assert is_zero_packed(in_file(oracles.pack(codes, packing)), packing, (rows, 3))

        for row in {0, rows // 2, min(rows - 1, 32 // packing.bits), rows - 1}:
            for value in {-(1 << (packing.bits - 1)), -1, (1 << (packing.bits - 1)) - 1} - {0}:
                codes[row, 1] = value
                assert not is_zero_packed(in_file(oracles.pack(codes, packing)), packing, (rows, 3)), (row, value)
            codes[row, 1] = 0

    @settings(max_examples=80, deadline=None)
    @given(packing=st.sampled_from(ZERO_POINTS), rows=st.integers(1, 40), surplus=st.integers(0, 3), data=st.data())
    def test_garbage_beside_and_behind_the_codes_is_ignored(
        self, packing: Packing, rows: int, surplus: int, data: st.DataObject
    ) -> None:
        """Garbage in surplus columns, in the bits behind the last row, and in the unused highest bits of words."""
        columns = 2
        words = oracles.pack(torch.zeros(rows, columns, dtype=torch.int64).numpy(), packing)
        wide = torch.randint(-(2**31), 2**31, (words.shape[0], columns + surplus), generator=seeded(data)).int()
        wide[:, :columns] = words | wide[:, :columns] & spare_bits(packing, rows)

        assert is_zero_packed(in_file(wide), packing, (rows, columns))


def seeded(data: st.DataObject) -> torch.Generator:
    return torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))


def spare_bits(packing: Packing, rows: int) -> torch.Tensor:
    """Return a mask of the bits in each word of a column that belong to no code, int32 [W, 1]."""
    half = 1 << (packing.bits - 1)
    ends = [torch.full((rows, 1), value, dtype=torch.int64).numpy() for value in (-half, half - 1)]
    none, all_ = (oracles.pack(codes, packing) for codes in ends)
    return ~(none | all_)


class TestIsContiguousIndex:
    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @pytest.mark.parametrize(("columns", "group"), [(1, 1), (8, 8), (8, 128), (12, 4), (10, 4), (0, 4)])
    def test_contiguous_groups(self, dtype: DType, columns: int, group: int) -> None:
        """One group, several groups, and a last group that has fewer columns."""
        index = torch.arange(columns, dtype=dtype.torch_dtype) // group

        assert is_contiguous_index(in_file(index), dtype, group)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @pytest.mark.parametrize("place", [0, 5, 11])
    def test_one_column_in_another_group_is_not_contiguous(self, dtype: DType, place: int) -> None:
        index = torch.arange(12, dtype=dtype.torch_dtype) // 4
        index[place] = (index[place] + 1) % 3

        assert not is_contiguous_index(in_file(index), dtype, 4)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @pytest.mark.parametrize("group", [2, 3, 8])
    def test_groups_of_another_size_are_not_contiguous(self, dtype: DType, group: int) -> None:
        assert not is_contiguous_index(in_file(torch.arange(12, dtype=dtype.torch_dtype) // 4), dtype, group)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_an_index_with_minus_one_was_never_filled(self, dtype: DType) -> None:
        index = torch.full((12,), -1, dtype=dtype.torch_dtype)
        assert is_contiguous_index(in_file(index), dtype, 4)
        index[:11] = 2
        assert is_contiguous_index(in_file(index), dtype, 4)

    @pytest.mark.parametrize("value", [-2, 2**31 - 1, 255 << 8])
    def test_other_invalid_groups_are_not_contiguous(self, value: int) -> None:
        """A byte 0xff inside a number does not count as -1."""
        index = torch.zeros(4, dtype=torch.int32)
        index[2] = value

        assert not is_contiguous_index(in_file(index), DType.I32, 4)

    @given(group=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
    def test_a_permuted_index_is_contiguous_only_when_nothing_moved(self, group: int, columns: int, seed: int) -> None:
        index = torch.arange(columns) // group
        moved = index[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]

        assert is_contiguous_index(in_file(moved), DType.I64, group) is torch.equal(moved, index)


def test_no_heavy_package_is_imported() -> None:
    done = run_python(
        """
        import sys
        from trtllm_ct.base.dtypes import DType
        from trtllm_ct.layouts.raw_bytes import is_contiguous_index, is_zero, read_integers, read_scalar

        assert read_scalar(bytes.fromhex("803f"), DType.BF16) == 1
        assert read_integers(bytes(4), DType.I32) == (0,)
        assert is_zero(bytes(8), DType.F32) and is_contiguous_index(bytes(8), DType.I32, 4)
        print(sorted({"torch", "numpy", "numba"} & set(sys.modules)))
        """
    )

    assert done.stdout.strip() == "[]"

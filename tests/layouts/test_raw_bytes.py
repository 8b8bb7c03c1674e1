"""What the bytes of small tensors say, held to torch, which writes them here, and to the slow twin that packs codes."""

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
from trtllm_ct.layouts.raw_bytes import integers, is_contiguous_index, is_zero, is_zero_packed, number

SCALARS = [DType.F32, DType.F16, DType.BF16]
INTEGERS = [DType.I32, DType.I64]
WIDE = [*SCALARS, DType.F64]
ZERO_POINTS = [
    Packing(bits=bits, container=DType.I32, axis=0, offset_binary=True, dense=dense)
    for bits, dense in product(range(1, 9), (True, False))
]


def in_file(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class TestNumber:
    @pytest.mark.parametrize("dtype", SCALARS, ids=str)
    @given(data=st.data())
    def test_any_bits_are_the_number_that_torch_sees_in_them(self, dtype: DType, data: st.DataObject) -> None:
        """Infinity, NaN and subnormal numbers among them; the sign of zero stays."""
        stored = data.draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize))
        want = torch.frombuffer(bytearray(stored), dtype=dtype.torch_dtype).item()

        found = number(stored, dtype)

        assert (
            math.isnan(found)
            if math.isnan(want)
            else (found, math.copysign(1, found)) == (want, math.copysign(1, want))
        )

    @pytest.mark.parametrize("dtype", SCALARS, ids=str)
    @pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, 2.0**-14])
    def test_sentinels(self, dtype: DType, value: float) -> None:
        found = number(in_file(torch.tensor(value, dtype=dtype.torch_dtype)), dtype)

        assert (found, math.copysign(1, found)) == (value, math.copysign(1, value))


class TestIntegers:
    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @given(data=st.data())
    def test_the_elements_row_after_row(self, dtype: DType, data: st.DataObject) -> None:
        top = 1 << (dtype.bits - 1)
        values = data.draw(st.lists(st.integers(-top, top - 1), max_size=8))

        assert integers(in_file(torch.tensor(values, dtype=dtype.torch_dtype)), dtype) == tuple(values)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_rows_lie_one_behind_the_other(self, dtype: DType) -> None:
        stored = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=dtype.torch_dtype)

        assert integers(in_file(stored), dtype) == (1, -2, 3, 4, 5, -6)


class TestIsZero:
    @pytest.mark.parametrize("dtype", DType, ids=str)
    @pytest.mark.parametrize("count", [0, 1, 7])
    def test_zeros_are_in_every_dtype(self, dtype: DType, count: int) -> None:
        assert is_zero(bytes(count * dtype.itemsize), dtype)

    @pytest.mark.parametrize("dtype", DType, ids=str)
    def test_one_bit_anywhere_makes_it_another(self, dtype: DType) -> None:
        """But for the sign of a float: minus zero is zero."""
        zeros = bytes(3 * dtype.itemsize)
        for place in range(8 * len(zeros)):
            data = bytearray(zeros)
            data[place // 8] |= 1 << place % 8

            sign = dtype in WIDE and place % dtype.bits == dtype.bits - 1
            assert is_zero(bytes(data), dtype) is sign, place

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
    def test_sentinels_of_floats(self, dtype: DType, values: list[float], zero: bool) -> None:
        assert is_zero(in_file(torch.tensor(values, dtype=dtype.torch_dtype)), dtype) is zero

    @pytest.mark.parametrize("dtype", [DType.I8, DType.U8, DType.I32], ids=str)
    def test_the_least_integer_is_no_minus_zero(self, dtype: DType) -> None:
        assert not is_zero(bytes(dtype.itemsize - 1) + b"\x80", dtype)

    @pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.I8, DType.I32], ids=str)
    @given(data=st.data())
    def test_torch_says_the_same_of_any_bytes(self, dtype: DType, data: st.DataObject) -> None:
        octet = st.sampled_from([0, 0, 0, 0x80, 1])
        count = data.draw(st.integers(1, 3))
        stored = bytes(data.draw(st.lists(octet, min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)))

        tensor = torch.frombuffer(bytearray(stored), dtype=dtype.torch_dtype)

        assert is_zero(stored, dtype) is bool((tensor == 0).all())


class TestIsZeroPacked:
    @pytest.mark.parametrize("rows", [1, 7, 8, 10, 31, 32, 33, 64, 70])
    @pytest.mark.parametrize("packing", ZERO_POINTS, ids=str)
    def test_packed_zeros_are_and_one_code_that_differs_is_not(self, packing: Packing, rows: int) -> None:
        """In the first row, the last one, and where a code straddles two words."""
        codes = torch.zeros(rows, 3, dtype=torch.int64).numpy()

        assert is_zero_packed(in_file(oracles.pack(codes, packing)), packing, (rows, 3))

        for row in {0, rows // 2, min(rows - 1, 32 // packing.bits), rows - 1}:
            for value in {-(1 << (packing.bits - 1)), -1, (1 << (packing.bits - 1)) - 1} - {0}:
                codes[row, 1] = value
                assert not is_zero_packed(in_file(oracles.pack(codes, packing)), packing, (rows, 3)), (row, value)
            codes[row, 1] = 0

    @settings(max_examples=80, deadline=None)
    @given(packing=st.sampled_from(ZERO_POINTS), rows=st.integers(1, 40), surplus=st.integers(0, 3), data=st.data())
    def test_garbage_beside_and_behind_the_codes_is_not_looked_at(
        self, packing: Packing, rows: int, surplus: int, data: st.DataObject
    ) -> None:
        """Surplus columns, the bits behind the last row, and the highest bits of words that codes don't fill."""
        columns = 2
        words = oracles.pack(torch.zeros(rows, columns, dtype=torch.int64).numpy(), packing)
        wide = torch.randint(-(2**31), 2**31, (words.shape[0], columns + surplus), generator=seeded(data)).int()
        wide[:, :columns] = words | wide[:, :columns] & spare_bits(packing, rows)

        assert is_zero_packed(in_file(wide), packing, (rows, columns))


def seeded(data: st.DataObject) -> torch.Generator:
    return torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))


def spare_bits(packing: Packing, rows: int) -> torch.Tensor:
    """The bits of each word of a column that belong to no code, int32 [W, 1]."""
    half = 1 << (packing.bits - 1)
    ends = [torch.full((rows, 1), value, dtype=torch.int64).numpy() for value in (-half, half - 1)]
    none, all_ = (oracles.pack(codes, packing) for codes in ends)
    return ~(none | all_)


class TestIsContiguousIndex:
    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @pytest.mark.parametrize(("columns", "group"), [(1, 1), (8, 8), (8, 128), (12, 4), (10, 4), (0, 4)])
    def test_columns_in_order(self, dtype: DType, columns: int, group: int) -> None:
        """One group, several, and a last one that is cut short."""
        index = torch.arange(columns, dtype=dtype.torch_dtype) // group

        assert is_contiguous_index(in_file(index), dtype, group)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @pytest.mark.parametrize("place", [0, 5, 11])
    def test_one_column_in_another_group_is_another_order(self, dtype: DType, place: int) -> None:
        index = torch.arange(12, dtype=dtype.torch_dtype) // 4
        index[place] = (index[place] + 1) % 3

        assert not is_contiguous_index(in_file(index), dtype, 4)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    @pytest.mark.parametrize("group", [2, 3, 8])
    def test_groups_of_another_size_are_another_order(self, dtype: DType, group: int) -> None:
        assert not is_contiguous_index(in_file(torch.arange(12, dtype=dtype.torch_dtype) // 4), dtype, group)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_minus_one_says_that_nobody_filled_it(self, dtype: DType) -> None:
        index = torch.full((12,), -1, dtype=dtype.torch_dtype)
        assert is_contiguous_index(in_file(index), dtype, 4)
        index[:11] = 2
        assert is_contiguous_index(in_file(index), dtype, 4)

    @pytest.mark.parametrize("value", [-2, 2**31 - 1, 255 << 8])
    def test_other_numbers_that_are_no_group_are_another_order(self, value: int) -> None:
        """Bytes of 0xff inside of a number are no -1."""
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
        from trtllm_ct.layouts.raw_bytes import integers, is_contiguous_index, is_zero, number

        assert number(bytes.fromhex("803f"), DType.BF16) == 1
        assert integers(bytes(4), DType.I32) == (0,)
        assert is_zero(bytes(8), DType.F32) and is_contiguous_index(bytes(8), DType.I32, 4)
        print(sorted({"torch", "numpy", "numba"} & set(sys.modules)))
        """
    )

    assert done.stdout.strip() == "[]"

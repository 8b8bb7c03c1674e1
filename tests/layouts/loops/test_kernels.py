"""Compiled loops compute the same bits as independent implementations, and touch no other memory.

The references are the operations of numpy in `packing.py` and `scales.py`, those of torch in `torch_twins.py`, the slow
implementations of `oracles.py`, exact fractions, and the rounding of numpy and torch. The tests set the size limit to
0, so that loops run on small tensors.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import oracles
import pytest
import torch
import torch_twins
from float_modules import number
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from on_tensors import Scaling, tensor_module

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing
from trtllm_ct.layouts import floats
from trtllm_ct.layouts import packing as packing_module
from trtllm_ct.layouts import scales as scales_module
from trtllm_ct.layouts.floats import E2M1_PACKED, E2M3_PACKED
from trtllm_ct.layouts.loops import dispatch as dispatch_module
from trtllm_ct.layouts.loops import kernels
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, packed_words
from trtllm_ct.layouts.stored_array import numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

dispatch, packing, scales = map(tensor_module, (dispatch_module, packing_module, scales_module))
element_values = tensor_module(floats).element_values

ALONG_COLUMNS = [
    Packing(bits=bits, container=container, axis=1, offset_binary=offset_binary, dense=dense)
    for bits, container, offset_binary, dense in product(
        range(1, 9), (DType.U8, DType.I8, DType.I32), (False, True), (True, False)
    )
]
WORD_LAYOUTS = [packed_words(bits, dense=dense) for bits, dense in product(range(1, 9), (True, False))]
ALONG_ROWS = [packed_words(bits, axis=0, dense=dense) for bits, dense in product(range(1, 9), (True, False))]
TARGETS = {"row pairs": INT4_ROW_PAIRS, "int8": INT8_PLAIN}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NARROW = DTYPES[:2]
FLOATS = {Element.E4M3: None, Element.E2M1: E2M1_PACKED, Element.E2M3: E2M3_PACKED}
LOOPS = sorted(set(kernels.__all__) - {"OUTPUT_DTYPES"})
GUARD = 96
"""Number of bytes before and behind an output that must not change; a multiple of every item size."""


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let loops handle tensors of any size, and yield the names of the loops that ran.

    Tests check these names, because a test in which no loop ran proves nothing.
    """
    monkeypatch.setattr(dispatch_module, "_MIN_CODES", 0)
    with watched() as ran:
        yield ran


@contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list that collects the names of the loops that run inside the block, in order."""
    ran: list[str] = []

    def recorded(name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(name)
            return loop(*arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in LOOPS:
            patch.setattr(kernels, name, recorded(name, getattr(kernels, name)))
        yield ran


def random_codes(shape: tuple[int, int], bits: int, seed: int) -> Tensor:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    codes.view(-1)[0] = -half
    codes.view(-1)[-1] = half - 1
    return codes


def is_in(result: Tensor, written: Any) -> bool:
    """Whether a result is the array that a loop wrote to; a tensor of one element is a copy of it."""
    return result.numel() == 1 or result.data_ptr() == written.ctypes.data


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal, except that any NaN equals any other NaN; -0.0 differs from +0.0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or not torch.equal(one.isnan(), other.isnan()):
        return False
    one, other = (
        one.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),
        other.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),
    )
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@contextmanager
def guarded() -> Iterator[list[np.ndarray[Any, Any]]]:
    """Place the results of loops between guard bytes, and check at the end of the block that these are unchanged.

    Yields a list that collects the arrays that loops wrote to, in order.
    """
    results: list[np.ndarray[Any, Any]] = []
    buffers: list[np.ndarray[Any, Any]] = []

    def empty(shape: tuple[int, ...], dtype: DType) -> np.ndarray[Any, Any]:
        size = math.prod(shape) * dtype.itemsize
        buffers.append(np.full(GUARD + size + GUARD, 0xA5, np.uint8))
        results.append(buffers[-1][GUARD : GUARD + size].view(numpy_dtype(dtype)).reshape(shape))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch_module, "empty", empty)
        yield results
    for buffer in buffers:
        assert (buffer[:GUARD] == 0xA5).all()
        assert (buffer[-GUARD:] == 0xA5).all()


def strided(tensor: Tensor, how: str) -> Tensor:
    """Return the same elements with other strides."""
    if how == "every other row":
        wide = torch.stack((tensor, ~tensor), dim=1)
        return wide.flatten(0, 1)[::2]
    if how == "every other column":
        wide = torch.stack((tensor, ~tensor), dim=2)
        return wide.flatten(1, 2)[:, ::2]
    if how == "transposed":
        return tensor.T.contiguous().T
    return tensor


STRIDES = ["contiguous", "every other row", "every other column", "transposed"]


class TestRepack:
    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    @settings(max_examples=100, deadline=None)
    @given(
        source=st.sampled_from(ALONG_COLUMNS),
        rows=st.integers(1, 9),
        columns=st.integers(1, 70),
        surplus=st.tuples(st.integers(0, 2), st.integers(0, 3)),
        how=st.sampled_from(STRIDES),
        seed=st.integers(0, 2**31),
    )
    def test_any_codes_in_any_container(
        self,
        target: Packing,
        source: Packing,
        rows: int,
        columns: int,
        surplus: tuple[int, int],
        how: str,
        seed: int,
    ) -> None:
        """Surplus rows and words are ignored; neither the input nor the memory around the output changes.

        Row pairs keep only the low nibble of codes that are wider than 4 bits.
        """
        shape = (rows, columns)
        codes = random_codes(shape, source.bits, seed)
        exact = oracles.pack(codes.long().numpy(), source)
        room = (exact.shape[0] + surplus[0], exact.shape[1] + surplus[1])
        garbage = torch.randint(-128, 128, room, generator=torch.Generator().manual_seed(seed)).to(exact.dtype)
        garbage[: exact.shape[0], : exact.shape[1]] = exact
        packed = strided(garbage, how)

        with guarded() as written:
            result = dispatch.repack(packed, source, target, shape)

        if source == target:
            assert result is packed
            return
        kept = codes if target.bits == 8 else (codes << 4) >> 4
        assert len(written) == 1
        assert is_in(result, written[0])
        assert torch.equal(result, oracles.pack(kept.long().numpy(), target))
        assert torch.equal(result, packing.repack(garbage, source, target, shape))
        assert torch.equal(result, torch_twins.repack(garbage, source, target, shape))
        assert torch.equal(packed, garbage)

    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_bits_that_belong_to_no_code_are_ignored(self, loops: list[str], target: Packing) -> None:
        """The highest bits of padded words, and those behind the last code of a row."""
        for source in ALONG_COLUMNS:
            if source.bits > target.bits or source == target:
                continue
            codes = random_codes((4, 11), source.bits, seed=source.bits)
            half = 1 << (source.bits - 1)
            ends = [oracles.pack(np.full((4, 11), value), source) for value in (-half, half - 1)]
            spare = ~(ends[0] | ends[1]) if source.offset_binary else ~oracles.pack(np.full((4, 11), -1), source)
            packed = oracles.pack(codes.long().numpy(), source) | spare

            result = dispatch.repack(packed, source, target, (4, 11))

            assert torch.equal(result, oracles.pack(codes.long().numpy(), target)), source
        assert set(loops) == ({"row_pairs"} if target == INT4_ROW_PAIRS else {"plain_codes"})

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_surplus_words_at_the_end_of_a_row_are_ignored(self, loops: list[str], bits: int) -> None:
        """Loops unpack several codes at once when enough bytes are left, but never write more codes than columns."""
        source = packed_words(bits)
        for columns in range(1, 20):
            codes = random_codes((2, columns), bits, seed=columns)
            packed = torch.nn.functional.pad(oracles.pack(codes.long().numpy(), source), (0, 8), value=-1)

            with guarded() as written:
                result = dispatch.repack(packed, source, INT8_PLAIN, (2, columns))

            assert torch.equal(result, codes), columns
            assert is_in(result, written[0]), columns
        assert set(loops) == {"plain_codes"}

    @pytest.mark.parametrize("nibbles", [packed_words(4), E2M1_PACKED], ids=["offset binary", "unchanged bits"])
    def test_row_pairs_of_all_possible_half_words(self, loops: list[str], nibbles: Packing) -> None:
        """The fastest loop reads half-words of 16 bits; all 2^16 values occur in the even row and in the odd row."""
        halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(1, -1)
        data = torch.cat((halves, halves.flip(1)))
        packed = data.view(nibbles.container.torch_dtype)
        shape = (2, 2**18)

        result = dispatch.repack(packed, nibbles, INT4_ROW_PAIRS, shape)

        flip = 0x8 if nibbles.offset_binary else 0
        fields = torch.stack((data & 0xF, data >> 4), dim=2).view(shape) ^ flip
        assert torch.equal(result, (fields[0] | fields[1] << 4).view(1, -1))
        assert loops == ["row_pairs_of_nibbles"]

    def test_a_missing_last_row_is_all_zero_bits(self, loops: list[str]) -> None:
        for source in ALONG_COLUMNS:
            codes = torch.full((3, 9), -1, dtype=torch.int8)
            result = dispatch.repack(oracles.pack(codes.long().numpy(), source), source, INT4_ROW_PAIRS, (3, 9))

            assert result.tolist() == [[0xFF] * 9, [0x0F] * 9], source
        assert set(loops) == {"row_pairs"}


class TestPlainCodesAlongRows:
    @settings(max_examples=100, deadline=None)
    @given(
        source=st.sampled_from(ALONG_ROWS),
        rows=st.integers(1, 70),
        groups=st.integers(1, 5),
        surplus=st.tuples(st.integers(0, 2), st.integers(0, 3)),
        how=st.sampled_from(STRIDES),
        seed=st.integers(0, 2**31),
    )
    def test_any_zero_points(
        self, source: Packing, rows: int, groups: int, surplus: tuple[int, int], how: str, seed: int
    ) -> None:
        """Dense codes that straddle words, and whole codes per word; surplus columns are ignored."""
        codes = random_codes((rows, groups), source.bits, seed)
        exact = oracles.pack(codes.long().numpy(), source)
        garbage = torch.full((exact.shape[0] + surplus[0], exact.shape[1] + surplus[1]), 0x5A5A5A5A, dtype=torch.int32)
        garbage[: exact.shape[0], : exact.shape[1]] = exact
        packed = strided(garbage, how)

        result = dispatch.unpack_codes(packed, source, (rows, groups))

        assert torch.equal(result, codes)
        assert result.is_contiguous()
        assert torch.equal(packed, garbage)

    @pytest.mark.parametrize(
        "source",
        [
            packed_words(4),
            replace(packed_words(4, axis=0), offset_binary=False),
            replace(packed_words(4, axis=0), container=DType.U8),
        ],
        ids=str,
    )
    def test_other_layouts_go_to_numpy(self, loops: list[str], source: Packing) -> None:
        codes = random_codes((10, 12), 4, seed=1)

        assert torch.equal(dispatch.unpack_codes(oracles.pack(codes.long().numpy(), source), source, (10, 12)), codes)
        assert loops == []

    def test_containers_with_too_few_words_go_to_numpy(self, loops: list[str]) -> None:
        """Only numpy checks bounds; a loop would read beyond the end."""
        words = torch.zeros(1, 3, dtype=torch.int32)

        assert dispatch.unpack_codes(words, packed_words(4, axis=0), (10, 3)).shape == (8, 3)
        assert loops == []


class TestAdditiveZero:
    @pytest.mark.parametrize("zero", [-128, -8, -1, 0, 1, 7, 127])
    def test_every_bfloat16_scale(self, loops: list[str], zero: int) -> None:
        """Also infinity, NaN and subnormal scales. No result is -0.0."""
        scale = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(256, 256)
        zeros = torch.full((256, 256), zero, dtype=torch.int8)

        with guarded() as written:
            result = dispatch.additive_zero(scale, zeros)

        assert is_in(result, written[0])
        assert same_bits(result, scales.additive_zero(scale, zeros))
        assert same_bits(result, torch_twins.additive_zero(scale, zeros))
        with np.errstate(all="ignore"):
            exact = (-np.float64(zero) * scale.double().numpy() + 0.0).astype(np.float32)
        assert np.array_equal(result.numpy(), exact, equal_nan=True)
        assert not (result.signbit() & (result == 0)).any()
        assert loops == ["additive_zero"]

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @settings(max_examples=40, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 7), st.integers(1, 7)), seed=st.integers(0, 2**31), how=st.sampled_from(STRIDES)
    )
    def test_any_shape_equals_fractions_rounded_once(
        self, dtype: torch.dtype, shape: tuple[int, int], seed: int, how: str
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = (torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-20, 9, shape, generator=generator)).to(
            dtype
        )
        zero = random_codes(shape, 8, seed)

        result = dispatch.additive_zero(scale, strided(zero, how))

        assert torch.equal(result.double(), oracles.additive_zero(scale, zero))

    @pytest.mark.parametrize(
        "zero", [torch.ones(4, 1, dtype=torch.int8), torch.ones(4, 6, dtype=torch.int32)], ids=["shape", "dtype"]
    )
    def test_zero_points_of_another_shape_or_dtype_go_to_numpy(self, loops: list[str], zero: Tensor) -> None:
        assert torch.equal(dispatch.additive_zero(torch.ones(4, 6), zero), torch.full((4, 6), -1.0))
        assert loops == []

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @settings(max_examples=60, deadline=None)
    @given(
        source=st.sampled_from(ALONG_ROWS),
        rows=st.integers(1, 70),
        groups=st.integers(1, 5),
        surplus=st.tuples(st.integers(0, 2), st.integers(0, 3)),
        seed=st.integers(0, 2**31),
    )
    def test_packed_zero_points_equal_plain_ones(
        self, dtype: torch.dtype, source: Packing, rows: int, groups: int, surplus: tuple[int, int], seed: int
    ) -> None:
        """Codes of any width, with surplus columns, whether or not codes straddle words."""
        zero = random_codes((rows, groups), source.bits, seed)
        exact = oracles.pack(zero.long().numpy(), source)
        words = torch.full((exact.shape[0] + surplus[0], exact.shape[1] + surplus[1]), 0x5A5A5A5A, dtype=torch.int32)
        words[: exact.shape[0], : exact.shape[1]] = exact
        scale = torch.randn((rows, groups), generator=torch.Generator().manual_seed(seed)).to(dtype)

        with guarded() as written:
            result = dispatch.additive_zero(scale, words, source)

        assert is_in(result, written[0])
        assert same_bits(result, scales.additive_zero(scale, zero))

    @pytest.mark.parametrize(
        ("source", "ran"),
        [
            (packed_words(4, axis=0), ["additive_zero_of_words"]),
            (packed_words(8, axis=0), ["additive_zero_of_words"]),
            (packed_words(3, axis=0, dense=False), ["additive_zero_of_words"]),
            (packed_words(3, axis=0), ["plain_codes_along_rows", "additive_zero"]),
            (packed_words(4), ["additive_zero"]),
        ],
        ids=str,
    )
    def test_codes_that_do_not_straddle_words_take_one_pass(
        self, loops: list[str], source: Packing, ran: list[str]
    ) -> None:
        zero = random_codes((20, 6), source.bits, seed=3)
        words = oracles.pack(zero.long().numpy(), source)

        assert torch.equal(dispatch.additive_zero(torch.ones(20, 6), words, source), -zero.float())
        assert loops == ran

    @pytest.mark.parametrize("scale", [0.0, float("inf"), float("-inf"), float("nan")])
    def test_packed_zero_points_with_zero_infinite_and_nan_scales(self, scale: float) -> None:
        words = torch.tensor([[-1985229329] * 3], dtype=torch.int32)  # 0x89ABCDEF: zero points 7 to 0
        scale_OG = torch.full((8, 3), scale)

        result = dispatch.additive_zero(scale_OG, words, packed_words(4, axis=0))

        zero = torch.arange(7, -1, -1, dtype=torch.int8)[:, None].expand(8, 3)
        assert same_bits(result, scales.additive_zero(scale_OG, zero))
        assert not (result.signbit() & (result == 0)).any()


def exact_numbers(element: Element) -> list[Fraction | None]:
    """Return the exact value of every bit pattern; None is NaN."""
    return [number(field, element) for field in range(256 if element is Element.E4M3 else 1 << FLOATS[element].bits)]


def stored_fields(fields: Tensor, element: Element) -> Tensor:
    """Return bit patterns [N, K] as they are stored: as float8, or packed by the slow reference."""
    layout = FLOATS[element]
    return fields.view(torch.float8_e4m3fn) if layout is None else oracles.pack(fields.long().numpy(), layout)


def all_singles(lows: list[int]) -> Tensor:
    """Return float32 numbers [R, 1] with all values of the upper 16 bits, combined with the given lower 16 bits."""
    uppers = np.arange(2**16, dtype=np.uint32) << 16
    return torch.from_numpy((uppers[:, None] | np.array(lows, dtype=np.uint32)).reshape(-1, 1).view(np.float32))


class TestRounding:
    """Most tests dequantize a code of 1, so that the result is the rounded scale."""

    LOWS = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_numbers_of_all_sizes_as_numpy_and_torch_round_them(self, loops: list[str], dtype: torch.dtype) -> None:
        """All signs, exponents and leading bits, with ties, their neighbours, subnormal numbers, infinity and NaN."""
        scale = all_singles(list(self.LOWS))
        ones = torch.ones(scale.shape, dtype=torch.int8)

        result = dispatch.dequantize(ones, INT8_PLAIN, Element.INT, tuple(scale.shape), Scaling(scale=scale), dtype)

        assert same_bits(result, scale.to(dtype))
        if dtype != torch.bfloat16:
            with np.errstate(all="ignore"):
                theirs = scale.numpy().astype(result.numpy().dtype)
            assert same_bits(result, torch.from_numpy(theirs))
        assert loops == ["dequantize"]

    @pytest.mark.parametrize("code", [-128, -3, 0, 7, 113])
    def test_products_that_are_inexact_in_float32_are_rounded_once(self, loops: list[str], code: int) -> None:
        """The reference is numpy, which converts float64 to float16 in one step."""
        scale = all_singles([0x1111, 0x8001, 0xABCD, 0xFFFF])
        codes = torch.full(scale.shape, code, dtype=torch.int8)

        result = dispatch.dequantize(
            codes, INT8_PLAIN, Element.INT, tuple(scale.shape), Scaling(scale=scale), torch.float16
        )

        with np.errstate(all="ignore"):
            theirs = (np.float64(code) * scale.double().numpy()).astype(np.float16)
        assert same_bits(result, torch.from_numpy(theirs))
        assert loops == ["dequantize"]

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    @settings(max_examples=80, deadline=None)
    @given(pattern=st.integers(0, 2**15 - 2), code=st.integers(1, 127), hair=st.sampled_from([-1, 0, 1]))
    def test_ties_and_their_neighbours_by_fractions(
        self, dtype: torch.dtype, pattern: int, code: int, hair: int
    ) -> None:
        """The products lie so close to a midpoint of two neighbours that float32 would round them to the midpoint."""
        lower, upper = torch.tensor([pattern, pattern + 1], dtype=torch.int16).view(dtype).double().tolist()
        middle = np.float32((lower + upper) / 2 / code)
        scale = np.nextafter(middle, np.float32(hair) * np.float32(np.inf)) if hair else middle
        if not np.isfinite(scale):
            scale = np.float32(1)
        codes = torch.tensor([[code, -code]], dtype=torch.int8)

        result = self._dequantize(codes, torch.tensor([[float(scale)]], dtype=torch.float32), dtype)

        want = oracles.round_fraction(code * Fraction(float(scale)), dtype)
        assert result.double().tolist() == [[want, -want]]

    def _dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return dispatch.dequantize(codes, INT8_PLAIN, Element.INT, tuple(codes.shape), Scaling(scale=scale), dtype)


@st.composite
def scalings(draw: st.DrawFn, shape: tuple[int, int], element: Element) -> Scaling:
    """Draw a scaling: per tensor, per row, by groups, by groups with an index, or by blocks.

    The last group or block may be smaller. Some scales are replaced by special values, such as 0, NaN and infinity.
    """
    rows, columns = shape
    strategy = draw(st.sampled_from(["tensor", "row", "groups", "index", "blocks", "columns of blocks"]))
    size = draw(st.integers(1, columns + 3)) if strategy not in {"tensor", "row"} else None
    block_rows = draw(st.integers(1, rows + 2)) if "blocks" in strategy else 1
    groups = -(-columns // size) if size else 1
    lines = 1 if strategy in {"tensor", "columns of blocks"} else -(-rows // block_rows)
    stored = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if stored == torch.uint8:  # E8M0: 0 is 2^-127, 255 is NaN
        scale = torch.randint(100, 140, (lines, groups), dtype=torch.uint8, generator=generator)
        sentinels = [0, 255, 254, 127]
    else:
        scale = (torch.randn(lines, groups, generator=generator).exp() * draw(st.sampled_from([1.0, 2.0**-9]))).to(
            stored
        )
        sentinels = [0.0, float("nan"), torch.finfo(stored).max, torch.finfo(stored).smallest_normal / 4, -1.0]
        sentinels += [] if stored == torch.float8_e4m3fn else [float("inf"), -float("inf"), torch.finfo(stored).tiny]
    for position in draw(st.lists(st.integers(0, scale.numel() - 1), max_size=2)):
        scale.view(-1)[position] = draw(st.sampled_from(sentinels))
    zero = None
    if element is Element.INT and draw(st.booleans()):
        zero = torch.randint(-128, 128, scale.shape, dtype=torch.int8, generator=generator)
    index = None
    if strategy == "index":
        index = torch.randint(0, groups, (columns,), generator=generator).to(
            draw(st.sampled_from([torch.int32, torch.int64]))
        )
    divisor = draw(st.sampled_from([None, None, 1.0, 3.0, 2688.0, -0.1, 0.0, float("inf"), 1e-30]))
    return Scaling(
        scale=scale,
        zero_point=zero,
        group_columns=size,
        block_rows=block_rows,
        group_index=index,
        divisor=None if divisor is None else torch.tensor([divisor]),
    )


class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @settings(max_examples=80, deadline=None)
    @given(data=st.data())
    def test_any_codes_with_any_scales_equal_the_operations_of_numpy_and_torch(
        self, dtype: torch.dtype, data: st.DataObject
    ) -> None:
        """Neither the memory around the output nor any input changes."""
        shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 40)))
        seed = data.draw(st.integers(0, 2**31))
        element = data.draw(st.sampled_from(list(Element)))
        source: Packing | None
        if element is Element.INT:
            source = data.draw(st.sampled_from(ALONG_COLUMNS))
            values = oracles.pack(random_codes(shape, source.bits, seed).long().numpy(), source)
            numbers = packing.unpack_codes(values, source, shape)
        else:
            source = FLOATS[element]
            top = len(exact_numbers(element))
            fields = torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
            values = stored_fields(fields, element)
            numbers = values if source is None else element_values(fields, element)
        scaling = data.draw(scalings(shape, element))
        before = values.view(torch.uint8).clone()

        with watched() as ran, guarded() as written:
            result = dispatch.dequantize(values, source, element, shape, scaling, dtype)

        assert ran == ["dequantize"]
        assert is_in(result, written[0])
        assert same_bits(result, scales.dequantize(numbers, scaling, dtype))
        assert same_bits(result, torch_twins.dequantize(numbers, scaling, dtype))
        assert torch.equal(values.view(torch.uint8), before)

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
    @pytest.mark.parametrize("group", [None, 4, 5, 12], ids=["row", "groups", "cut short", "one group"])
    def test_integers_equal_fractions_rounded_once(
        self, loops: list[str], group: int | None, zero: bool, dtype: torch.dtype
    ) -> None:
        for source in WORD_LAYOUTS:
            shape = (2, 12)
            codes = random_codes(shape, source.bits, seed=source.bits)
            generator = torch.Generator().manual_seed(source.bits)
            scale_shape = (2, -(-12 // group) if group else 1)
            scale = torch.randn(scale_shape, generator=generator) * 2.0 ** torch.randint(
                -14, 8, scale_shape, generator=generator
            )
            zero_point = random_codes(scale_shape, source.bits, seed=7) if zero else None
            scaling = Scaling(scale=scale, zero_point=zero_point, group_columns=group)

            result = dispatch.dequantize(
                oracles.pack(codes.long().numpy(), source), source, Element.INT, shape, scaling, dtype
            )

            assert torch.equal(result.double(), oracles.dequantize(codes, scale, zero_point, group, dtype)), source
        assert set(loops) == {"dequantize"}

    @pytest.mark.parametrize("element", FLOATS)
    def test_every_small_float_is_decoded_exactly(self, loops: list[str], element: Element) -> None:
        """With a scale of 1, in every dtype. -0.0 keeps its sign, and E4M3 has a NaN of each sign."""
        numbers = exact_numbers(element)
        fields = torch.arange(len(numbers), dtype=torch.uint8).repeat(2, 1)
        for dtype, computed in product(DTYPES, (torch.bfloat16, torch.float32)):
            scaling = Scaling(scale=torch.ones(1, 1, dtype=computed))

            result = dispatch.dequantize(
                stored_fields(fields, element), FLOATS[element], element, tuple(fields.shape), scaling, dtype
            )

            half = len(numbers) // 2
            for field, value in enumerate(result[1].double().tolist()):
                assert math.isnan(value) if numbers[field] is None else Fraction(value) == numbers[field], field
            signs = result[1].signbit() | result[1].isnan()
            assert signs[half:].all()
            assert not (signs & ~result[1].isnan())[:half].any()
        assert set(loops) == {"dequantize"}

    @pytest.mark.parametrize("element", FLOATS)
    def test_all_pairs_of_neighbouring_fields(self, element: Element) -> None:
        """The bits of neighbouring fields don't leak into a field, wherever it starts in its byte."""
        top = 1 << (8 if FLOATS[element] is None else FLOATS[element].bits)
        one, other = (grid.flatten() for grid in torch.meshgrid(*[torch.arange(top)] * 2, indexing="ij"))
        fields = torch.stack((one, other, one), dim=1).flatten().to(torch.uint8).view(1, -1)
        fields = fields[:, : min(fields.shape[1], 3 * 4096)]
        table = [float("nan") if value is None else float(value) for value in exact_numbers(element)]

        result = dispatch.dequantize(
            stored_fields(fields, element),
            FLOATS[element],
            element,
            tuple(fields.shape),
            Scaling(scale=torch.ones(1, 1)),
            torch.float32,
        )

        want = torch.tensor(table)[fields.long()]
        assert ((result == want) | (result.isnan() & want.isnan())).all()

    @pytest.mark.parametrize("divisor", [3.0, 0.1, 2688.0, 2.0**-60])
    def test_division_is_done_in_float64(self, loops: list[str], divisor: float) -> None:
        """Even when the scale has few bits."""
        codes = random_codes((4, 16), 4, seed=5)
        scale = torch.tensor([[0.3], [1.7], [448.0], [2.0**-9]]).to(torch.float8_e4m3fn)
        scaling = Scaling(scale=scale, divisor=torch.tensor([divisor]))

        result = dispatch.dequantize(codes, INT8_PLAIN, Element.INT, (4, 16), scaling, torch.float64)

        want = codes.double().numpy() * scale.double().numpy() / np.float64(np.float32(divisor))
        assert np.array_equal(result.numpy(), want)
        assert loops == ["dequantize"]

    @pytest.mark.parametrize("how", STRIDES)
    def test_codes_and_scales_may_have_any_strides(self, loops: list[str], how: str) -> None:
        words = oracles.pack(random_codes((4, 32), 4, seed=1).long().numpy(), packed_words(4))
        zero = random_codes((4, 4), 4, seed=2)
        scale = torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
        plain = Scaling(scale=scale, zero_point=zero, group_columns=8)
        other = replace(plain, scale=scale.T.contiguous().T, zero_point=strided(zero, how))

        result = [
            dispatch.dequantize(packed, packed_words(4), Element.INT, (4, 32), scaling, torch.bfloat16)
            for packed, scaling in ((words, plain), (strided(words, how), other))
        ]

        assert same_bits(*result)
        assert loops == ["dequantize"] * 2

    def test_an_index_for_a_single_group_is_ignored(self, loops: list[str]) -> None:
        codes = random_codes((2, 8), 8, seed=1)
        scaling = Scaling(scale=torch.full((2, 1), 0.5), group_columns=8, group_index=torch.full((8,), 5))

        result = dispatch.dequantize(codes, INT8_PLAIN, Element.INT, (2, 8), scaling, torch.float32)

        assert torch.equal(result, codes * 0.5)
        assert loops == ["dequantize"]


CODES = torch.ones(4, 8, dtype=torch.int8)
GROUPS = Scaling(scale=torch.full((4, 2), 0.5), group_columns=4)
UNKNOWN = {
    "scales of float64": replace(GROUPS, scale=GROUPS.scale.double()),
    "zero points of int32": replace(GROUPS, zero_point=torch.zeros(4, 2, dtype=torch.int32)),
    "zero points for all rows": replace(GROUPS, zero_point=torch.zeros(1, 2, dtype=torch.int8)),
    "an index that counts from the end": replace(GROUPS, group_index=torch.full((8,), -1)),
}
CONTRADICTIONS = {
    "an index beyond the last group": replace(GROUPS, group_index=torch.full((8,), 2)),
    "an index of too few columns": replace(GROUPS, group_index=torch.zeros(7, dtype=torch.int32)),
    "too few groups": Scaling(scale=torch.ones(4, 2), group_columns=3),
    "too few rows of scales": Scaling(scale=torch.ones(3, 2), group_columns=4),
    "too few blocks": Scaling(scale=torch.ones(2, 2), group_columns=4, block_rows=1),
}


class TestWhatLoopsDoNotTake:
    """Loops check no bounds: all layouts that they don't support go to numpy, which handles or rejects them."""

    @pytest.mark.parametrize("scaling", UNKNOWN.values(), ids=UNKNOWN.keys())
    def test_other_layouts_go_to_numpy(self, loops: list[str], scaling: Scaling) -> None:
        result = dispatch.dequantize(CODES, INT8_PLAIN, Element.INT, (4, 8), scaling, torch.float32)

        assert torch.equal(result, torch.full((4, 8), 0.5))
        assert loops == []

    @pytest.mark.parametrize("scaling", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
    def test_sizes_that_contradict_each_other_are_refused(self, loops: list[str], scaling: Scaling) -> None:
        with pytest.raises((IndexError, ValueError)):
            dispatch.dequantize(CODES, INT8_PLAIN, Element.INT, (4, 8), scaling, torch.float32)
        assert loops == []

    @pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.uint8, torch.int8], ids=str)
    def test_codes_of_another_dtype_are_no_float8(self, loops: list[str], dtype: torch.dtype) -> None:
        values = torch.ones(4, 8).to(dtype)

        result = dispatch.dequantize(values, None, Element.E4M3, (4, 8), GROUPS, torch.float32)

        assert torch.equal(result, torch.full((4, 8), 0.5))
        assert loops == []

    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_a_container_that_is_too_small_is_never_read_past_its_end(self, loops: list[str], target: Packing) -> None:
        words = torch.zeros(4, 2, dtype=torch.int32)

        for shape in ((5, 16), (4, 17)):
            assert dispatch.repack(words, packed_words(4), target, shape).shape == target.packed_shape((4, 16))
        assert loops == []

    def test_codes_along_rows_and_other_targets_go_to_numpy(self, loops: list[str]) -> None:
        codes = random_codes((8, 8), 4, seed=4)
        pairs = oracles.pack(codes.long().numpy(), INT4_ROW_PAIRS)

        assert torch.equal(dispatch.repack(pairs, INT4_ROW_PAIRS, INT8_PLAIN, (8, 8)), codes)
        words = dispatch.repack(pairs, INT4_ROW_PAIRS, packed_words(4), (8, 8))
        assert torch.equal(words, oracles.pack(codes.long().numpy(), packed_words(4)))
        assert loops == []

    @pytest.mark.parametrize(("columns", "ran"), [(255, []), (256, ["plain_codes"])], ids=["small", "large"])
    def test_loops_run_from_65536_codes_on(
        self, loops: list[str], columns: int, ran: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dispatch_module, "_MIN_CODES", 1 << 16)
        codes = torch.zeros(256, columns, dtype=torch.uint8)
        source = Packing(bits=8, container=DType.U8, axis=1, offset_binary=True)

        assert torch.equal(dispatch.repack(codes, source, INT8_PLAIN, (256, columns)), codes.view(torch.int8) - 128)
        assert loops == ran


SOURCE = packed_words(4)
WORDS = torch.zeros(4, 4, dtype=torch.int32)
CALLS: dict[str, tuple[Callable[[], Tensor], tuple[int, int], torch.dtype]] = {
    "repack to row pairs": (lambda: dispatch.repack(WORDS, SOURCE, INT4_ROW_PAIRS, (4, 32)), (2, 32), torch.uint8),
    "repack to int8": (lambda: dispatch.repack(WORDS, SOURCE, INT8_PLAIN, (4, 32)), (4, 32), torch.int8),
    "additive zero": (
        lambda: dispatch.additive_zero(torch.ones(4, 3), torch.ones(4, 3, dtype=torch.int8)),
        (4, 3),
        torch.float32,
    ),
    "dequantize": (
        lambda: dispatch.dequantize(CODES, INT8_PLAIN, Element.INT, (4, 8), GROUPS, torch.bfloat16),
        (4, 8),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize(("call", "shape", "dtype"), CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("min_codes", [0, 1 << 16], ids=["loop", "numpy"])
def test_each_call_returns_a_new_contiguous_tensor(
    call: Callable[[], Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    min_codes: int,
    loops: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a loop or numpy computes the result."""
    monkeypatch.setattr(dispatch_module, "_MIN_CODES", min_codes)

    first, second = call(), call()

    assert (tuple(first.shape), first.dtype) == (shape, dtype)
    assert first.is_contiguous()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    assert len(loops) == (2 if min_codes == 0 else 0)


class TestProcesses:
    """Tests that need a fresh process, or several threads."""

    def test_importing_the_dispatcher_imports_nothing_heavy(self) -> None:
        done = run_python(
            """
            import sys
            import trtllm_ct.layouts.loops.dispatch

            print(sorted({"numba", "numpy", "torch"} & set(sys.modules)))
            """
        )

        assert done.stdout.strip() == "[]"

    def test_loops_read_no_byte_behind_the_container(self) -> None:
        """The container ends at a page boundary, and the next page is not readable: reading one more byte crashes."""
        done = run_python(
            """
            import ctypes, mmap
            import numpy as np
            from trtllm_ct.base.dtypes import DType
            from trtllm_ct.layouts.loops import dispatch
            from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, packed_words
            from trtllm_ct.layouts.scales import Scaling
            from trtllm_ct.layouts.stored_array import StoredArray, numpy_dtype
            from trtllm_ct.base.schemes import Element, Packing

            dispatch._MIN_CODES = 0
            page = mmap.PAGESIZE
            memory = mmap.mmap(-1, 2 * page)
            buffer = np.frombuffer(memory, np.uint8)
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mprotect(ctypes.c_void_p(buffer.ctypes.data + page), ctypes.c_size_t(page), 0) == 0

            def at_the_end(shape, dtype):
                size = shape[0] * shape[1] * dtype.itemsize
                return buffer[page - size : page].view(numpy_dtype(dtype)).reshape(shape)

            def ones(*shape):
                return StoredArray(np.ones(shape, np.float32), DType.F32)

            count = 0
            for bits in range(1, 9):
                for container, dense in ((DType.U8, True), (DType.I32, True), (DType.I32, False)):
                    source = Packing(bits=bits, container=container, axis=1, offset_binary=True, dense=dense)
                    for columns in (1, 7, 8, 9, 33, 64, 127):
                        shape = (3, columns)
                        packed = at_the_end(source.packed_shape(shape), container)
                        dispatch.repack(packed, source, INT4_ROW_PAIRS, shape)
                        if source != INT8_PLAIN:
                            dispatch.repack(packed, source, INT8_PLAIN, shape)
                        scaling, stored = Scaling(scale=ones(3, 1)), StoredArray(packed, container)
                        dispatch.dequantize(stored, source, Element.INT, shape, scaling, DType.BF16)
                        count += 3
                for dense in (True, False):
                    along = packed_words(bits, axis=0, dense=dense)
                    for rows in (1, 8, 31, 32, 33, 64, 65):
                        words = at_the_end(along.packed_shape((rows, 3)), DType.I32)
                        dispatch.unpack_codes(words, along, (rows, 3))
                        dispatch.additive_zero(ones(rows, 3), words, along)
                        count += 2
            print(count)
            """
        )

        assert done.stdout.strip() == str(8 * (3 * 7 * 3 + 2 * 7 * 2))

    def test_threads_give_the_same_bits(self) -> None:
        """Loops release the GIL, and share no state."""
        from concurrent.futures import ThreadPoolExecutor

        words = [oracles.pack(random_codes((64, 256), 4, seed).long().numpy(), SOURCE) for seed in range(16)]
        alone = [packing.repack(packed, SOURCE, INT4_ROW_PAIRS, (64, 256)) for packed in words]

        with ThreadPoolExecutor(8) as threads:
            together = list(
                threads.map(lambda packed: dispatch.repack(packed, SOURCE, INT4_ROW_PAIRS, (64, 256)), words)
            )

        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))

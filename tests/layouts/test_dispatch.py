"""Compiled loops give the bits of their twins, which are plain torch operations.

`layouts/dispatch.py` chooses between the two by size; here every size is large, or none is.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trtllm_ct.dtypes import DType
from trtllm_ct.layouts import dispatch, packing, scales
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, pack_codes
from trtllm_ct.layouts.scales import Scaling
from trtllm_ct.schemes import Element, Packing

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = [
    Packing(bits=bits, container=DType.I32, axis=1, offset_binary=True, dense=dense)
    for bits, dense in [*product(range(1, 9), [True]), *((bits, False) for bits in (3, 5, 6, 7))]
]
BYTES = [Packing(bits=4, container=DType.U8, axis=1, offset_binary=binary, dense=True) for binary in (False, True)]
LOOPS = (
    "row_pairs_of_nibbles", "row_pairs", "plain_codes", "plain_codes_along_rows", "additive_zero", "dequantize",
)  # fmt: skip
SHAPES = [(2, 8), (4, 32), (1, 4), (3, 12), (2, 6), (5, 7), (4, 33), (6, 130), (2, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too small for a loop."""
    monkeypatch.setattr(dispatch, "_SMALL", 0)


@pytest.fixture
def loops(compiled: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled loops that ran, in order."""
    from trtllm_ct.layouts import kernels

    ran: list[str] = []

    def noted(name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(name)
            return loop(*arguments)

        return run

    for name in (
        "row_pairs_of_nibbles",
        "row_pairs",
        "plain_codes",
        "plain_codes_along_rows",
        "additive_zero",
        "dequantize",
    ):
        monkeypatch.setattr(kernels, name, noted(name, getattr(kernels, name)))
    return ran


def label(packing_: Packing) -> str:
    return f"{packing_.bits}-{packing_.container}-{'dense' if packing_.dense else 'padded'}-{packing_.offset_binary}"


def random_codes(shape: tuple[int, int], bits: int, seed: int = 0) -> Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN, whatever its payload; minus zero is not zero."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype.is_floating_point:
        nan = one.isnan()
        if not torch.equal(nan, other.isnan()):
            return False
        one, other = one.masked_fill(nan, 0), other.masked_fill(nan, 0)
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class TestRepack:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("source", [*WORDS, *BYTES], ids=label)
    def test_int8_codes(self, loops: list[str], source: Packing, shape: tuple[int, int]) -> None:
        codes = random_codes(shape, source.bits)
        packed = pack_codes(codes, source)

        assert torch.equal(dispatch.repack(packed, source, INT8_PLAIN, shape), codes)
        assert loops == ["plain_codes"]

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("source", [each for each in [*WORDS, *BYTES] if each.bits <= 4], ids=label)
    def test_row_pairs(self, loops: list[str], source: Packing, shape: tuple[int, int]) -> None:
        packed = pack_codes(random_codes(shape, source.bits), source)

        found = dispatch.repack(packed, source, INT4_ROW_PAIRS, shape)

        assert torch.equal(found, packing.repack(packed, source, INT4_ROW_PAIRS, shape))
        whole_words = source.bits == 4 and shape[0] % 2 == 0 and shape[1] % 4 == 0
        assert loops == ["row_pairs_of_nibbles" if whole_words else "row_pairs"]

    @pytest.mark.parametrize("target", [INT4_ROW_PAIRS, INT8_PLAIN], ids=["row pairs", "int8"])
    def test_words_and_rows_beyond_the_shape_are_left_out(self, loops: list[str], target: Packing) -> None:
        source = packing.packed_words(4)
        wide = pack_codes(random_codes((6, 48), 4), source)

        assert torch.equal(
            dispatch.repack(wide, source, target, (4, 40)), packing.repack(wide, source, target, (4, 40))
        )
        assert loops

    @pytest.mark.parametrize("target", [INT4_ROW_PAIRS, INT8_PLAIN], ids=["row pairs", "int8"])
    def test_every_other_row(self, loops: list[str], target: Packing) -> None:
        source = packing.packed_words(4)
        strided = pack_codes(random_codes((8, 32), 4), source)[::2]

        found = dispatch.repack(strided, source, target, (4, 32))

        assert torch.equal(found, packing.repack(strided.contiguous(), source, target, (4, 32)))
        assert loops

    def test_out_is_written_and_returned(self, loops: list[str]) -> None:
        source, shape = packing.packed_words(4), (4, 32)
        packed = pack_codes(random_codes(shape, 4), source)
        out = torch.full(INT4_ROW_PAIRS.packed_shape(shape), 0xAA, dtype=torch.uint8)

        assert dispatch.repack(packed, source, INT4_ROW_PAIRS, shape, out=out) is out
        assert torch.equal(out, packing.repack(packed, source, INT4_ROW_PAIRS, shape))

    @pytest.mark.parametrize("out", [torch.empty(2, 31, dtype=torch.uint8), torch.empty(2, 32, dtype=torch.int8)])
    def test_out_of_another_kind_is_refused(self, compiled: None, out: Tensor) -> None:
        """A loop looks at nothing itself: it would write beyond the end."""
        source = packing.packed_words(4)
        packed = pack_codes(random_codes((4, 32), 4), source)

        with pytest.raises(ValueError, match=r"out must be a contiguous torch.uint8 \(2, 32\)|out must be"):
            dispatch.repack(packed, source, INT4_ROW_PAIRS, (4, 32), out=out)


class TestZeroPoints:
    @pytest.mark.parametrize("shape", [(8, 4), (32, 1), (33, 5), (64, 3)], ids=str)
    @pytest.mark.parametrize("dense", [True, False], ids=["dense", "padded"])
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_codes_along_rows(self, loops: list[str], bits: int, dense: bool, shape: tuple[int, int]) -> None:
        along = Packing(bits=bits, container=DType.I32, axis=0, offset_binary=True, dense=dense)
        codes = random_codes(shape, bits)

        assert torch.equal(dispatch.unpack_codes(pack_codes(codes, along), along, shape), codes)
        assert loops == ["plain_codes_along_rows"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_additive_zeros(self, loops: list[str], dtype: torch.dtype) -> None:
        """A zero point of 0 gives zero, never minus zero."""
        scale = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        scale[0, 0], scale[0, 1] = 0, torch.finfo(dtype).tiny
        zero = random_codes((16, 8), 8)
        zero[1] = 0

        found = dispatch.additive_zero(scale, zero)

        assert same_bits(found, scales.additive_zero(scale, zero))
        assert not found.signbit()[1].any()
        assert loops == ["additive_zero"]


def scaling_of(
    rows: int, columns: int, *, group: int | None, block_rows: int = 1, zero: int = 0, dtype: torch.dtype, seed: int = 3
) -> Scaling:
    """Random scales of both signs of exponent, with a zero, the smallest and a large one among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-rows // block_rows), -(-columns // group) if group else 1)
    values = torch.rand(shape, generator=generator) * 2.0 ** torch.randint(-12, 4, shape, generator=generator)
    scale = values.to(dtype)
    flat = scale.view(-1)
    for place, value in enumerate((0.0, torch.finfo(dtype).tiny, 3000.0)):
        if place < flat.numel():
            flat[-1 - place] = value
    zero_point = None
    if zero:
        zero_point = torch.randint(-zero, zero, shape, dtype=torch.int8, generator=generator)
    return Scaling(scale=scale, zero_point=zero_point, group_columns=group, block_rows=block_rows)


class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize(
        ("group", "zero"), [(None, 0), (16, 0), (16, 8), (64, 8)], ids=["row", "groups", "zeros", "one group"]
    )
    def test_integers(
        self, loops: list[str], group: int | None, zero: int, scale_dtype: torch.dtype, dtype: torch.dtype
    ) -> None:
        source, shape = packing.packed_words(4), (7, 64)
        packed = pack_codes(random_codes(shape, 4), source)
        scaling = scaling_of(*shape, group=group, zero=zero, dtype=scale_dtype)

        found = dispatch.dequantize(packed, source, Element.INT, shape, scaling, dtype)

        assert same_bits(found, scales.dequantize(packing.unpack_codes(packed, source, shape), scaling, dtype))
        assert loops == ["dequantize"]

    @pytest.mark.parametrize("source", WORDS, ids=label)
    def test_every_width_and_a_last_group_that_is_cut_short(self, loops: list[str], source: Packing) -> None:
        shape = (5, 50)
        packed = pack_codes(random_codes(shape, source.bits), source)
        scaling = scaling_of(*shape, group=16, zero=1 << (source.bits - 1), dtype=torch.bfloat16)

        found = dispatch.dequantize(packed, source, Element.INT, shape, scaling, torch.bfloat16)

        want = scales.dequantize(packing.unpack_codes(packed, source, shape), scaling, torch.bfloat16)
        assert same_bits(found, want)
        assert loops == ["dequantize"]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("block_rows", [1, 4])
    def test_all_float8_codes(self, loops: list[str], block_rows: int, dtype: torch.dtype) -> None:
        """NaN and the smallest ones too; blocks of rows, the last of them cut short."""
        codes = torch.arange(256, dtype=torch.uint8).repeat(6, 1).view(torch.float8_e4m3fn)
        scaling = scaling_of(6, 256, group=128, block_rows=block_rows, dtype=torch.float32)

        found = dispatch.dequantize(codes, None, Element.E4M3, (6, 256), scaling, dtype)

        assert same_bits(found, scales.dequantize(codes, scaling, dtype))
        assert loops == ["dequantize"]

    @pytest.mark.parametrize("divisor", [None, 3.0, 2688.0])
    @pytest.mark.parametrize(("element", "bits"), [(Element.E2M1, 4), (Element.E2M3, 6)])
    def test_all_small_floats(self, loops: list[str], element: Element, bits: int, divisor: float | None) -> None:
        from dataclasses import replace

        from trtllm_ct.layouts.floats import element_values

        source = Packing(bits=bits, container=DType.U8, axis=1, offset_binary=False, dense=True)
        fields = torch.arange(1 << bits, dtype=torch.uint8).repeat(4, 2)
        shape = (4, fields.shape[1])
        packed = _packed_fields(fields, bits)
        scaling = scaling_of(*shape, group=16, dtype=torch.float32)
        if divisor is not None:
            scaling = replace(scaling, divisor=torch.tensor([divisor]))

        for dtype in DTYPES:
            found = dispatch.dequantize(packed, source, element, shape, scaling, dtype)
            numbers = element_values(packing.unpack_fields(packed, source, shape), element, torch.bfloat16)
            assert same_bits(found, scales.dequantize(numbers, scaling, dtype))
        assert loops == ["dequantize"] * 4

    def test_an_index_gives_the_group_of_each_column(self, loops: list[str]) -> None:
        from dataclasses import replace

        source, shape = packing.packed_words(4), (4, 64)
        packed = pack_codes(random_codes(shape, 4), source)
        index = torch.randperm(64, generator=torch.Generator().manual_seed(2)) % 4
        scaling = replace(scaling_of(*shape, group=16, zero=8, dtype=torch.float16), group_index=index.int())

        found = dispatch.dequantize(packed, source, Element.INT, shape, scaling, torch.float16)

        want = scales.dequantize(packing.unpack_codes(packed, source, shape), scaling, torch.float16)
        assert same_bits(found, want)
        assert loops == ["dequantize"]

    @settings(max_examples=60, deadline=None)
    @given(bits=st.integers(0, 2**32 - 1), code=st.integers(-128, 127), dtype=st.sampled_from(DTYPES))
    def test_any_float32_scale_and_any_code_are_rounded_once(self, bits: int, code: int, dtype: torch.dtype) -> None:
        """Infinity, NaN, subnormal numbers and ties among them."""
        scale = torch.tensor([[bits]], dtype=torch.int64).to(torch.uint32).view(torch.float32)
        codes = torch.tensor([[code]], dtype=torch.int8)
        scaling = Scaling(scale=scale)
        small, dispatch._SMALL = dispatch._SMALL, 0
        try:
            found = dispatch.dequantize(codes, INT8_PLAIN, Element.INT, (1, 1), scaling, dtype)
        finally:
            dispatch._SMALL = small

        assert same_bits(found, scales.dequantize(codes, scaling, dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_ties_go_to_even(self, compiled: None, dtype: torch.dtype) -> None:
        """Products that lie just between two numbers of the result, and next to that."""
        step = torch.finfo(dtype).eps
        scale = torch.tensor([[1 + step / 2], [1 + 3 * step / 2], [1 + step / 2 + 2**-23]], dtype=torch.float32)
        codes = torch.ones(3, 1, dtype=torch.int8)

        found = dispatch.dequantize(codes, INT8_PLAIN, Element.INT, (3, 1), Scaling(scale=scale), dtype)

        assert found.flatten().tolist() == [1, 1 + 2 * step, 1 + step]


def _packed_fields(fields: Tensor, bits: int) -> Tensor:
    """Fields one behind the other, lowest bits first, in bytes."""
    rows = []
    for row in fields.tolist():
        stream = sum(field << (place * bits) for place, field in enumerate(row))
        rows.append(list(stream.to_bytes(len(row) * bits // 8, "little")))
    return torch.tensor(rows, dtype=torch.uint8)


class TestWhoRuns:
    def test_small_tensors_load_no_compiler(self) -> None:
        done = run_python(
            """
            import sys
            import torch
            from trtllm_ct.layouts.dispatch import repack
            from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, packed_words

            repack(torch.zeros(2, 4, dtype=torch.int32), packed_words(4), INT4_ROW_PAIRS, (2, 32))
            print("numba" in sys.modules)
            """
        )

        assert done.stdout.strip() == "False"

    def test_other_devices_have_torch_operations(self, loops: list[str]) -> None:
        packed = torch.zeros(2, 4, dtype=torch.int32, device="meta")

        found = dispatch.repack(packed, packing.packed_words(4), INT4_ROW_PAIRS, (2, 32))

        assert found.device.type == "meta"
        assert loops == []

    def test_a_second_process_finds_compiled_code(self, tmp_path: Any) -> None:
        program = """
            import torch
            from trtllm_ct.layouts import kernels
            from trtllm_ct.layouts.dispatch import repack
            from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, packed_words

            repack(torch.zeros(512, 32, dtype=torch.int32), packed_words(4), INT4_ROW_PAIRS, (512, 256))
            print(sum(kernels.row_pairs_of_nibbles.stats.cache_misses.values()))
            """
        run_python(program)

        assert run_python(program).stdout.strip() == "0"

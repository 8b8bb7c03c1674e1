from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import SPARSE_24_BITMASK
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.formats.sparse.base import SparseTensor

if TYPE_CHECKING:
    from trtllm_ct.formats.base import StoredSpecs

DTYPES = [torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16, torch.float32]
PIECES = ["shape", "compressed", "bitmask"]

Sized = tuple[DType, tuple[int, ...]]


def specs(**pieces: Sized) -> StoredSpecs:
    """Pieces of a bfloat16 matrix [3, 12], with changes."""
    whole: dict[str, Sized] = {
        "shape": (DType.I64, (2, 1)),
        "compressed": (DType.BF16, (3, 6)),
        "bitmask": (DType.U8, (3, 2)),
    }
    return {name: TensorSpec(*entry) for name, entry in (whole | pieces).items()}


def specs_of(pieces: dict[str, Tensor]) -> StoredSpecs:
    return {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in pieces.items()}


def restored(pieces: dict[str, Tensor]) -> Tensor:
    """The dense tensor, described from headers and restored from the pieces."""
    faults = FaultCollector()
    spec = SPARSE_24_BITMASK.describe("m.lin", specs_of(pieces), None, faults)
    assert not faults.faults
    assert spec is not None
    parts = {piece: f"m.lin.{piece}" for piece in PIECES}
    return SPARSE_24_BITMASK.decode(SparseTensor(spec=spec, kind=SPARSE_24_BITMASK.name, parts=parts), pieces)


def two_of_four(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Random integers, of which at most two in each four columns are not zero."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand((shape[0], shape[1] // 4, 4), generator=generator).argsort(dim=2) < 2
    return torch.randint(-8, 9, shape, generator=generator) * kept.view(shape)


def raw(tensor: Tensor) -> str:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()


def test_worked_bytes() -> None:
    """Bytes of compressed-tensors 0.10.2, which stores zeros if four columns have fewer than two nonzero values."""
    dense = torch.tensor(
        [[0, 1, -2, 0, 3, 0, 0, 4], [5, 6, 0, 0, 0, 0, 0, 7], [0, 0, 3, 4, 0, 0, 0, 0]], dtype=torch.bfloat16
    )

    pieces = SPARSE_24_BITMASK.encode(dense)

    assert list(pieces) == PIECES
    assert raw(pieces["bitmask"]) == "96c3cc"
    assert pieces["compressed"].tolist() == [[1, -2, 3, 4], [5, 6, 0, 7], [3, 4, 0, 0]]
    assert pieces["shape"].tolist() == [[3], [8]]
    assert torch.equal(restored(pieces), dense)


def test_worked_bytes_of_float8() -> None:
    dense = torch.tensor([[0, 1, -2, 0, 3, 0, 0, 448.0]]).to(torch.float8_e4m3fn)

    pieces = SPARSE_24_BITMASK.encode(dense)

    assert raw(pieces["bitmask"]) == "96"
    assert raw(pieces["compressed"]) == "38c0447e"


def test_a_last_byte_may_be_half_full() -> None:
    pieces = SPARSE_24_BITMASK.encode(two_of_four((3, 12)).to(torch.bfloat16))
    assert specs_of(pieces) == specs()
    assert bool((pieces["bitmask"][:, 1] < 16).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (16, 64), (5, 20), (0, 8), (3, 0)], ids=str)
def test_decoding_inverts_encoding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = two_of_four(shape).to(dtype)

    pieces = SPARSE_24_BITMASK.encode(dense)

    assert SPARSE_24_BITMASK.holds(dense)
    assert pieces["compressed"].shape == (shape[0], shape[1] // 2)
    assert pieces["compressed"].dtype == dtype
    assert torch.equal(restored(pieces).double(), dense.double())


@given(st.lists(st.sampled_from([0, 1, -1, 2, -3, 7, -128, 127]), min_size=4, max_size=4))
@settings(max_examples=80, deadline=None)
def test_the_two_largest_of_four_integers_are_kept(group: list[int]) -> None:
    """-128 is the largest magnitude of int8, although its absolute value does not fit."""
    dense = torch.tensor([group], dtype=torch.int8)

    values = restored(SPARSE_24_BITMASK.encode(dense))[0].tolist()

    assert all(value in {0, stored} for value, stored in zip(values, group, strict=True))
    assert sorted(map(abs, values)) == [0, 0, *sorted(map(abs, group))[2:]]
    assert SPARSE_24_BITMASK.holds(dense) == (values == group)


def test_the_two_largest_of_four_float8_numbers_are_kept() -> None:
    """Comparing bytes would be wrong: the byte of a negative number is large, whatever the number."""
    dense = torch.tensor([[-0.5, 3.0, -4.0, 1.0]]).to(torch.float8_e4m3fn)
    assert restored(SPARSE_24_BITMASK.encode(dense)).float().tolist() == [[0, 3, -4, 0]]


@pytest.mark.parametrize("shape", [(8,), (2, 6), (2, 7), (1, 2, 4), ()], ids=str)
def test_only_matrices_of_whole_groups_are_held(shape: tuple[int, ...]) -> None:
    dense = torch.zeros(shape)
    assert not SPARSE_24_BITMASK.holds(dense)
    with pytest.raises(ValueError, match="multiple of 4 columns"):
        SPARSE_24_BITMASK.encode(dense)


@pytest.mark.parametrize("column", range(8))
def test_three_values_in_four_columns_are_not_held(column: int) -> None:
    dense = torch.tensor([[1.0, 0, 0, 1, 1, 1, 0, 0]])
    dense[0, column] = 1
    assert SPARSE_24_BITMASK.holds(dense) == (column in {0, 3, 4, 5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"compressed": (DType.I8, (3, 5))},
            "m.lin.compressed: expected an even number of columns, two for each four, found int8 [3, 5]",
        ),
        (
            {"compressed": (DType.I8, (4, 6))},
            "m.lin.bitmask: expected uint8 [4, 2] beside int8 [4, 6], found uint8 [3, 2]",
        ),
        ({"bitmask": (DType.U8, (3, 3))}, "m.lin.bitmask: expected uint8 [3, 2] beside bfloat16 [3, 6], found"),
        ({"bitmask": (DType.I32, (3, 2))}, "m.lin.bitmask: expected uint8, one bit a column"),
        ({"shape": (DType.I64, (1, 1))}, "m.lin.shape: expected int64 [2]"),
    ],
    ids=["odd", "rows", "width", "dtype", "sizes"],
)
def test_headers_that_contradict_each_other(change: dict[str, Sized], message: str) -> None:
    faults = FaultCollector()
    assert SPARSE_24_BITMASK.describe("m.lin", specs(**change), None, faults) is None
    (fault,) = faults.faults
    assert str(fault).startswith(message)


@pytest.mark.parametrize(
    ("bitmask", "message"),
    [
        ([0x96, 0x01], "expected 6 marks, one for each value, found 5 marks"),
        ([0x97, 0x01], "expected two marks in each four columns, found more or fewer in some"),
        ([0xE3, 0x01], "expected two marks in each four columns, found more or fewer in some"),
        ([0x96, 0x11], "expected no mark beyond column 12"),
    ],
    ids=["too few", "one and three", "three and two", "beyond the end"],
)
def test_marks_that_are_not_two_of_four(bitmask: list[int], message: str) -> None:
    pieces = {
        "shape": torch.tensor([[1], [12]]),
        "compressed": torch.ones((1, 6), dtype=torch.int8),
        "bitmask": torch.tensor([bitmask], dtype=torch.uint8),
    }
    with pytest.raises(PayloadError) as caught:
        restored(pieces)
    assert any(str(fault).startswith(f"m.lin.bitmask: {message}") for fault in caught.value.faults)


@pytest.mark.parametrize("shape", [[[12], [1]], [[1], [8]]], ids=["swapped", "another"])
def test_a_shape_of_another_tensor(shape: list[list[int]]) -> None:
    pieces = SPARSE_24_BITMASK.encode(two_of_four((1, 12)).to(torch.int8)) | {"shape": torch.tensor(shape)}
    with pytest.raises(PayloadError, match=r"m\.lin\.shape: expected \[1, 12\]"):
        restored(pieces)


def test_a_flat_shape_is_read_too() -> None:
    dense = two_of_four((2, 8)).to(torch.int8)
    pieces = SPARSE_24_BITMASK.encode(dense) | {"shape": torch.tensor([2, 8])}
    assert torch.equal(restored(pieces), dense)

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import SPARSE_BITMASK
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.formats.sparse.base import SparseTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from trtllm_ct.formats.base import StoredSpecs

DTYPES = [torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16, torch.float32]
PIECES = ["shape", "compressed", "bitmask", "row_offsets"]

Sized = tuple[DType, tuple[int, ...]]


def specs(**pieces: Sized | None) -> StoredSpecs:
    """Pieces of a bfloat16 matrix [3, 10] with seven values, with changes; None leaves a piece out."""
    whole: dict[str, Sized | None] = {
        "shape": (DType.I64, (2,)),
        "compressed": (DType.BF16, (7,)),
        "bitmask": (DType.U8, (3, 2)),
        "row_offsets": (DType.I64, (3,)),
    }
    return {name: TensorSpec(*entry) for name, entry in (whole | pieces).items() if entry is not None}


def specs_of(pieces: dict[str, Tensor]) -> StoredSpecs:
    return {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in pieces.items()}


def refusal(stored: StoredSpecs, expected_shape: tuple[int, ...] | None = None) -> str:
    faults = FaultCollector()
    assert SPARSE_BITMASK.describe("m.lin", stored, expected_shape, faults) is None
    (fault,) = faults.faults
    return str(fault)


def restored(pieces: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The dense tensor, described from headers and restored from the pieces."""
    faults = FaultCollector()
    spec = SPARSE_BITMASK.describe("m.lin", specs_of(pieces), shape, faults)
    assert not faults.faults
    assert spec is not None
    return SPARSE_BITMASK.decode(sparse(spec), pieces)


def sparse(spec: TensorSpec) -> SparseTensor:
    parts = {piece: f"m.lin.{piece}" for piece in PIECES}
    return SparseTensor(spec=spec, kind=SPARSE_BITMASK.name, parts=parts)


def worked_matrix() -> Tensor:
    dense = torch.zeros((3, 10), dtype=torch.bfloat16)
    for value, (row, column) in enumerate([(0, 1), (0, 3), (0, 8), (2, 0), (2, 4), (2, 7), (2, 9)], start=1):
        dense[row, column] = value
    return dense


def raw(tensor: Tensor) -> str:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()


def test_worked_bytes_of_a_matrix() -> None:
    """compressed-tensors 0.6 and 0.10.2 write these bytes."""
    pieces = SPARSE_BITMASK.encode(worked_matrix())

    assert list(pieces) == PIECES
    assert raw(pieces["bitmask"]) == "0a0100009102"
    assert raw(pieces["compressed"]) == "803f004040408040a040c040e040"
    assert pieces["row_offsets"].tolist() == [0, 3, 3]
    assert pieces["shape"].tolist() == [3, 10]
    assert specs_of(pieces) == specs()
    assert torch.equal(restored(pieces, (3, 10)), worked_matrix())


def test_worked_bytes_of_a_vector() -> None:
    pieces = SPARSE_BITMASK.encode(torch.tensor([1.0, 0, 2, 3]))

    assert raw(pieces["bitmask"]) == "0d"
    assert pieces["row_offsets"].shape == ()
    assert pieces["row_offsets"].item() == 0
    assert pieces["shape"].tolist() == [4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize(
    "shape", [(5,), (8,), (1, 1), (1, 20), (4, 16), (7, 13), (2, 3, 9), (0,), (0, 8), (3, 0)], ids=str
)
def test_decoding_inverts_encoding(shape: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    dense = torch.randint(1, 100, shape, generator=generator).float() * (torch.rand(shape, generator=generator) < share)
    dense = dense.to(dtype)

    pieces = SPARSE_BITMASK.encode(dense)

    assert pieces["compressed"].dtype == dtype
    assert torch.equal(restored(pieces, shape).double(), dense.double())


@given(st.integers(0, 6), st.integers(1, 30), st.binary(min_size=180, max_size=180))
@settings(max_examples=50, deadline=None)
def test_any_bytes_are_restored_except_minus_zero(rows: int, columns: int, content: bytes) -> None:
    """The values are float8 with any bit pattern, NaN included."""
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)[: rows * columns].view(rows, columns)

    dense = restored(SPARSE_BITMASK.encode(data.view(torch.float8_e4m3fn)), (rows, columns))

    assert torch.equal(dense.view(torch.uint8), data.masked_fill(data == 0x80, 0))


def test_a_scalar_has_no_rows() -> None:
    assert not SPARSE_BITMASK.holds(torch.tensor(1.0))
    with pytest.raises(ValueError, match="scalar"):
        SPARSE_BITMASK.encode(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("expected", "shape"),
    [
        ((3, 10), (3, 10)),
        ((3, 9), (3, 9)),
        ((3, 16), (3, 16)),
        ((3, 8), (3, 16)),
        ((3, 17), (3, 16)),
        ((4, 10), (3, 16)),
        ((10,), (3, 16)),
        ((), (3, 16)),
        (None, (3, 16)),
    ],
    ids=str,
)
def test_columns_come_from_the_model_if_they_fit(expected: tuple[int, ...] | None, shape: tuple[int, ...]) -> None:
    spec = SPARSE_BITMASK.describe("m.lin", specs(), expected, FaultCollector())
    assert spec == TensorSpec(DType.BF16, shape)


def test_row_offsets_may_be_missing() -> None:
    pieces = SPARSE_BITMASK.encode(worked_matrix())
    del pieces["row_offsets"]
    assert torch.equal(restored(pieces, (3, 10)), worked_matrix())


def test_sizes_may_be_int32() -> None:
    pieces = SPARSE_BITMASK.encode(worked_matrix())
    narrow = {name: pieces[name].int() for name in ("shape", "row_offsets")}
    assert torch.equal(restored(pieces | narrow, (3, 10)), worked_matrix())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitmask": (DType.I8, (3, 2))}, "m.lin.bitmask: expected uint8, one bit a column, found int8 [3, 2]"),
        ({"bitmask": (DType.U8, ())}, "m.lin.bitmask: expected uint8"),
        (
            {"shape": (DType.I64, (1,))},
            "m.lin.shape: expected int64 [2], the sizes of the dense tensor, found int64 [1]",
        ),
        ({"shape": (DType.F32, (2,))}, "m.lin.shape: expected int64 [2]"),
        (
            {"row_offsets": (DType.I64, (4,))},
            "m.lin.row_offsets: expected int64 [3], one for each row, found int64 [4]",
        ),
        ({"row_offsets": (DType.F32, (3,))}, "m.lin.row_offsets: expected int64 [3]"),
        ({"compressed": (DType.BF16, (49,))}, "m.lin.compressed: expected at most 48 values, found bfloat16 [49]"),
    ],
    ids=["signed mask", "scalar mask", "one size", "float sizes", "offsets", "float offsets", "too many values"],
)
def test_headers_that_contradict_each_other(change: dict[str, Sized], message: str) -> None:
    refused = refusal(specs(**change))
    assert refused.startswith(message)
    assert "download" in refused


def spoiled(name: str, change: str) -> dict[str, Tensor]:
    """Pieces of the worked matrix with one of them damaged."""
    pieces = SPARSE_BITMASK.encode(worked_matrix())
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "one value less": lambda tensor: tensor[:-1],
        "one value more": lambda tensor: torch.cat((tensor, tensor[:1])),
        "a mark less": lambda tensor: tensor & torch.tensor([[0xFF], [0xFF], [0x7F]], dtype=torch.uint8),
        "a mark moved beyond the end": lambda tensor: tensor + torch.tensor([0, 3], dtype=torch.uint8) * (tensor > 0),
        "swapped": lambda tensor: tensor.flip(0),
        "added": lambda tensor: tensor + 1,
    }
    return pieces | {name: changes[change](pieces[name])}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("compressed", "one value less", "m.lin.bitmask: expected 6 marks, one for each value, found 7 marks"),
        ("compressed", "one value more", "m.lin.bitmask: expected 8 marks, one for each value, found 7 marks"),
        ("bitmask", "a mark less", "m.lin.bitmask: expected 7 marks, one for each value, found 6 marks"),
        ("bitmask", "a mark moved beyond the end", "m.lin.bitmask: expected no mark beyond column 10"),
        ("shape", "swapped", "m.lin.shape: expected [3, 10], which the bitmask and config.json make, found [10, 3]"),
        ("row_offsets", "added", "m.lin.row_offsets: expected the offsets that the bitmask makes"),
        ("row_offsets", "swapped", "m.lin.row_offsets: expected the offsets that the bitmask makes"),
    ],
)
def test_values_that_contradict_each_other(name: str, change: str, message: str) -> None:
    with pytest.raises(PayloadError) as caught:
        restored(spoiled(name, change), (3, 10))
    assert any(str(fault).startswith(message) for fault in caught.value.faults)


def test_a_last_byte_that_is_not_full_is_a_fault_if_the_model_is_unknown() -> None:
    """Without the model's sizes the headers only show that there are 9 to 16 columns, so the bytes count as full."""
    pieces = SPARSE_BITMASK.encode(worked_matrix())
    with pytest.raises(PayloadError, match=r"expected \[3, 16\].*found \[3, 10\]"):
        SPARSE_BITMASK.decode(sparse(TensorSpec(DType.BF16, (3, 16))), pieces)

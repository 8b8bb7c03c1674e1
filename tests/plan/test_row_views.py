"""`Rows`: some rows of a tensor, for every way in which a tensor can be stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from on_tensors import SPARSE_BITMASK, view_of
from stored_weights import specs_of

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor
from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.plan.ranks.narrow import Rows
from trtllm_ct.plan.stored import ExpertSlice, Shared, Whole, stored_modules

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.stored import View

WHOLE = torch.arange(20, dtype=torch.int32).reshape(5, 4)
EXPERTS = torch.arange(48, dtype=torch.int32).reshape(2, 6, 4)
STORED = {"m.weight": WHOLE, "m.experts": EXPERTS}


def rows(view: View, begin: int, end: int) -> Rows:
    """Rows `begin` to `end` of a view of two axes."""
    columns = view.spec.shape[1]
    return Rows(view=view, begin=begin * columns, spec=TensorSpec(view.spec.dtype, (end - begin, columns)))


def whole() -> Whole:
    return Whole(name="m.weight", spec=TensorSpec(DType.I32, (5, 4)))


def expert() -> ExpertSlice:
    """The second half of the second expert."""
    return ExpertSlice(name="m.experts", spec=TensorSpec(DType.I32, (3, 4)), expert=1, size=24, rows=(3, 6))


@pytest.fixture
def sparse(tmp_path: Path) -> tuple[View, dict[str, torch.Tensor], torch.Tensor]:
    """A view of pieces, the pieces, and the dense tensor that they make."""
    dense = torch.zeros(4, 8, dtype=torch.bfloat16)
    dense[0, 1], dense[1, 7], dense[3, 0] = 5, -7, 3
    pieces = {f"m.{local}": piece for local, piece in SPARSE_BITMASK.encode(dense).items()}
    tensors = {name: StoredTensor(name=name, spec=spec, file="x", offset=0) for name, spec in specs_of(pieces).items()}
    catalog = Catalog(source=Folder(tmp_path), tensors=tensors, files=("x",))
    modules = stored_modules(catalog, lambda _: (4, 8), FaultCollector())
    return modules["m"].views["weight"], pieces, dense


@given(bounds=st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted))
def test_rows_are_a_run_of_the_stored_tensor_and_share_its_memory(bounds: list[int]) -> None:
    begin, end = bounds
    view = rows(whole(), begin, end)

    assert view_of(view, STORED).tolist() == WHOLE[begin:end].tolist()
    assert view.runs == (Run("m.weight", 4 * begin, 4 * end),)
    assert view.stored_bytes == 16 * (end - begin)
    assert begin == end or view_of(view, STORED).data_ptr() == WHOLE[begin].data_ptr()


def test_all_rows_are_read_like_the_whole_tensor() -> None:
    assert rows(whole(), 0, 5).runs == whole().runs


@given(bounds=st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted))
def test_rows_of_an_expert_begin_after_the_experts_and_rows_before(bounds: list[int]) -> None:
    begin, end = bounds
    view = rows(expert(), begin, end)

    assert view_of(view, STORED).tolist() == EXPERTS[1, 3 + begin : 3 + end].tolist()
    (run,) = view.runs
    assert EXPERTS.reshape(-1)[run.begin : run.end].tolist() == view_of(view, STORED).reshape(-1).tolist()


def test_rows_of_rows_are_rows_of_the_whole_tensor() -> None:
    twice = rows(rows(whole(), 1, 5), 1, 3)

    assert view_of(twice, STORED).tolist() == WHOLE[2:4].tolist()
    assert twice.runs == (Run("m.weight", 8, 16),)


def test_rows_of_a_shared_tensor_are_read_from_the_other_module() -> None:
    shared = rows(Shared.of_view(whole()), 2, 3)

    assert shared.sources == ("m.weight",)
    assert view_of(shared, STORED).tolist() == WHOLE[2:3].tolist()
    assert shared.runs == (Run("m.weight", 8, 12),)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (1, 3), (3, 4), (0, 4)])
def test_for_rows_of_a_sparse_tensor_every_piece_is_read_whole(
    sparse: tuple[View, dict[str, torch.Tensor], torch.Tensor], begin: int, end: int
) -> None:
    """The position of a row's values is known only after the values of all rows before it were counted."""
    view, pieces, dense = sparse

    part = rows(view, begin, end)

    assert part.offset is None
    assert torch.equal(view_of(part, pieces), dense[begin:end])
    assert {run.name: (run.begin, run.end) for run in part.runs} == dict.fromkeys(pieces, (0, None))
    assert part.stored_bytes == view.stored_bytes == sum(piece.nbytes for piece in pieces.values())


def test_no_rows_of_a_sparse_tensor_need_no_piece(
    sparse: tuple[View, dict[str, torch.Tensor], torch.Tensor],
) -> None:
    view, _, _ = sparse

    nothing = rows(view, 2, 2)

    assert nothing.sources == nothing.runs == ()
    assert view_of(nothing, {}).shape == (0, 8)
    assert view_of(nothing, {}).dtype is torch.bfloat16


def test_rows_of_a_restored_tensor_are_a_view_of_it() -> None:
    made = WHOLE.clone()

    part = rows(whole(), 3, 5).of_whole(made)

    assert part.tolist() == WHOLE[3:5].tolist()
    assert part.data_ptr() == made[3].data_ptr()

"""Stacked tensors: matrices arrive one by one, in any order and in pieces, and lie transposed side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from on_tensors import TensorWriter
from safetensors.torch import load_file

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.output_files import pieces_are_intact
from trtllm_ct.checkpoint.write_plan import StackPart, WritePlan
from trtllm_ct.checkpoint.writer import create_files

if TYPE_CHECKING:
    from pathlib import Path

# Two entries of two matrices with 3 and 2 rows of 5 elements each.
WIDTHS = {"left": (0, 3), "right": (3, 2)}
STACKS = {
    f"{entry}.{side}": StackPart(stack="stack", entry=entry, entries=2, line=column, lines=5)
    for entry in range(2)
    for side, (column, _) in WIDTHS.items()
}


def matrices(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        f"{entry}.{side}": (torch.arange(rows * 5) + 20 * column + 100 * entry).reshape(rows, 5).to(dtype)
        for entry in range(2)
        for side, (column, rows) in WIDTHS.items()
    }


def plan_of(tensors: dict[str, torch.Tensor]) -> WritePlan:
    specs = {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    return WritePlan.of({"before": TensorSpec(DType.U8, (3,)), **specs}, 10**6, STACKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(
    "order", [("0.left", "0.right", "1.left", "1.right"), ("1.right", "0.left", "1.left", "0.right")]
)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_matrices_lie_transposed_side_by_side(
    tmp_path: Path, dtype: torch.dtype, order: tuple[str, ...], rows: int
) -> None:
    tensors = matrices(dtype)
    plan = plan_of(tensors)
    create_files(Folder(tmp_path), plan)
    with TensorWriter(Folder(tmp_path), plan) as writer:
        writer.write("before", torch.tensor([7, 8, 9], dtype=torch.uint8))
        for name in order:
            for row in range(0, len(tensors[name]), rows):
                writer.write(name, tensors[name][row : row + rows], row)
        assert all(writer.is_complete(name) for name in plan.places)
        assert sum(piece.nbytes for piece in writer.pieces) == plan.payload_bytes
        assert pieces_are_intact(Folder(tmp_path), writer.pieces)

    stored = load_file(tmp_path / "model.safetensors")

    assert stored.keys() == {"before", "stack"}
    assert stored["before"].tolist() == [7, 8, 9]
    for entry in range(2):
        expected = torch.cat([tensors[f"{entry}.left"], tensors[f"{entry}.right"]]).T
        assert torch.equal(stored["stack"][entry], expected)
    assert dict(Catalog.from_directory(tmp_path).tensors) == dict(plan.tensors)


def test_an_entry_is_written_when_its_last_row_arrives(tmp_path: Path) -> None:
    tensors = matrices(torch.float32)
    plan = plan_of(tensors)
    create_files(Folder(tmp_path), plan)
    with TensorWriter(Folder(tmp_path), plan) as writer:
        writer.write("0.left", tensors["0.left"])
        assert writer.pieces == []
        writer.write("0.right", tensors["0.right"])
        assert [piece.nbytes for piece in writer.pieces] == [5 * 5 * 4]


def test_parts_of_rows_and_a_second_copy_are_mistakes(tmp_path: Path) -> None:
    tensors = matrices(torch.float32)
    plan = plan_of(tensors)
    create_files(Folder(tmp_path), plan)
    with TensorWriter(Folder(tmp_path), plan) as writer:
        with pytest.raises(ValueError, match="whole rows"):
            writer.write_bytes("0.left", memoryview(bytes(12)))
        writer.write("1.left", tensors["1.left"])
        with pytest.raises(ValueError, match="written before"):
            writer.write("1.left", tensors["1.left"])


def test_the_index_of_several_files_names_the_stack_and_not_its_parts() -> None:
    specs = {name: TensorSpec(DType.F32, tuple(tensor.shape)) for name, tensor in matrices(torch.float32).items()}

    plan = WritePlan.of({"before": TensorSpec(DType.U8, (300,)), **specs}, 300, STACKS)

    assert plan.index is not None
    assert '"stack": "model-00002-of-00002.safetensors"' in plan.index
    assert "left" not in plan.index

"""The files of ranks: parts of one tensor lie behind each other, or side by side where it is transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from on_tensors import TensorWriter
from safetensors.torch import load_file

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.write_plan import Segment, StackPart, WritePlan
from trtllm_ct.checkpoint.writer import create_files, write_index

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PARTS = {
    "rank0/qkv:q": torch.arange(6.0).reshape(2, 3),
    "rank0/qkv:k": torch.arange(6.0, 9).reshape(1, 3),
    "rank0/zero:q": torch.arange(4.0).reshape(2, 2),
    "rank0/zero:k": torch.arange(4.0, 6).reshape(1, 2),
    "rank0/scale": torch.tensor(7.0),
    "rank1/norm": torch.ones(3),
}
PLACES = {
    "rank0/qkv:q": Segment(stack="rank0/qkv", shape=(3, 3)),
    "rank0/qkv:k": Segment(stack="rank0/qkv", shape=(3, 3), first=6),
    "rank0/zero:q": StackPart(stack="rank0/zero", lines=3, line=0, flat=True),
    "rank0/zero:k": StackPart(stack="rank0/zero", lines=3, line=2, flat=True),
    "rank0/scale": Segment(stack="rank0/scale", shape=(1,)),
    "rank1/norm": Segment(stack="rank1/norm", shape=(1, 3)),
}


def written(directory: Path) -> dict[str, dict[str, Tensor]]:
    specs = {name: TensorSpec(DType.F32, tuple(part.shape)) for name, part in PARTS.items()}
    plan = WritePlan.of(specs, 1, PLACES, ranks=True)
    create_files(Folder(directory), plan)
    with TensorWriter(Folder(directory), plan) as writer:
        for name, part in reversed(PARTS.items()):
            writer.write(name, part)
        assert all(writer.is_complete(name) for name in PARTS)
    write_index(Folder(directory), plan)
    return {path.name: load_file(path) for path in sorted(directory.iterdir())}


def test_each_rank_has_one_file_and_there_is_no_index(tmp_path: Path) -> None:
    files = written(tmp_path)

    assert {name: set(tensors) for name, tensors in files.items()} == {
        "rank0.safetensors": {"qkv", "zero", "scale"},
        "rank1.safetensors": {"norm"},
    }


def test_parts_are_joined(tmp_path: Path) -> None:
    rank0, rank1 = written(tmp_path).values()

    assert torch.equal(rank0["qkv"], torch.cat([PARTS["rank0/qkv:q"], PARTS["rank0/qkv:k"]]))
    assert torch.equal(rank0["zero"], torch.cat([PARTS["rank0/zero:q"], PARTS["rank0/zero:k"]]).T)
    assert (rank0["scale"].shape, rank1["norm"].shape) == ((1,), (1, 3))

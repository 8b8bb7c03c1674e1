"""Weight files of a converted directory: engines read all of them at its top, and no index."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"


@pytest.fixture(name="out", params=["modelopt", "dense"])
def fixture_out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory of several files with an index, converted from `in` beside it."""
    write_checkpoint(tmp_path / "in", config=tiny_config(hidden=256, intermediate=256), scheme="fp8-channel-token")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", to=request.param, max_shard_bytes=300_000)
    assert (tmp_path / "out" / INDEX).is_file()
    assert wheres(tmp_path / "out") == []
    return tmp_path / "out"


def wheres(out: Path) -> list[str]:
    return [fault.where for fault in verify_checkpoint(out.parent / "in", out).faults]


@pytest.mark.parametrize("name", ["zz.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "another.weight"])
def test_a_file_beside_the_index_is_found(out: Path, name: str, tensor: str) -> None:
    save_file({tensor: torch.full((256,), 7.0).bfloat16()}, out / name)

    assert wheres(out) == [str(out / name)]


def test_a_tensor_in_two_files_is_found_though_the_index_tells_them_apart(out: Path) -> None:
    """The file that is read last decides."""
    index = json.loads((out / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index["model.norm.weight"])
    save_file(load_file(out / other) | {"model.norm.weight": torch.ones(256).bfloat16()}, out / other)

    assert wheres(out) == [str(out)]


def test_a_file_in_a_folder_is_found(out: Path) -> None:
    index = json.loads((out / INDEX).read_text())
    file = index["weight_map"]["model.norm.weight"]
    (out / "part").mkdir()
    (out / file).rename(out / "part" / file)
    index["weight_map"] = {
        name: f"part/{file}" if place == file else place for name, place in index["weight_map"].items()
    }
    (out / INDEX).write_text(json.dumps(index))

    assert wheres(out) == [str(out / "part" / file)]

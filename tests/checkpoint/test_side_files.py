from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from trtllm_ct.base.errors import CatalogError
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.side_files import copy_side_files as copy_into

if TYPE_CHECKING:
    from pathlib import Path


def copy_side_files(source: Path, out: Path, *options: Any) -> Any:
    """Copy into a directory, which is made, and removed again if it stays empty."""
    out.mkdir(exist_ok=True)
    try:
        with Folder(out) as folder:
            return copy_into(source, folder, *options)
    finally:
        with suppress(OSError):
            out.rmdir()


CARRIED = [
    "LICENSE",
    "README.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "modeling_custom.py",
    "preprocessor_config.json",
    "recipe.yaml",
    "sub/config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]

LEFT = [
    ".cache/huggingface/download/x.metadata",
    ".git/config",
    ".gitattributes",
    "__pycache__/modeling_custom.cpython-311.pyc",
    "config.json",
    "consolidated.00.pth",
    "golden.npz",
    "hf_quant_config.json",
    "model-00001-of-00001.safetensors",
    "model.ckpt",
    "model.gguf",
    "model.onnx",
    "model.onnx_data",
    "model.safetensors.index.json",
    "params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "sub/__pycache__/x.pyc",
    "sub/adapter.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
    "training.pt",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


def make(directory: Path, *names: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def test_everything_is_copied_except_weights_configuration_and_hidden_files(source: Path, tmp_path: Path) -> None:
    make(source, *CARRIED, *LEFT)
    out = tmp_path / "out"

    assert copy_side_files(source, out) == tuple(CARRIED)

    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == CARRIED
    assert all((out / name).read_text() == name for name in CARRIED)


def test_a_directory_without_side_files_is_accepted(source: Path, tmp_path: Path) -> None:
    assert copy_side_files(source, tmp_path / "out") == ()


def test_links_of_a_hub_cache_arrive_as_files(source: Path, tmp_path: Path) -> None:
    make(tmp_path / "blobs", "0123")
    (source / "sub").mkdir()
    (source / "tokenizer.json").symlink_to("../blobs/0123")
    (source / "sub/merges.txt").symlink_to("../../blobs/0123")
    (source / "linked").symlink_to(tmp_path / "blobs")
    out = tmp_path / "out"

    assert copy_side_files(source, out) == ("linked/0123", "sub/merges.txt", "tokenizer.json")
    assert (out / "tokenizer.json").read_text() == "0123"
    assert not (out / "tokenizer.json").is_symlink()


def test_a_read_only_file_can_be_replaced_afterwards(source: Path, tmp_path: Path) -> None:
    make(source, "README.md")
    (source / "README.md").chmod(0o444)

    copy_side_files(source, tmp_path / "out")

    assert (tmp_path / "out/README.md").stat().st_mode & 0o200


@pytest.mark.parametrize("target", ["../blobs/gone", "tokenizer.json"], ids=["dangling", "to itself"])
def test_a_link_that_leads_nowhere_is_refused_before_anything_is_copied(
    source: Path, tmp_path: Path, target: str
) -> None:
    make(source, "README.md")
    (source / "tokenizer.json").symlink_to(target)

    with pytest.raises(CatalogError, match=f"tokenizer.json: .* found a link to {target}"):
        copy_side_files(source, tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [".", "..", "../source/sub"])
def test_a_link_that_leads_in_a_circle_is_refused(source: Path, tmp_path: Path, target: str) -> None:
    make(source, "sub/README.md")
    (source / "sub/circle").symlink_to(target)

    with pytest.raises(CatalogError, match="circle: expected a file or a directory"):
        copy_side_files(source, tmp_path / "out")


def test_all_bad_links_are_named_together(source: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (source / name).symlink_to("gone")

    with pytest.raises(CatalogError) as caught:
        copy_side_files(source, tmp_path / "out")

    assert len(caught.value.faults) == 2

"""A folder as a source, and which source a name means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint

from trtllm_ct.base.errors import UsageError
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.opening import open_source
from trtllm_ct.checkpoint.source import Folder, Part, local_folder

if TYPE_CHECKING:
    from pathlib import Path


def test_a_folder_lists_what_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", ".hidden", "sub/config.json"):
        (tmp_path / name).touch()
    folder = Folder(tmp_path)

    assert folder.names() == ["a", "b", "sub"]
    assert folder.folders_with("config.json") == ["sub"]
    assert folder.has("a")
    assert not folder.has("c")
    assert (folder.place, folder.where("a")) == (str(tmp_path), str(tmp_path / "a"))


@pytest.mark.parametrize(("nbytes", "offset", "found"), [(4, 0, b"0123"), (4, 8, b"89"), (4, 10, b""), (0, 3, b"")])
def test_a_file_is_read_from_any_byte_on(tmp_path: Path, nbytes: int, offset: int, found: bytes) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")

    with Folder(tmp_path).open("file") as stored:
        assert stored.size == 10
        assert stored.read(nbytes, offset) == found


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")

    assert Folder(tmp_path).read("file", 10) == b"0123456789"
    with pytest.raises(OSError, match="10 bytes, where at most 9 are read"):
        Folder(tmp_path).read("file", 9)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_announcing_is_only_a_hint(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "file").mkdir()
    if kind == "pipe":
        os.mkfifo(tmp_path / "file")

    Folder(tmp_path).announce([Part("file", 0, 10)])


def test_a_folder_of_this_machine_goes_before_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "broken").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)

    for name in ("org/name", "org/broken", ".", ""):
        source = open_source(name)
        assert isinstance(source, Folder)
        assert local_folder(source) == source.folder
    assert open_source(tmp_path / "missing") == Folder(tmp_path / "missing")
    assert open_source("missing") == Folder(type(tmp_path)("missing"))
    assert open_source(Folder(tmp_path)) == Folder(tmp_path)


def test_weights_that_are_far_away_are_not_read(tmp_path: Path) -> None:
    """Only inspection, plan and doctor take them."""
    write_checkpoint(tmp_path / "made")

    class Far:
        weights_folder = None
        place = "org/name@main"

    catalog = Catalog(source=Far(), tensors={}, files=())  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="Download the checkpoint") as raised:
        _ = catalog.directory
    assert raised.value.faults[0].where == "org/name@main"

"""A file appears complete or not at all, and no link in its folder is followed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trtllm_ct.base.errors import OutputError
from trtllm_ct.base.whole_files import write_whole


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("an older and longer text")

    write_whole(tmp_path / "file", b"new", remedy="")

    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["file", ".file.{process}.partial"])
def test_a_link_in_the_folder_is_not_followed(tmp_path: Path, where: str) -> None:
    """Neither at the place itself nor at a name that another user could foresee."""
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / where.format(process=os.getpid())).symlink_to(tmp_path / "precious")

    write_whole(tmp_path / "file", b"new", remedy="")

    assert (tmp_path / "precious").read_text() == "years of work"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"No space left on device\. Name another one"):
        write_whole(tmp_path / "file", b"new", remedy="Name another one.")

    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OutputError):
        write_whole(tmp_path / "nowhere" / "file", b"new", remedy="")

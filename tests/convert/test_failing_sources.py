"""A disk of the source that fails: the file is named, and nothing is blamed on the output."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint

from trtllm_ct.base.errors import CatalogError, ConfigError
from trtllm_ct.convert import units
from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY = 5
"""Of the calls for a source, every so many fail in a test of their own."""


class FailingDisk:
    """Lets the `at`-th call of an `os` function on something in `source` fail with EIO."""

    def __init__(self, source: Path, function: Callable[..., Any]) -> None:
        self.source, self.function = str(source), function
        self.count = self.at = 0

    def __call__(self, target: Any = ".", *arguments: Any, **options: Any) -> Any:
        if self._is_inside(options.get("dir_fd") or target):
            self.count += 1
            if self.count == self.at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.function(target, *arguments, **options)

    def _is_inside(self, target: Any) -> bool:
        if isinstance(target, int):
            target = f"/proc/self/fd/{target}"
            return os.path.lexists(target) and Path(target).readlink().is_relative_to(self.source)
        return isinstance(target, (str, Path)) and str(target).startswith(self.source)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    config = tiny_config(layers=1, hidden=32, intermediate=64, vocabulary=32)
    scheme = {"o_proj": "int8-channel", "down_proj": "nvfp4"}  # One is converted directly, the other with torch.
    directory = write_checkpoint(tmp_path / "source", config=config, scheme=scheme, shards=2, tokenizer=True).directory
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tools.jinja").write_text("tools")
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", ["open", "read", "pread", "scandir", "stat", "lstat", "fstat"])
def test_a_call_that_fails_is_an_error_of_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Or it makes no difference, as where it was only a hint; a failure is never taken for a missing file."""
    convert_checkpoint(source, tmp_path / "wanted", workers=1)
    disk = FailingDisk(source, getattr(os, call))
    monkeypatch.setattr(os, call, disk)
    convert_checkpoint(source, tmp_path / "counted", workers=1)
    calls, found = disk.count, set[str]()

    for at in [*range(1, calls, EVERY), calls]:
        disk.count, disk.at, out = 0, at, tmp_path / f"out{at}"
        try:
            convert_checkpoint(source, out, workers=1)
        except (CatalogError, ConfigError) as error:
            found |= {fault.found.lower() for fault in error.faults}
        disk.at = 0
        assert not out.exists() or content(out) == content(tmp_path / "wanted"), at
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    assert found
    assert all("input/output error" in text for text in found)


def test_a_side_file_that_can_not_be_read_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FailingDisk(source / "tokenizer.json", os.read)
    disk.at = 1
    monkeypatch.setattr(os, "read", disk)

    with pytest.raises(CatalogError, match="found input/output error") as raised:
        convert_checkpoint(source, tmp_path / "out")

    assert [fault.where for fault in raised.value.faults] == [str(source / "tokenizer.json")]

"""Reads that return less than they were asked for, as on network disks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from trtllm_ct.base.regular_files import open_regular, read_at, read_bounded

if TYPE_CHECKING:
    from pathlib import Path

PAYLOAD = bytes(number % 251 for number in range(5000))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of which one call returns 7 bytes at most."""
    path = tmp_path / "file"
    path.write_bytes(PAYLOAD)
    read, pread = os.read, os.pread
    monkeypatch.setattr(os, "read", lambda descriptor, nbytes: read(descriptor, min(nbytes, 7)))
    monkeypatch.setattr(os, "pread", lambda descriptor, nbytes, offset: pread(descriptor, min(nbytes, 7), offset))
    return path


def test_a_file_is_read_whole(file: Path) -> None:
    assert read_bounded(file, 5000) == PAYLOAD


@pytest.mark.parametrize(("nbytes", "offset"), [(0, 3), (1, 0), (100, 50), (5000, 0), (6000, 4000), (10, 5000)])
def test_a_range_ends_at_the_end_of_the_file_only(file: Path, nbytes: int, offset: int) -> None:
    with open_regular(file) as descriptor:
        assert read_at(descriptor, nbytes, offset) == PAYLOAD[offset : offset + nbytes]

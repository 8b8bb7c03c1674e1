"""Few files are open at a time, however many shards there are and whatever threads do."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trtllm_ct.checkpoint.open_files import OpenFiles

SHARDS = 40


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for number in range(SHARDS):
        (tmp_path / f"{number}").write_bytes(number.to_bytes(1, "big"))
    return tmp_path


def open_below(directory: Path) -> int:
    links = list(Path("/proc/self/fd").iterdir())
    return sum(link.is_symlink() and link.readlink().is_relative_to(directory) for link in links)


def test_few_files_are_open_at_a_time(directory: Path) -> None:
    with OpenFiles(directory) as files:
        for number in [*range(SHARDS), *range(SHARDS)]:
            with files.descriptor(str(number)) as descriptor:
                assert os.pread(descriptor, 2, 0) == bytes([number])
            assert open_below(directory) <= 8
    assert open_below(directory) == 0


def test_a_file_in_use_stays_open(directory: Path) -> None:
    with OpenFiles(directory) as files, files.descriptor("0") as descriptor:
        for number in range(1, SHARDS):
            with files.descriptor(str(number)):
                pass
        assert os.pread(descriptor, 2, 0) == b"\0"


def test_threads_share_them(directory: Path) -> None:
    def read(number: int) -> int:
        with files.descriptor(str(number % SHARDS)) as descriptor:
            return os.pread(descriptor, 2, 0)[0]

    with OpenFiles(directory) as files, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(50 * SHARDS))) == [number % SHARDS for number in range(50 * SHARDS)]
        assert open_below(directory) <= 8


def test_a_missing_file_is_an_error_each_time(directory: Path) -> None:
    with OpenFiles(directory) as files:
        for _ in range(2):
            with pytest.raises(FileNotFoundError), files.descriptor("none"):
                pass

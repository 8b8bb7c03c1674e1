"""A file that shrinks while it is mapped: the load of its lost bytes gives zeros, and the file is named."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from fresh_python import run_python

from trtllm_ct.checkpoint.guarded_maps import guarded_maps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGE = 4096
SIZE = 64 * PAGE


@pytest.fixture(params=["file", "a name with\na line break", "carriage\rreturn", "löv\u00e9"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "folder" / request.param
    path.parent.mkdir()
    path.write_bytes(b"\1" * SIZE)
    return path.resolve()


def mapped(path: Path) -> memoryview:
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def in_threads(data: memoryview) -> int:
    """The sum, as several threads compute it at the same time."""
    sums: list[int] = []
    threads = [threading.Thread(target=lambda: sums.append(int(np.frombuffer(data, np.uint8).sum()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(sums)) == 1
    return sums[0]


LOADS: dict[str, Callable[[memoryview], int]] = {
    "numpy": lambda data: int(np.frombuffer(data, np.uint8).sum()),
    "bytes": lambda data: sum(bytes(data)),
    "torch": lambda data: int(torch.frombuffer(bytearray(data), dtype=torch.uint8).sum()),
    "threads": in_threads,
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("how", ["truncated", "truncated and removed", "renamed and truncated", "in a moved folder"])
def test_lost_pages_are_zeros_and_the_file_is_named(file: Path, load: str, how: str) -> None:
    data = mapped(file)

    with guarded_maps([file]) as damaged:
        assert LOADS[load](data) == SIZE
        assert damaged == set()
        now = file
        if how == "renamed and truncated":
            now = file.rename(file.with_name("renamed"))
        elif how == "in a moved folder":
            now = file.parent.rename(file.parent.with_name("moved")) / file.name
        os.truncate(now, 3 * PAGE)
        if how == "truncated and removed":
            file.unlink()
        assert LOADS[load](data) == 3 * PAGE

    assert damaged == {file}


def test_guards_inside_each_other_and_side_by_side_share_a_handler(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_bytes(b"\1" * SIZE)
    first, second = (mapped(path) for path in files)

    with guarded_maps(files) as outer:
        with guarded_maps([files[0]]) as inner:
            os.truncate(files[0], PAGE)
            assert sum(first) == PAGE
        os.truncate(files[1], PAGE)
        assert sum(second) == PAGE

    assert inner == {files[0]}
    assert outer == set(files)


@pytest.mark.parametrize("guarded", ["another file", "no longer"])
def test_other_loads_end_the_process_as_they_did_before(tmp_path: Path, guarded: str) -> None:
    code = """
        import mmap, os, sys
        from pathlib import Path
        from trtllm_ct.checkpoint.guarded_maps import guarded_maps

        path = Path(sys.argv[1])
        path.write_bytes(bytes(8192))
        data = mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ)
        os.truncate(path, 0)
        child = os.fork()
        if child == 0:
            with guarded_maps([path.with_name("other")] if sys.argv[2] == "another file" else [path]):
                if sys.argv[2] == "another file":
                    data[5000]
            data[5000]
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """

    done: Any = run_python(code, tmp_path / "file", guarded)

    assert int(done.stdout) == -signal.SIGBUS

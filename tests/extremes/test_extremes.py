"""More shards than a process may open, and files that no disk can hold; `extremes.run` has the large sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extremes.checkpoints import Extreme
from extremes.run import Limits, run_limited

if TYPE_CHECKING:
    from pathlib import Path


def test_a_process_needs_few_open_files(tmp_path: Path) -> None:
    directory, out = tmp_path / "in", tmp_path / "out"
    Extreme(layers=16, shards=200).write(directory)
    assert len(list(directory.glob("*.safetensors"))) > 100

    limits = Limits(files=64)
    for arguments in (
        ["inspect", directory],
        ["convert", directory, out, "--to", "modelopt"],
        ["verify", directory, out],
    ):
        done = run_limited(limits, *arguments)
        assert done.code == 0, done.output


def test_a_conversion_that_cannot_fit_on_the_disk_is_refused_in_1_gb_of_addresses(tmp_path: Path) -> None:
    """The files state terabytes, of which none is on the disk."""
    directory, out = tmp_path / "in", tmp_path / "out"
    Extreme(layers=200, shards=10, hidden=65536, intermediate=131072).write(directory)

    done = run_limited(Limits(addresses=1 << 30), "convert", directory, out, "--to", "modelopt")

    assert done.code == 2
    assert "expected room for" in done.output
    assert not list(tmp_path.glob(".out*"))

"""Measure commands on extreme checkpoints: `python -m extremes.run FOLDER`, with tests/ on the path.

FOLDER needs 20 GB of free space. The result is the table of docs/reliability.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from extremes.checkpoints import Extreme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Done", "Limits", "run_limited"]

_MB = 10**6
COMMANDS = ("inspect", "convert", "verify")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a process: open files, and address space in bytes."""

    files: int = 0
    addresses: int = 0

    @property
    def shell(self) -> str:
        """Shell commands that limit the shell, and what it is replaced by."""
        files = f"ulimit -n {self.files}; " if self.files else ""
        return files + (f"ulimit -v {self.addresses >> 10}; " if self.addresses else "")

    def __str__(self) -> str:
        return f"`{self.shell.rstrip('; ')}`" if self.shell else "none"


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command did: its exit code, the end of its output, processor seconds, and peak memory in bytes.

    The memory includes the pages of mapped files, which the kernel may drop.
    """

    code: int
    output: str
    seconds: float
    memory: int


def run_limited(limits: Limits, *arguments: str | Path) -> Done:
    """Run the command line in a process of its own with limits."""
    with tempfile.TemporaryFile() as output:
        script = f'{limits.shell}exec "$@"'
        command = ["sh", "-c", script, "sh", sys.executable, "-m", "trtllm_ct", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode()
    seconds = usage.ru_utime + usage.ru_stime
    return Done(code=process.returncode, output=text, seconds=seconds, memory=usage.ru_maxrss << 10)


CASES: tuple[tuple[Extreme, Limits, tuple[str, ...]], ...] = (
    (Extreme(layers=43, shards=500), Limits(files=64), COMMANDS),
    (Extreme(layers=434, shards=5000), Limits(files=64), COMMANDS),
    (Extreme(layers=8, shards=20, experts=1389), Limits(), COMMANDS),
    (Extreme(layers=80, shards=200, experts=1389), Limits(), COMMANDS),
    (
        Extreme(layers=50, shards=20, hidden=16384, intermediate=53248, vocabulary=128000),
        Limits(addresses=2 << 30),
        ("inspect", "convert"),
    ),
    (
        Extreme(layers=5, shards=1, hidden=8192, intermediate=28672),
        Limits(addresses=2 << 30),
        ("inspect", "convert"),
    ),
)


def rows(folder: Path) -> Iterator[str]:
    """Yield the rows of the table, one for each command."""
    for extreme, limits, commands in CASES:
        directory, out = folder / "in", folder / "out"
        # A process that is started counts the memory of its parent as its own peak, so the parent stays small.
        with ProcessPoolExecutor(1) as writer:
            tensors = writer.submit(extreme.write, directory).result()
        files = list(directory.glob("*.safetensors"))
        gigabytes = sum(file.stat().st_size for file in files) / 10**9
        what = f"{tensors:,} tensors in {len(files):,} files, {gigabytes:.1f} GB"
        arguments: dict[str, tuple[str | Path, ...]] = {
            "inspect": ("inspect", directory),
            "convert": ("convert", directory, out, "--to", "modelopt"),
            "verify": ("verify", directory, out),
        }
        for command in commands:
            done = run_limited(limits, *arguments[command])
            end = "done" if done.code == 0 else done.output.strip().splitlines()[-2].strip()
            figures = f"{done.seconds:.1f} s | {done.memory / _MB:.0f} MB"
            yield f"| {what} | {limits} | `{command}` | {figures} | {end} |"
        shutil.rmtree(directory)
        shutil.rmtree(out, ignore_errors=True)


def main(show: Callable[[str], None] = print) -> None:
    """Print the table."""
    show("| checkpoint | limits | command | processor | memory | end |")
    show("| --- | --- | --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        for row in rows(Path(folder)):
            show(row)


if __name__ == "__main__":
    main()

"""Measure `trtllm-ct inspect ORG/NAME` of a checkpoint in the shape of Kimi K2, over a local server with latency.

`python -m extremes.hub`, with tests/ and tests/support/ on the path, prints the table of docs/hub.md. The checkpoint
has 62 shards of 600 GB together, whose payload is a hole: 60 MB on disk.
`python -m extremes.hub convert` prints the table about `convert ORG/NAME OUT`, of a checkpoint of 1.1 billion weights
in int4, 10 shards; each answer of the server comes at 50 MB/s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hub_server import serving

from benchmarks.kimi import KimiShape
from benchmarks.shapes import LlamaShape

if TYPE_CHECKING:
    from hub_server import HubServer

__all__ = ["Converted", "Measured", "convert_table", "measure", "measure_convert", "table"]

NAME = "some-org/Kimi-K2"
RATE = 50e6
"""Bytes per second of an answer of the server, where weights are fetched."""

_LLAMA = LlamaShape(
    name="1b", hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=32000, shard_bytes=80 * 10**6
)

LATENCY = 0.05
"""Seconds before the server answers a request; an answer from the store of weights takes two requests."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run took: seconds, requests to both hosts, and bytes of their answers."""

    what: str
    seconds: float
    requests: int
    nbytes: int


def measure(layers: int = 61) -> list[Measured]:
    """Inspect a directory, the same as a repository, and that repository again; each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, serving(latency=LATENCY) as hub:
        directory = Path(folder, "model")
        directory.mkdir()
        KimiShape(layers=layers).write(directory)
        hub.add(NAME, directory)
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": folder, "NO_PROXY": "*"}
        environment = {**os.environ, **variables, "XDG_CACHE_HOME": folder}
        return [
            _inspect(hub, "the directory", str(directory), environment),
            _inspect(hub, "the repository", NAME, environment),
            _inspect(hub, "the repository, read before", NAME, environment),
        ]


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion took: seconds, bytes of weights that were sent, and the most that were on the disk."""

    what: str
    seconds: float
    nbytes: int
    most: int


def measure_convert(shape: LlamaShape = _LLAMA, rate: float = RATE) -> list[Converted]:
    """Convert a directory, and the same as a repository with room for all shards, for four and for two."""
    with tempfile.TemporaryDirectory() as folder, serving(latency=LATENCY, rate=rate) as hub:
        directory = Path(folder, "model")
        directory.mkdir()
        shape.write(directory)
        hub.add(NAME, directory)
        shard = max(path.stat().st_size for path in directory.glob("*.safetensors"))
        return [
            _convert(hub, "the directory", str(directory), Path(folder, "out"), []),
            *(
                _convert(hub, f"the repository{words}", NAME, Path(folder, "out"), options)
                for words, options in (
                    ("", []),
                    (", `--keep` of four shards", ["--keep", str(4 * shard)]),
                    (", `--keep` of two shards", ["--keep", str(2 * shard)]),
                )
            ),
        ]


def _convert(hub: HubServer, what: str, place: str, out: Path, options: list[str]) -> Converted:
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(out.parent), "NO_PROXY": "*"}
    environment = {**os.environ, **variables, "XDG_CACHE_HOME": str(out.parent)}
    before, most = hub.weights_sent, 0
    start = time.perf_counter()
    command = [sys.executable, "-m", "trtllm_ct", "convert", place, str(out), "--workers", "2", *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            most = max(most, _bytes_in(out.with_name(f".{out.name}.partial") / ".download"))
            time.sleep(0.02)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return Converted(what, seconds, hub.weights_sent - before, most)


def _bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a folder; files may go meanwhile."""
    total = 0
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def convert_table(runs: list[Converted]) -> str:
    """The conversions as the lines of a table."""
    lines = ["| `convert` of | seconds | megabytes fetched | most on the disk |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {run.what} | {run.seconds:.1f} | {run.nbytes / 1e6:.0f} | {run.most / 1e6:.0f} |" for run in runs]
    return "\n".join(lines)


def _inspect(hub: HubServer, what: str, place: str, environment: dict[str, str]) -> Measured:
    before = len(hub.requests), hub.sent
    start = time.perf_counter()
    command = [sys.executable, "-m", "trtllm_ct", "inspect", place]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    seconds = time.perf_counter() - start
    return Measured(what, seconds, len(hub.requests) - before[0], hub.sent - before[1])


def table(runs: list[Measured]) -> str:
    """The runs as the lines of a table."""
    lines = ["| `inspect` of | seconds | requests | megabytes |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {run.what} | {run.seconds:.1f} | {run.requests} | {run.nbytes / 1e6:.1f} |" for run in runs]
    return "\n".join(lines)


if __name__ == "__main__":
    print(convert_table(measure_convert()) if "convert" in sys.argv else table(measure()))

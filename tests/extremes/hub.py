"""Measure `trtllm-ct inspect ORG/NAME` of a checkpoint in the shape of Kimi K2, over a local server with latency.

`python -m extremes.hub`, with tests/ and tests/support/ on the path, prints the table of docs/hub.md. The checkpoint
has 62 shards of 600 GB together, whose payload is a hole: 60 MB on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hub_server import serving

from benchmarks.kimi import KimiShape

if TYPE_CHECKING:
    from hub_server import HubServer

__all__ = ["Measured", "measure", "table"]

NAME = "some-org/Kimi-K2"
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
    print(table(measure()))

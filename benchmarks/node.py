"""Measure the bytes that the ranks of one node read from its disk when all load at once, from a cold page cache.

The files are dropped from the page cache first. The kernel counts the bytes that it fetched from the disk for each
process. Bytes that another process has fetched already, or is fetching at the moment, are not counted again. On file
systems in memory, all counts are zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["node_bytes"]


def node_bytes(directory: str, ranks: str) -> dict[str, Any]:
    """Load the slices of every rank, each in its own process.

    Returns the seconds, the bytes that the files store, and for each rank the bytes that it asked for and the bytes
    that were fetched from the disk for it.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    for file in files:
        _drop_from_cache(file)
    started = time.perf_counter()
    processes = [
        subprocess.Popen(  # noqa: S603 (this package)
            [sys.executable, "-m", __name__, directory, ranks, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(int(ranks))
    ]
    printed = [process.communicate()[0] for process in processes]
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        raise RuntimeError(f"ranks {failed} failed; their messages are above")
    return {
        "seconds": time.perf_counter() - started,
        "stored": sum(file.stat().st_size for file in files),
        "ranks": [json.loads(line) for line in printed],
    }


def _rank_load(directory: str, ranks: str, rank: str) -> dict[str, int]:
    """Load the slices of one rank and read every delivered byte once; return the bytes asked for and fetched."""
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.engine.parallel import Parallel, Rank
    from trtllm_ct.pipeline.open import open_checkpoint
    from trtllm_ct.pipeline.stream import stream_delivered
    from trtllm_ct.plan.ranks.shard import plan_for_rank

    before = _fetched_bytes()
    checkpoint, parallel = open_checkpoint(directory), Parallel(tensor=int(ranks))
    whole = checkpoint.plan(parallel=parallel)
    plan = plan_for_rank(whole, checkpoint.model, Rank(parallel=parallel, tensor=int(rank)))
    with TensorReader(checkpoint.catalog) as reader:
        for _delivered in stream_delivered(plan, checkpoint.catalog, reader=reader):
            pass
        asked = reader.bytes_read
        # Tensors that are delivered unchanged are views of memory-mapped files, which are fetched when they are read.
        for module in plan.modules:
            for run in module.runs:
                reader.read(run.name, run.begin, run.end).elements.reshape(-1)[run.begin : run.end].copy()
    return {"asked": asked, "fetched": _fetched_bytes() - before}


def _drop_from_cache(file: Path) -> None:
    """Drop the pages of a file from the kernel's page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _fetched_bytes() -> int:
    """Return the bytes that the kernel has fetched from a disk for this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    print(json.dumps(_rank_load(*sys.argv[1:])))

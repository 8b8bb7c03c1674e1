"""What the ranks of one node read from its disk, all at the same time, when nothing of a checkpoint is in memory.

The files are dropped from the page cache first. The kernel counts what each process made it fetch from the disk; what
another one had fetched already, or is just fetching, costs nothing and is not counted. File systems in memory have no
disk, and count nothing.
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
    """Ours: every rank loads its slices in a process of its own; bytes stored, asked for and fetched from the disk."""
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
        raise RuntimeError(f"ranks {failed} failed; what they say of it stands above")
    return {
        "seconds": time.perf_counter() - started,
        "stored": sum(file.stat().st_size for file in files),
        "ranks": [json.loads(line) for line in printed],
    }


def _rank_load(directory: str, ranks: str, rank: str) -> dict[str, int]:
    """One of the ranks: all that it is handed, looked at once."""
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
        # What is handed on as it is lies in mapped files, and is fetched when it is looked at.
        for module in plan.modules:
            for run in module.runs:
                reader.read(run.name, run.begin, run.end).view(-1)[run.begin : run.end].clone()
    return {"asked": asked, "fetched": _fetched_bytes() - before}


def _drop_from_cache(file: Path) -> None:
    """Have the kernel forget the pages of a file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _fetched_bytes() -> int:
    """Bytes that this process made the kernel fetch from a disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    print(json.dumps(_rank_load(*sys.argv[1:])))

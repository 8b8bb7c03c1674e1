"""Runs processes one after another and measures them: seconds from outside, and the peak of anonymous memory.

Sides of a case take turns, so that what changes on a machine in the meantime hits all of them; every other round runs
backwards. Before each run, outside of its time, the output of the last one is deleted, what is still to be written
goes to disk, and every byte of the source is read once, so that it lies in the page cache.

Linux keeps no record of the highest anonymous memory of a process, so it is sampled while the process runs: mapped
files are left out, and a peak that lasts less than the 5 ms between two samples can be missed.
"""

from __future__ import annotations

import json
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import Clock, Sample, Side
from trtllm_ct.base.errors import Fault, TrtllmCtError
from trtllm_ct.base.memory_budget import available_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Job", "JobError", "anonymous_bytes", "measure_in_turn", "run_job", "warm"]

_INTERVAL = 0.005
_SLOW = 60.0
"""A side that takes longer than this is run once: more would say little more, and take minutes."""
_CHUNK = 1 << 24
_MEMORY_SHARE = 0.85
"""Of the memory that is available, what a process may take: beyond it, it is ended here, and not by the system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Commands that run one after another, all of which count; what they make in `output` is deleted afterwards.

    The last line on stdout of the last command may be a JSON object: what it says of itself. `seconds` in it is the
    time of the call alone.
    """

    commands: tuple[tuple[str, ...], ...]
    output: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class JobError(TrtllmCtError):
    """A command failed, or took too much memory."""


def measure_in_turn(jobs: Mapping[str, Job], clock: Clock, runs: int, source: Path | None = None) -> tuple[Side, ...]:
    """Run the jobs `runs` times in turn; one that fails, or takes over a minute, is not run again."""
    samples: dict[str, list[Sample]] = {name: [] for name in jobs}
    failures: dict[str, str] = {}
    for turn in range(runs):
        for name in list(jobs)[:: -1 if turn % 2 else 1]:
            if name in failures or any((done.process_seconds or 0) > _SLOW for done in samples[name]):
                continue
            try:
                samples[name].append(_run_prepared(jobs[name], source))
            except JobError as error:
                failures[name] = error.faults[0].found
    return tuple(
        Side(name=name, clock=clock, samples=tuple(samples[name]), failure=failures.get(name, "")) for name in jobs
    )


def _run_prepared(job: Job, source: Path | None) -> Sample:
    if job.output is not None:
        shutil.rmtree(job.output, ignore_errors=True)
    os.sync()
    if source is not None:
        warm(source)
    try:
        return run_job(job)
    finally:
        if job.output is not None:
            shutil.rmtree(job.output, ignore_errors=True)


def _environment(job: Job) -> dict[str, str]:
    """That of this process, but with bytecode kept, as it is where packages are installed: parsing is not measured."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **job.environment}


def run_job(job: Job) -> Sample:
    """Run it and measure it. Raises `JobError` that says what a command printed last when it fails."""
    seconds, peak, printed, limit = 0.0, 0, "", int((available_memory() or sys.maxsize) * _MEMORY_SHARE)
    for command in job.commands:
        started = time.perf_counter()
        with (
            subprocess.Popen(  # noqa: S603 (the commands of `cases.py`)
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(job),
                text=True,
            ) as process,
            _sampled(process, limit) as peaks,
        ):
            printed, complaints = process.communicate()
            seconds += time.perf_counter() - started
        peak = max(peak, *peaks)
        if peak > limit:
            raise _failed(command, f"more than the {limit / 1e9:.1f} GB of memory that were free")
        if process.returncode:
            last = (complaints.strip() or printed.strip() or "nothing printed").splitlines()[-1]
            raise _failed(command, f"exit code {process.returncode}: {last[:200]}")
    facts = _facts(printed)
    return Sample(
        process_seconds=seconds, call_seconds=facts.pop("seconds", None), peak_anonymous=peak or None, facts=facts
    )


def _failed(command: tuple[str, ...], found: str) -> JobError:
    remedy = "Run the command by itself to see all that it prints."
    return JobError(Fault(where=shlex.join(command), expected="exit code 0", found=found, remedy=remedy))


def warm(directory: Path) -> None:
    """Read every file once, so that it lies in the page cache; holes are skipped."""
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.stat().st_blocks * 512 < path.stat().st_size // 2:
            continue
        with path.open("rb", buffering=0) as stream:
            buffer = bytearray(_CHUNK)
            while stream.readinto(buffer):
                pass


def anonymous_bytes(pid: int | str = "self") -> int:
    """Resident anonymous memory of a process, now; 0 when it is gone or the platform doesn't say."""
    try:
        # One line of numbers, where `status` is fifty of text: two hundred times a second, on a core that is in use.
        _size, resident, of_files, *_ = Path(f"/proc/{pid}/statm").read_bytes().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(of_files)) * mmap.PAGESIZE


@contextmanager
def _sampled(process: subprocess.Popen[str], limit: int) -> Iterator[list[int]]:
    """A list whose only entry is the highest anonymous memory that was seen so far; beyond `limit` the process ends."""
    peaks, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(_INTERVAL):
            peaks[0] = max(peaks[0], anonymous_bytes(process.pid))
            if peaks[0] > limit:
                process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def _facts(printed: str) -> dict[str, Any]:
    """The JSON object that a command printed, in one line at the end or over all lines."""
    for text in (printed, *printed.splitlines()[-1:]):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}

"""Run processes one after another and measure their wall time, their processor time and their peak anonymous memory.

The sides of a case run alternately, so that changes of the machine over time affect all of them; every other round runs
in reverse order. Before each run, outside the timed part, the output of the previous run is deleted, dirty pages are
written to disk, and every byte of the source is read once, so that it is in the page cache.

Linux does not record the highest anonymous memory of a process, so it is sampled while the process runs. Memory-mapped
files are not included, and a peak that is shorter than the 5 ms between two samples can be missed.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
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

_SAMPLING_SECONDS = 0.005
_SLOW = 60.0
"""A side that takes more seconds than this runs only once: more runs would take minutes and add little."""
_CHUNK = 1 << 24
_MEMORY_SHARE = 0.85
"""The share of the available memory that a process may use; it is killed beyond that, before the system does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Commands that run one after another and are timed together; their directory `output` is deleted afterwards.

    `before` is a command that makes what they read; it is not timed.
    The last command may print a JSON object with facts about its run, as all of its stdout or as the last line. The
    key `seconds` in it is the time of the call alone, without the start of the process.
    """

    commands: tuple[tuple[str, ...], ...]
    before: tuple[str, ...] = ()
    output: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class JobError(TrtllmCtError):
    """A command failed or used too much memory."""


def measure_in_turn(jobs: Mapping[str, Job], clock: Clock, runs: int, source: Path | None = None) -> tuple[Side, ...]:
    """Run the jobs alternately, `runs` times each; a job that fails or takes over a minute is not run again."""
    samples: dict[str, list[Sample]] = {name: [] for name in jobs}
    failures: dict[str, str] = {}
    for round_number in range(runs):
        for name in list(jobs)[:: -1 if round_number % 2 else 1]:
            if name in failures or any((sample.process_seconds or 0) > _SLOW for sample in samples[name]):
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
    try:
        if job.before:
            run_job(Job(commands=(job.before,), environment=job.environment))
        os.sync()
        if source is not None:
            warm(source)
        return run_job(job)
    finally:
        if job.output is not None:
            shutil.rmtree(job.output, ignore_errors=True)


def _environment(job: Job) -> dict[str, str]:
    """Return the environment of this process and the job, with Python's bytecode cache enabled.

    Installed packages have cached bytecode as well, so the time to parse source files is not measured.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **job.environment}


def run_job(job: Job) -> Sample:
    """Run and measure a job; raises `JobError` with the last line that a failing command printed."""
    seconds, peak, stdout, limit = 0.0, 0, "", int((available_memory() or sys.maxsize) * _MEMORY_SHARE)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
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
            _memory_sampled(process, limit) as peaks,
        ):
            stdout, stderr = process.communicate()
            seconds += time.perf_counter() - started
        peak = max(peak, *peaks)
        if peak > limit:
            raise _failed(command, f"more than the {limit / 1e9:.1f} GB of memory that were free")
        if process.returncode:
            last_line = (stderr.strip() or stdout.strip() or "nothing printed").splitlines()[-1]
            raise _failed(command, f"exit code {process.returncode}: {last_line[:200]}")
    facts, after = _facts(stdout), resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(
        process_seconds=seconds,
        call_seconds=facts.pop("seconds", None),
        user_seconds=after.ru_utime - before.ru_utime,
        system_seconds=after.ru_stime - before.ru_stime,
        peak_anonymous=peak or None,
        facts=facts,
    )


def _failed(command: tuple[str, ...], found: str) -> JobError:
    remedy = "Run the command by itself to see all that it prints."
    return JobError(Fault(where=shlex.join(command), expected="exit code 0", found=found, remedy=remedy))


def warm(directory: Path) -> None:
    """Read every file of a directory once, so that it is in the page cache; sparse files are skipped."""
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.stat().st_blocks * 512 < path.stat().st_size // 2:
            continue
        with path.open("rb", buffering=0) as stream:
            buffer = bytearray(_CHUNK)
            while stream.readinto(buffer):
                pass


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the current resident anonymous memory of a process; 0 if it has ended or the platform can't report it."""
    try:
        # `statm` is one line of numbers and cheaper to read than the fifty lines of `status`. That matters: it is read
        # 200 times a second, on a core that is in use.
        _size, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_bytes().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE


@contextmanager
def _memory_sampled(process: subprocess.Popen[str], limit: int) -> Iterator[list[int]]:
    """Sample the anonymous memory of a process, and kill it when it uses more than `limit` bytes.

    Yields a list whose only entry is the highest value so far.
    """
    peaks, finished = [0], threading.Event()

    def watch() -> None:
        while not finished.wait(_SAMPLING_SECONDS):
            peaks[0] = max(peaks[0], anonymous_bytes(process.pid))
            if peaks[0] > limit:
                process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        finished.set()
        watcher.join()


def _facts(stdout: str) -> dict[str, Any]:
    """Return the JSON object that is all of a command's output or its last line; empty if there is none."""
    for text in (stdout, *stdout.splitlines()[-1:]):
        try:
            document = json.loads(text)
        except ValueError:
            continue
        if isinstance(document, dict):
            return document
    return {}

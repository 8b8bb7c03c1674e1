"""Ends conversions on the ranks of an MPI job at their file-system calls; see `crash_harness.py`.

`report` prints what that of `crash_harness` prints, with the calls of each rank. mpirun runs this file on every rank,
with a file of trials. A rank that is killed ends its job, so there is a job for each kill; trials with errors, and the
same commands again, share one job.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crash_harness import ENDINGS, KILLS, OUT, REPLACED, Calls, looked_at, scenes, small_units, what_is_left_behind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crash_harness import Scene

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SCENES = ("fresh", "overwrite")
SECONDS = 120
"""The longest time of a job, and of a trial of several in one job; more means that ranks wait for each other."""


@dataclass(frozen=True)
class Trial:
    """A conversion into `folder` that ends, if `at` is not 0, at a call of a rank."""

    source: str
    folder: str
    overwrite: bool
    rank: int = 0
    ending: str = ""
    at: int = 0


def on_a_rank(trials: str) -> None:
    """Run all trials; rank 0 adds a line to `TRIALS.ends` for each: the calls of the ranks, and how they ended."""
    from mpi4py import MPI

    small_units()
    calls = Calls()
    calls.install()
    for entry in json.loads(Path(trials).read_text()):
        trial = Trial(**entry)
        calls.begin(trial.ending, trial.at if trial.rank == MPI.COMM_WORLD.rank else 0)
        end = _end(trial)
        ends = MPI.COMM_WORLD.gather((calls.count, end))
        if ends is not None:
            with Path(f"{trials}.ends").open("a") as stream:
                stream.write(f"{json.dumps(list(zip(*ends, strict=True)))}\n")


def _end(trial: Trial) -> str:
    from trtllm_ct.base.errors import TrtllmCtError
    from trtllm_ct.convert.convert import convert_checkpoint

    options: dict[str, Any] = {"overwrite": trial.overwrite, "max_shard_bytes": 20_000, "executor": "mpi"}
    try:
        convert_checkpoint(trial.source, Path(trial.folder) / OUT, **options)
    except TrtllmCtError:
        return "refused"
    except BaseException:  # noqa: BLE001 (a trial may end with any)
        return traceback.format_exc()
    return "done"


@dataclass
class Jobs:
    """Starts MPI jobs of so many ranks, with their files in `work`."""

    work: Path
    ranks: int

    def __post_init__(self) -> None:
        self._numbers = count()

    def ends(self, trials: list[Trial]) -> list[Any]:
        """Run trials in one job; return the calls and the ends of the ranks for each that was run to its end."""
        if not trials:
            return []
        path = self.work / f"trials-{next(self._numbers)}"
        path.write_text(json.dumps([asdict(trial) for trial in trials]))
        command = [MPIRUN or "mpirun", "-n", str(self.ranks), sys.executable, __file__, str(path)]
        try:
            subprocess.run(command, capture_output=True, check=False, timeout=SECONDS + len(trials) * SECONDS // 20)
        except subprocess.TimeoutExpired:
            return [[[], [f"ranks that waited for each other for {SECONDS} s"]]] * len(trials)
        ends = Path(f"{path}.ends")
        return [json.loads(line) for line in ends.read_text().splitlines()] if ends.exists() else []

    def new_folder(self, scene: Scene) -> Path:
        folder = self.work / f"run-{next(self._numbers)}"
        shutil.copytree(scene.template, folder, copy_function=shutil.copy2)
        return folder


def ended(scene: Scene, jobs: Jobs, endings: list[tuple[int, int, str]]) -> Iterator[str]:
    """Try endings of (rank, call, ending) at once; say what is wrong after them, and after the same commands again."""
    folders = {
        ending: Trial(str(scene.source), str(jobs.new_folder(scene)), scene.overwrites, ending[0], ending[2], ending[1])
        for ending in endings
    }
    with_errors = [trial for trial in folders.values() if trial.ending not in KILLS]
    ends = jobs.ends(with_errors)
    if len(ends) != len(with_errors):
        yield f"{scene.name}: a job with errors ended after {len(ends)} trials"
    yield from (
        f"{trial}: {end}" for trial, (_, texts) in zip(with_errors, ends, strict=False) for end in _wrong(texts)
    )
    for trial in folders.values():
        if trial.ending in KILLS:
            yield from (f"{trial}: {end}" for _, texts in jobs.ends([trial]) for end in _wrong(texts))
    for trial in folders.values():
        folder = Path(trial.folder)
        yield from (f"{trial}: {text}" for text in scene.complaints(folder, looked_at(folder, OUT), None))
    # One that has its name already, with nothing to overwrite, would be refused.
    unfinished = [
        trial
        for trial in folders.values()
        if scene.overwrites or not (Path(trial.folder) / OUT).exists() or looked_at(Path(trial.folder), REPLACED)
    ]
    again = jobs.ends([Trial(trial.source, trial.folder, trial.overwrite) for trial in unfinished])
    if [texts for _, texts in again] != [["done"] * jobs.ranks] * len(unfinished):
        yield f"{scene.name}: the same commands end with {again}"
    for trial in folders.values():
        folder = Path(trial.folder)
        if looked_at(folder, OUT) != scene.new:
            yield f"{trial}: the same command gives another output"
        yield from (f"{trial}: {text}" for text in what_is_left_behind(folder))
        shutil.rmtree(folder)


def _wrong(ends: list[str]) -> list[str]:
    return [end for end in ends if end not in {"done", "refused"}]


def report(step: int, ranks: int, first: int = 0, batch: int = 200) -> None:
    """Try every `step`-th ending of each scene, on all ranks, and print what was wrong."""
    calls: dict[str, list[int]] = {}
    tried, wrong = 0, []
    with tempfile.TemporaryDirectory() as work:
        jobs = Jobs(Path(work), ranks)
        for scene in scenes(Path(work), SCENES):
            [[counts, ends]] = jobs.ends([Trial(str(scene.source), str(jobs.new_folder(scene)), scene.overwrites)])
            calls[scene.name] = counts
            wrong += _wrong(ends)
            every = [(rank, at, end) for rank in range(ranks) for at in range(1, counts[rank] + 1) for end in ENDINGS]
            chosen = every[first::step]
            for begin in range(0, len(chosen), batch):
                wrong += ended(scene, jobs, chosen[begin : begin + batch])
            tried += len(chosen)
    print(json.dumps({"calls": calls, "endings": tried, "wrong": wrong}, indent=1))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        on_a_rank(sys.argv[1])
    else:
        report(*(int(argument) for argument in sys.argv[1:]))

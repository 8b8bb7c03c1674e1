"""Run cases and count what came of them: `python -m fuzz.run --cases 1000000 --seed 1`, with tests/ on the path.

Each case must succeed or raise an error of this package whose faults say where, what was expected, what was found and
what to do, within five seconds. Anything else is an escape, which is listed with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import TrtllmCtError

if TYPE_CHECKING:
    from fuzz.subjects import Subject

__all__ = ["Figures", "run_cases"]

MAX_SECONDS = 5.0
MAX_FAULT_CHARACTERS = 10_000


@dataclass(slots=True)
class Figures:
    """What came of the cases of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    escapes: list[str] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0
    grown_megabytes: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for a report."""
        return {
            "cases": sum(self.outcomes.values()),
            "escapes": len(self.escapes),
            "outcomes": dict(sorted(self.outcomes.items())),
            "slowest_seconds": round(self.slowest, 2),
            "seconds": round(self.seconds, 1),
            "grown_megabytes": round(self.grown_megabytes),
        }


def run_cases(subjects: tuple[Subject, ...], cases: int, seed: int) -> Figures:
    """Run so many cases, of each subject its share; the cases of a seed are always the same."""
    figures, started, before = Figures(), perf_counter(), _peak_megabytes()
    for subject in subjects:
        for number in range(round(cases * subject.share)):
            _run_case(subject, f"{subject.name}-{seed}-{number}", figures)
    figures.seconds = perf_counter() - started
    figures.grown_megabytes = _peak_megabytes() - before
    return figures


def _run_case(subject: Subject, name: str, figures: Figures) -> None:
    """Run one case; its name is the seed of its random numbers."""
    started = process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject.run(Random(name))
        outcome = "read"
    except TrtllmCtError as error:
        outcome = type(error).__name__
        complaint = _complaint(error)
        if complaint:
            figures.escapes.append(f"{name}: {complaint}")
    except Exception as error:  # noqa: BLE001 (any other exception is what is looked for)
        outcome = "escape"
        last = traceback.extract_tb(error.__traceback__)[-1]
        figures.escapes.append(f"{name}: {type(error).__name__} in {last.filename}:{last.lineno} {str(error)[:200]}")
    seconds = process_time() - started
    figures.slowest = max(figures.slowest, seconds)
    if seconds > MAX_SECONDS:
        figures.escapes.append(f"{name}: {seconds:.1f} s")
    figures.outcomes[f"{subject.name}: {outcome}"] += 1


def _complaint(error: TrtllmCtError) -> str:
    """Say what an error lacks; empty if it is complete."""
    if not error.faults:
        return "an error without faults"
    for fault in error.faults:
        texts = (fault.where, fault.expected, fault.found, fault.remedy)
        if not all(text.strip() for text in texts):
            return f"a fault with an empty text: {fault}"
        if sum(map(len, texts)) > MAX_FAULT_CHARACTERS:
            return "a fault that is too long"
        if not all(text.isprintable() for text in texts):
            return f"a fault with control characters: {fault!r}"
    return ""


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run cases as the arguments say, print the figures, and end with 1 if there was an escape."""
    parser = argparse.ArgumentParser(description="Change checkpoints at random and read them.")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shared", type=Path, help="folder with real checkpoints, whose quantization blocks are used")
    parser.add_argument("--only", help="name of the one subject to run all cases of")
    arguments = parser.parse_args()
    from fuzz.subjects import make_subjects

    with tempfile.TemporaryDirectory() as folder:
        subjects = make_subjects(Path(folder), arguments.shared)
        if arguments.only:
            subjects = tuple(replace(subject, share=1.0) for subject in subjects if subject.name == arguments.only)
        figures = run_cases(subjects, arguments.cases, arguments.seed)
    print(json.dumps(figures.to_dict(), indent=1))
    print("\n".join(figures.escapes[:200]))
    sys.exit(1 if figures.escapes else 0)


if __name__ == "__main__":
    main()

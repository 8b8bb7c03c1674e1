"""Run the mirrored tests against mutants, one at a time, in a copy of the package."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tests.mutation.mutants import Mutant, mutants_of, parses

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
EQUIVALENTS = Path(__file__).parent / "equivalents.json"
SOURCES = (
    "trtllm_ct/layouts/*.py",
    "trtllm_ct/formats/**/*.py",
    "trtllm_ct/engine/modes.py",
    "trtllm_ct/engine/holdings.py",
    "trtllm_ct/plan/**/*.py",
    "trtllm_ct/convert/*.py",
    "trtllm_ct/verify/**/*.py",
)
"""The files that are mutated."""

# Tests of a folder beside those that mirror its files by name.
FOLDER_TESTS = {
    "trtllm_ct/layouts": ("tests/layouts",),
    "trtllm_ct/formats": ("tests/formats",),
    "trtllm_ct/engine": ("tests/engine", "tests/plan/test_assign.py"),
    "trtllm_ct/plan": ("tests/plan", "tests/end_to_end/test_mistral_native.py"),
    "trtllm_ct/convert": ("tests/convert",),
    "trtllm_ct/verify": ("tests/verify",),
}
_COPIED = ("trtllm_ct", "tests", "docs", "benchmarks", "examples")
_LINKED = ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt")


def chosen(count: int, seed: int, only: str) -> list[Mutant]:
    """Return `count` mutants of the files whose path begins with `only`: the same for the same seed and sources."""
    files = sorted({str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern)})
    every = [mutant for file in files if file.startswith(only) for mutant in mutants_of(ROOT, file)]
    random.Random(seed).shuffle(every)
    valid = (mutant for mutant in every if parses(mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))))
    return list(islice(valid, count))


def run(mutants: list[Mutant], *, seconds: float, timeout: float, results: Path) -> list[dict[str, Any]]:
    """Return the result of each mutant; those in the file `results` are not run again, and new ones are added to it.

    Stops after `seconds`. Tests are stopped after `timeout` seconds: such a mutant is neither killed nor survived, and
    the next run tries it again.
    """
    done = {entry["key"]: entry for entry in _lines(results) if entry["status"] != "timeout"}
    equivalents = {entry["key"]: entry["reason"] for entry in json.loads(EQUIVALENTS.read_text(encoding="utf-8"))}
    deadline = time.monotonic() + seconds
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        _copy_to(copy)
        for mutant in mutants:
            if mutant.key in done or time.monotonic() > deadline:
                continue
            status, tests = "equivalent", ()
            if mutant.key not in equivalents:
                status, tests = _status(copy, mutant, timeout)
            entry = {"key": mutant.key, "status": status, "tests": list(tests)} | mutant.to_dict()
            done[mutant.key] = entry
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{status:10} {mutant.file}:{mutant.line}: {mutant.before} -> {mutant.after}", flush=True)
    return [done[mutant.key] for mutant in mutants if mutant.key in done]


def _status(copy: Path, mutant: Mutant, timeout: float) -> tuple[str, tuple[str, ...]]:
    """Return what the tests say of a mutant, and which were run: first those of its file, then those of its folder."""
    path = copy / mutant.file
    source = path.read_text(encoding="utf-8")
    tests = tuple(_tests(mutant.file))
    try:
        path.write_text(mutant.applied(source), encoding="utf-8")
        for group in tests:
            if (status := _outcome(copy, group.split(), timeout)) != "survived":
                return status, tests
    finally:
        path.write_text(source, encoding="utf-8")
    return "survived", tests


def _tests(file: str) -> Iterator[str]:
    """Yield the tests to run for a file, as arguments of pytest: the most likely to fail first."""
    folder = next(folder for folder in FOLDER_TESTS if file.startswith(folder))
    mirrored = Path(file.replace("trtllm_ct/", "tests/", 1))
    named = sorted(ROOT.glob(str(mirrored.with_name(f"test_{mirrored.stem}*.py"))))
    if named:
        yield " ".join(str(path.relative_to(ROOT)) for path in named)
    yield " ".join(FOLDER_TESTS[folder])


def _outcome(copy: Path, tests: list[str], timeout: float) -> str:
    """Return "survived" if all tests pass, "killed" if one fails, "timeout" if they take too long to tell."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {name: value for name, value in os.environ.items() if name != "TRTLLM_CT_SHARED"}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return "timeout"
    return "killed" if done.returncode != 0 else "survived"


def _copy_to(copy: Path) -> None:
    """Copy what the tests need, without bytecode: a mutant is not to be hidden by the bytecode of its source."""
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _LINKED:
        (copy / name).symlink_to(ROOT / name)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)

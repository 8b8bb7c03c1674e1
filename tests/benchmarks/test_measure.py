"""Measuring processes: sides alternate, outputs are deleted between runs, a failure is reported and not repeated."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import measure
from benchmarks.measure import Job, JobError, anonymous_bytes, measure_in_turn, run_job, warm
from benchmarks.results import Clock

if TYPE_CHECKING:
    from pathlib import Path


def python(code: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *(str(argument) for argument in arguments))


def noting(name: str, log: Path) -> Job:
    return Job(commands=(("sh", "-c", f"echo {name} >> {log}"),))


def test_sides_alternate_and_every_other_round_is_reversed(tmp_path: Path) -> None:
    log = tmp_path / "log"

    sides = measure_in_turn({name: noting(name, log) for name in ("ours", "cp", "library")}, Clock.PROCESS, 3)

    assert log.read_text().split() == ["ours", "cp", "library", "library", "cp", "ours", "ours", "cp", "library"]
    assert [(side.name, len(side.samples)) for side in sides] == [("ours", 3), ("cp", 3), ("library", 3)]


def test_an_output_is_deleted_before_and_after_each_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(commands=(("mkdir", str(out)),), output=out)

    (side,) = measure_in_turn({"ours": job}, Clock.PROCESS, 3)

    assert (len(side.samples), side.failure) == (3, "")
    assert not out.exists()


def test_what_a_job_reads_is_made_before_each_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(commands=(("test", "-d", str(out)),), before=("mkdir", str(out)), output=out)

    (side,) = measure_in_turn({"ours": job}, Clock.PROCESS, 2)

    assert (len(side.samples), side.failure) == (2, "")
    assert not out.exists()


def test_all_commands_of_a_job_count(tmp_path: Path) -> None:
    once = ("sleep", "0.1")

    done = run_job(Job(commands=(once, once)))

    assert done.process_seconds is not None
    assert done.process_seconds >= 0.2


def test_the_processor_time_of_all_commands_is_measured() -> None:
    """The first command computes in its own code, the second one in the kernel."""
    of_code = "import time\nwhile time.process_time() < 0.3: sum(range(10000))"
    of_kernel = "import os, time\nnull = os.open('/dev/zero', 0)\nwhile os.times().system < 0.3: os.read(null, 1 << 24)"

    done = run_job(Job(commands=(python(of_code), python(of_kernel))))

    assert done.user_seconds is not None
    assert done.system_seconds is not None
    assert done.user_seconds >= 0.15
    assert done.system_seconds >= 0.25


def test_the_facts_that_a_command_prints_are_kept() -> None:
    done = run_job(Job(commands=(python("print('noise'); print('{\"seconds\": 1.5, \"a\": 2}')"),)))

    assert (done.call_seconds, done.facts) == (1.5, {"a": 2})


def test_a_document_of_many_lines_is_read_too() -> None:
    text = json.dumps({"seconds": 2.0}, indent=2)

    assert run_job(Job(commands=(python("import sys; print(sys.argv[1])", text),))).call_seconds == 2.0


def test_the_peak_of_anonymous_memory_is_measured() -> None:
    code = "import time; held = bytearray(b'1') * (1 << 26); time.sleep(0.2)"

    done = run_job(Job(commands=(python(code),)))

    assert done.peak_anonymous is not None
    assert 1 << 26 <= done.peak_anonymous < 1 << 27


def test_mapped_files_are_not_counted_as_anonymous_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 26))
    code = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(held[::4096])
    time.sleep(0.2)
"""
    done = run_job(Job(commands=(python(code, tmp_path / "file"),)))

    assert done.peak_anonymous is not None
    assert done.peak_anonymous < 1 << 26


def test_a_side_that_fails_is_not_run_again_and_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    bad = Job(commands=(("sh", "-c", f"echo bad >> {log}; echo no such thing >&2; exit 3"),))

    ours, peer = measure_in_turn({"ours": noting("ours", log), "peer": bad}, Clock.PROCESS, 2)

    assert log.read_text().split() == ["ours", "bad", "ours"]
    assert (ours.failure, peer.failure) == ("", "exit code 3: no such thing")
    assert peer.seconds is None


def test_a_command_that_fails_alone_is_an_error_with_the_command() -> None:
    with pytest.raises(JobError, match=r"false: expected exit code 0, found exit code 1: nothing printed\. Run"):
        run_job(Job(commands=(("false",),)))


def test_a_command_that_uses_too_much_memory_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_memory", lambda: 1 << 25)
    code = "import time; held = bytearray(b'1') * (1 << 26); time.sleep(30)"

    with pytest.raises(JobError, match=r"more than the 0\.0 GB of memory that were free"):
        run_job(Job(commands=(python(code),)))


def test_a_slow_side_is_run_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_SLOW", 0.15)
    slow = Job(commands=(("sleep", "0.2"),))

    ours, peer = measure_in_turn({"ours": noting("ours", tmp_path / "log"), "peer": slow}, Clock.PROCESS, 3)

    assert (len(ours.samples), len(peer.samples)) == (3, 1)


def test_warming_reads_files_and_skips_sparse_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1" * 100_000)
    (tmp_path / "folder").mkdir()
    with (tmp_path / "hole").open("wb") as stream:
        stream.truncate(1 << 40)

    warm(tmp_path)


def test_a_process_that_has_ended_has_no_memory() -> None:
    assert anonymous_bytes() > 0
    assert anonymous_bytes(2**30) == 0


def test_the_bytecode_cache_is_always_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package has cached bytecode; otherwise parsing would count as time of this package."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    done = run_job(Job(commands=(python("import json, sys; print(json.dumps({'off': sys.dont_write_bytecode}))"),)))

    assert done.facts == {"off": False}

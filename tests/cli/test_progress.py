"""What commands show while they work, without a terminal and on one."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli
from rich.console import Console

from trtllm_ct.cli import progress
from trtllm_ct.cli.progress import shown_progress
from trtllm_ct.convert import units

if TYPE_CHECKING:
    from pathlib import Path


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(clock: Clock, total: int, steps: list[tuple[float, int]]) -> list[str]:
    """Return the lines that are printed when after each number of seconds so many bytes are done."""
    stream = io.StringIO()
    with shown_progress(Console(file=stream, width=200), "Converting") as start:
        add = start(total)
        for seconds, nbytes in steps:
            clock.now += seconds
            add(nbytes)
    return stream.getvalue().splitlines()


def test_a_line_for_every_tenth_with_rate_and_time_left(clock: Clock) -> None:
    lines = lines_of(clock, 8_000_000_000, [(2.0, 100_000_000)] * 80)

    assert len(lines) == 10
    assert lines[0] == "Converting: 10 %, 800.0 MB of 8.0 GB, 50.0 MB/s, 2 min left"
    assert lines[4] == "Converting: 50 %, 4.0 GB of 8.0 GB, 50.0 MB/s, 80 s left"
    assert lines[-1] == "Converting: 100 %, 8.0 GB of 8.0 GB, 50.0 MB/s"


@pytest.mark.parametrize(
    ("steps", "percents"),
    [
        ([(0.1, 10)] * 10, []),
        ([(2.5, 10)] * 10, [40, 50, 60, 70, 80, 90, 100]),
        ([(60, 35), (60, 1), (60, 64)], [30, 100]),
        ([(60, 9), (60, 90)], [90]),
        ([(60, 150)], []),
        ([(60, 0)], []),
    ],
    ids=["done at once", "after ten seconds", "several tenths in a step", "not done", "all at once", "nothing done"],
)
def test_tenths_are_named_once(clock: Clock, steps: list[tuple[float, int]], percents: list[int]) -> None:
    lines = lines_of(clock, 100, steps)

    assert [int(line.split()[1]) for line in lines] == percents


@pytest.mark.parametrize(
    ("seconds", "left"), [(10, "90 s"), (13, "117 s"), (14, "2 min"), (700, "105 min"), (1000, "2 h")]
)
def test_the_remaining_time(clock: Clock, seconds: int, left: str) -> None:
    (line,) = lines_of(clock, 1000, [(seconds, 100)])

    assert line.endswith(f", {left} left")


def test_a_work_of_no_bytes_needs_no_line(clock: Clock) -> None:
    assert lines_of(clock, 0, [(60, 0)]) == []


def test_a_terminal_gets_a_bar() -> None:
    stream = io.StringIO()
    with shown_progress(Console(file=stream, force_terminal=True, width=100), "Verifying") as start:
        start(10)(5)

    assert "Verifying" in stream.getvalue()
    assert "5/10 bytes" in stream.getvalue()


def test_two_works_are_shown_beside_each_other() -> None:
    stream = io.StringIO()
    with shown_progress(Console(file=stream, force_terminal=True, width=100), "Converting") as start:
        start(10)(5)
        start(8, what="Downloading")(2)

    assert "5/10 bytes" in stream.getvalue()
    assert "Downloading" in stream.getvalue()
    assert "2/8 bytes" in stream.getvalue()


@pytest.mark.parametrize(
    ("command", "what"), [("convert", "Converting"), ("verify", "Verifying"), ("verify both", "Verifying")]
)
def test_commands_print_the_lines_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, what: str
) -> None:
    """All of it is done at the end: the last line says 100 %."""
    source = write_checkpoint(tmp_path / "in", config=tiny_config(layers=12), scheme="int4-g32").directory
    if command == "verify both":
        run_cli("convert", source, tmp_path / "out")
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0)
    monkeypatch.setattr(units, "UNIT_BYTES", 1)

    places = {"convert": [tmp_path / "new"], "verify": [], "verify both": [tmp_path / "out"]}[command]
    done = run_cli(command[:7].strip(), source, *places, "--json")

    assert done.document["kind"] == command[:7].strip()
    lines = done.err.splitlines()
    assert len(lines) <= 10
    assert all(line.startswith(f"{what}: ") for line in lines)
    assert " 100 %" in lines[-1]

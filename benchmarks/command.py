"""The command `bench`: its options as text, its report as values, and the page of the documentation."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.page import require_page, write_page
from benchmarks.run import run_bench
from benchmarks.tables import summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.results import Report

__all__ = ["run_command", "summary"]


def run_command(
    directory: Path | None,
    *,
    shapes: str,
    against: str,
    tables: str,
    runs: int,
    docs: Path | None,
    on_step: Callable[[str], None],
) -> Report:
    """See `run_bench`; lists come with commas. With `docs` sizes are swept, and tables and plots go to its page."""
    if docs is not None:
        require_page(docs)
    with _stopped_in_order():
        report = run_bench(
            directory,
            shapes=_names(shapes),
            against=_names(against),
            tables=_names(tables),
            runs=runs,
            sweep=docs is not None,
            on_step=on_step,
        )
    if docs is not None:
        write_page(report, docs, shlex.join(["trtllm-ct", *sys.argv[1:]]))
    return report


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Gigabytes of temporary files are removed too when this process is asked to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())

"""Runs the commands of an app: signals, logging, and errors that become messages and exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import TrtllmCtError, UsageError
from trtllm_ct.base.json_form import json_form
from trtllm_ct.base.memory_errors import memory_errors
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.base.source_errors import source_errors
from trtllm_ct.cli.console import open_console
from trtllm_ct.cli.interrupts import ending_on_signals
from trtllm_ct.cli.log_format import PrintableFormatter
from trtllm_ct.cli.page.written import write_page
from trtllm_ct.cli.progress import shown_progress
from trtllm_ct.cli.streams import STDOUT, occupy_standard_descriptors, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import typer

    from trtllm_ct.plan.plan import Plan

__all__ = ["SCHEMA", "conversion_progress", "print_json", "run_app", "show_page", "stderr", "stdout"]

SCHEMA = 1
"""Version of the schema of the documents that `--json` prints."""

stdout = open_console(sys.stdout)
stderr = open_console(sys.stderr, stderr=True)


def run_app(commands: typer.Typer) -> None:
    """Run the commands of an app.

    A `TrtllmCtError` is printed to stderr, or as a JSON document to stdout with `--json`. It becomes exit code 2 for a
    `UsageError`, and 1 for any other error. Ctrl-C and SIGTERM print one line, and become 130 and 143.
    """
    occupy_standard_descriptors()
    # No command multiplies matrices with numpy; the idle OpenBLAS threads would compete with the conversion threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with (
            ending_on_signals(),
            collector_paused(),
            missing_packages_as_errors(),
            source_errors("the file system"),
            memory_errors(),
        ):
            commands()
    except TrtllmCtError as error:
        if "--json" in sys.argv and error.faults[0].where != STDOUT:
            faults = [fault.to_dict() for fault in error.faults]
            document = {"error": type(error).__name__, "faults": faults, "warnings": list(error.warnings)}
            print_json("error", document)
        else:
            from trtllm_ct.cli import lines

            stderr.print(lines.failure(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)


def print_json(kind: str, document: dict[str, Any]) -> None:
    """Print one JSON document to stdout, never wrapped or coloured; `kind` names the command that made it.

    A number that is not finite becomes a string, wherever it is: parsers refuse a document with `NaN` in it.
    """
    with writing():
        print(json.dumps(json_form({"schema": SCHEMA, "kind": kind, **document}), indent=2))


def show_page(path: Path, page: str) -> None:
    """Write a page to the file of `--html`, and say on stderr where it is."""
    write_page(path, page)
    stderr.print(f"Report: {path}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def conversion_progress() -> Iterator[
    tuple[Callable[[Plan], Callable[[int], None]], Callable[[int], Callable[[int], None]]]
]:
    """Show the problems of a plan on stderr, and then how far its conversion is, and the download of its source.

    Yields the functions for `on_start` and `on_download` of `convert_checkpoint`.
    """
    with shown_progress(stderr, "Converting") as start:

        def on_start(plan: Plan) -> Callable[[int], None]:
            if plan.problems:
                from trtllm_ct.cli import lines

                stderr.print(lines.problems(plan.problems))
            return start(plan.delivered_bytes)

        yield on_start, partial(start, what="Downloading")

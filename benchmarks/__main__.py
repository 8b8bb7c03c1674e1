"""The command `python -m benchmarks`: print the report as tables or JSON, or write it into the documentation."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.page import require_page, write_page
from benchmarks.run import run_bench
from benchmarks.tables import summary
from trtllm_ct.cli.run import print_json, run_app, stderr, stdout

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(name="benchmarks", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def bench(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Checkpoint to measure on.", show_default=False)
    ] = None,
    shape: Annotated[
        str, typer.Option(help="Synthetic checkpoints to use instead of DIR: 1b, 8b, kimi-k2, tiny (comma-separated).")
    ] = "",
    against: Annotated[
        str, typer.Option(help="Peers, comma-separated; a peer that is not installed is left out and reported.")
    ] = "cp,convert,load_file,library,transformers",
    table: Annotated[str, typer.Option(help="What to measure, comma-separated.")] = "kernels,load,convert,headers",
    runs: Annotated[int, typer.Option(help="Runs of each side; the median is reported.")] = 5,
    write_docs: Annotated[
        Path | None,
        typer.Option(help="Docs folder in which to update the performance page and plots.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Measure loops, loading, converting and inspecting, compared with copies of the same bytes and other programs."""
    if write_docs is not None:
        require_page(write_docs)
    with _exit_on_sigterm():
        report = run_bench(
            directory,
            shapes=_names(shape),
            against=_names(against),
            tables=_names(table),
            runs=runs,
            # The plots of the page need measurements at several sizes.
            sweep=write_docs is not None,
            on_step=stderr.print,
        )
    if write_docs is not None:
        write_page(report, write_docs, shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]))
    if as_json:
        print_json("bench", report.to_dict())
    else:
        stdout.print(summary(report))


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit, so that gigabytes of temporary files are removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def main() -> None:
    """Run the command; an error is printed to stderr and becomes an exit code."""
    run_app(app)


if __name__ == "__main__":
    main()

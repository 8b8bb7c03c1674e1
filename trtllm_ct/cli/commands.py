"""The command line: parse arguments, call the pipeline, print the report.

Results go to stdout, everything else to stderr. Exit codes: 0 for success, 2 for wrong usage, 1 for a faulty
checkpoint or any other error, 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

from typing import Annotated

import typer

from trtllm_ct.cli.cache_commands import cache_clear, cache_list
from trtllm_ct.cli.convert_commands import convert, verify
from trtllm_ct.cli.inspect_commands import compare, inspect, plan
from trtllm_ct.cli.run import run_app, stdout
from trtllm_ct.cli.run_commands import calibrate, demo, doctor, generate, perplexity

__all__ = ["app", "main"]

app = typer.Typer(
    name="trtllm-ct",
    help="Load compressed-tensors checkpoints into TensorRT-LLM.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache = typer.Typer(
    help="Directories that were prepared for TensorRT-LLM.", invoke_without_command=True, rich_markup_mode=None
)
app.add_typer(cache, name="cache")


def _print_version(asked: bool) -> None:
    """Print the version and end, if it was asked for."""
    if asked:
        version()
        raise typer.Exit


@app.callback()
def require_a_command(
    context: typer.Context,
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version of this package and exit."
        ),
    ] = False,
) -> None:
    """Show the help and end with exit code 2 when no command is given; click's own exit code differs by release."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@cache.callback()
def require_a_cache_command(context: typer.Context) -> None:
    """Do the same for the commands of `cache`."""
    require_a_command(context)


def version() -> None:
    """Print the version of this package."""
    from trtllm_ct.base.version import __version__

    stdout.print(__version__, highlight=False)


for command in (inspect, plan, compare, convert, verify, generate, perplexity, calibrate, doctor, demo, version):
    app.command()(command)
for name, command in (("list", cache_list), ("clear", cache_clear)):
    cache.command(name)(command)


def main() -> None:
    """Run the command line `trtllm-ct`; see `run_app` for errors."""
    run_app(app)

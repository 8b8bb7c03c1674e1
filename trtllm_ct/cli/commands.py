"""The command line: parse arguments, call the pipeline, print the report.

Results go to stdout, everything else to stderr. Exit codes: 0 for success, 2 for wrong usage, 1 for a faulty
checkpoint or any other error, 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trtllm_ct.cli.plain_values import TakesPlainValues
from trtllm_ct.cli.run import run_app
from trtllm_ct.cli.streams import writing

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["app", "main"]

_COMMANDS: Mapping[str, str] = {
    "inspect": "inspect_commands",
    "plan": "inspect_commands",
    "compare": "inspect_commands",
    "convert": "convert_commands",
    "verify": "convert_commands",
    "generate": "run_commands",
    "perplexity": "run_commands",
    "calibrate": "run_commands",
    "doctor": "run_commands",
    "demo": "run_commands",
    "version": "commands",
}
"""The file of each command, a function of the same name; only that of the command that runs is imported."""
_CACHE_COMMANDS: Mapping[str, str] = {"list": "cache_list", "clear": "cache_clear"}
"""The functions of the commands of `cache`."""

_PLAIN: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}


class _Command(TakesPlainValues, TyperCommand):
    """A command of one function."""


class _Commands(TakesPlainValues, TyperGroup):
    """The commands of `trtllm-ct`, imported when they are called: importing all of them takes longer than most run."""

    def list_commands(self, context: Any) -> list[str]:
        """Return the names of all commands, in the order of the help."""
        return [*_COMMANDS, *super().list_commands(context)]

    def get_command(self, context: Any, name: str) -> Any:
        """Return a command by name; None if there is none."""
        if name not in _COMMANDS:
            return super().get_command(context, name)
        return _command(name, getattr(import_module(f"trtllm_ct.cli.{_COMMANDS[name]}"), name))


class _CacheCommands(TakesPlainValues, TyperGroup):
    """The same for `cache`."""

    def list_commands(self, context: Any) -> list[str]:  # noqa: ARG002
        """Return the names of all commands."""
        return [*_CACHE_COMMANDS]

    def get_command(self, context: Any, name: str) -> Any:  # noqa: ARG002
        """Return a command by name; None if there is none."""
        if name not in _CACHE_COMMANDS:
            return None
        return _command(name, getattr(import_module("trtllm_ct.cli.cache_commands"), _CACHE_COMMANDS[name]))


def _command(name: str, function: Any) -> Any:
    """Return the command of a function, as an app of this one command would run it."""
    single = typer.Typer(add_completion=False, **_PLAIN)
    single.command(name, cls=_Command)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    name="trtllm-ct",
    cls=_Commands,
    help="Load compressed-tensors checkpoints into TensorRT-LLM.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_PLAIN,
)
cache = typer.Typer(
    cls=_CacheCommands,
    help="Directories that were prepared for TensorRT-LLM.",
    invoke_without_command=True,
    rich_markup_mode=None,
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

    with writing():
        print(__version__)


def main() -> None:
    """Run the command line `trtllm-ct`; see `run_app` for errors."""
    run_app(app)

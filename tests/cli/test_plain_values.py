"""Values that Typer need not convert are what it makes of them, and wrong ones are refused as it refuses them."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
import typer
from typer.core import TyperCommand
from typer.testing import CliRunner

from trtllm_ct.cli import convert_commands, inspect_commands, run_commands
from trtllm_ct.cli.plain_values import TakesPlainValues

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS = {
    "inspect": inspect_commands.inspect,
    "plan": inspect_commands.plan,
    "convert": convert_commands.convert,
    "verify": convert_commands.verify,
    "generate": run_commands.generate,
    "doctor": run_commands.doctor,
}

ARGUMENTS = [
    "convert here out",
    "convert here there --to dense --dtype float16 --executor mpi",
    "convert here out --to elsewhere",
    "convert here out --to DENSE",
    "convert here out --tp 4 --pp 2 --sm 90",
    "convert here out --tp four",
    "convert here out --carry a --carry b --requantize experts=nvfp4",
    "convert here out --strict --overwrite --force --no-sync --json --html page.html --calibration file",
    "convert here closed",
    "convert here out --html closed",
    "convert here",
    "convert",
    "convert here out --unknown",
    "inspect ORG/NAME",
    "plan here --to modelopt --filter q_proj",
    "verify here",
    "verify missing out --tp 2",
    "verify closed",
    "verify ''",
    "generate here --prompt hello --temperature 0.5 --seed 3",
    "generate here --prompt hello --seed -1",
    "doctor",
    "doctor here",
]


class Plain(TakesPlainValues, TyperCommand):
    """As the commands of `trtllm-ct` are."""


def parsed(command: type[TyperCommand], arguments: str) -> tuple[int, str, dict[str, Any]]:
    """The exit code, the output, and what the function of a command gets."""
    name, *rest = (argument.strip("'") for argument in arguments.split())
    got: dict[str, Any] = {}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, cls=command)(recorded(COMMANDS[name], got))
    result = CliRunner().invoke(app, rest)
    return result.exit_code, result.output, {key: (type(value), value) for key, value in got.items()}


def recorded(function: Callable[..., None], got: dict[str, Any]) -> Callable[..., None]:
    """A function with the parameters of a command that keeps their values."""

    def record(**values: Any) -> None:
        got.update(values)

    record.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    record.__annotations__ = get_type_hints(function, include_extras=True)
    return record


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_commands_get_what_typer_makes_of_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    granted = os.access
    # Root may read every file.
    monkeypatch.setattr(
        os, "access", lambda path, mode: granted(path, mode) and (mode == os.F_OK or str(path) != "closed")
    )
    for name in ("here", "closed"):
        Path(name).mkdir()

    assert parsed(Plain, arguments) == parsed(TyperCommand, arguments)

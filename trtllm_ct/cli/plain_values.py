"""Values of arguments that Typer need not convert.

Its newer releases import pydantic before they convert the first one, which takes longer than converting a small model.
Every other value, and every wrong one, is left to Typer.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TakesPlainValues"]


class TakesPlainValues:
    """A command whose parameters take plain values as they are; a base to name before Typer's own."""

    callback: Callable[..., Any] | None

    def parse_args(self, context: Any, arguments: list[str]) -> Any:
        """Parse the arguments of the command, as Typer does."""
        hints = get_type_hints(self.callback) if self.callback else {}
        command: Any = self
        for parameter in command.get_params(context):
            parameter.process_value = _taking_plain_values(parameter, _classes(hints.get(parameter.name)))
        parent: Any = super()
        return parent.parse_args(context, arguments)


def _taking_plain_values(parameter: Any, classes: tuple[type, ...]) -> Callable[[Any, Any], Any]:
    """Return the function that takes a value of one of these classes, or gives it to Typer's own."""
    converted = parameter.process_value

    def process_value(context: Any, value: Any) -> Any:
        if value is None and not parameter.required:
            plain: Any = () if parameter.multiple or parameter.nargs < 0 else None
        else:
            plain = value if isinstance(value, classes) else _named(value, classes)
            if plain is None:
                return converted(context, value)
        return parameter.callback(context, parameter, plain) if parameter.callback else plain

    return process_value


def _classes(hint: object) -> tuple[type, ...]:
    """Return the classes of a type such as `int` or `Path | None`; not those of a list or its elements."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(kind for kind in kinds if isinstance(kind, type) and not get_args(kind))


def _named(value: object, classes: tuple[type, ...]) -> Any:
    """Return the member of an enumeration, or the path, that a text names; None for what is left to Typer.

    Typer refuses a path that exists and can't be read.
    """
    if not isinstance(value, str):
        return None
    members = {member.value: member for kind in classes if issubclass(kind, Enum) for member in kind}
    if value in members:
        return members[value]
    can_be_taken = os.access(value, os.R_OK) or not os.access(value, os.F_OK)
    return Path(value) if Path in classes and can_be_taken else None

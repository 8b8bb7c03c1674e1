"""The consoles of the standard streams, which may be closed: rich is imported when something is printed."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["StandardConsole", "open_console"]

_NO_WIDTH = 10_000
"""The width of a pipe or file, which has none: the 80 columns that rich assumes would wrap messages and cut names.

The variable COLUMNS sets another one.
"""

_TERMINAL_VARIABLES = frozenset({"FORCE_COLOR", "TTY_COMPATIBLE"})
"""Variables by which rich takes a stream for a terminal that is none."""


class StandardConsole:
    """The console of a standard stream; rich, which prints, is imported when the first text is printed.

    So a conversion that nobody watches writes weights before.
    """

    def __init__(self, *, stderr: bool, width: int | None, closed: bool) -> None:
        self._stderr, self._width, self._closed = stderr, width, closed

    @cached_property
    def rich(self) -> Console:
        """The console of rich."""
        from trtllm_ct.cli.safe_console import SafeConsole

        if self._closed:
            return SafeConsole(file=open(os.devnull, "w", encoding="utf-8"), width=self._width)  # noqa: PTH123
        return SafeConsole(width=self._width, stderr=self._stderr)

    def print(self, *arguments: Any, **keywords: Any) -> None:
        """Print to the stream; raises `OutputError` where it can't be written."""
        self.rich.print(*arguments, **keywords)

    @property
    def is_terminal(self) -> bool:
        """Whether the stream is a terminal, or the user's variables for rich say so."""
        stream = sys.stderr if self._stderr else sys.stdout
        could_be = stream is not None and (stream.isatty() or not _TERMINAL_VARIABLES.isdisjoint(os.environ))
        return could_be and self.rich.is_terminal


def open_console(stream: IO[str] | None, *, stderr: bool = False) -> StandardConsole:
    """Return the console of a standard stream; what is printed to a stream that is closed is dropped.

    A character that the encoding of a stream lacks is printed as an escape.
    """
    if stream is None:  # Python's value for a stream whose descriptor was closed when the process started
        return StandardConsole(stderr=stderr, width=_NO_WIDTH, closed=True)
    with suppress(AttributeError, ValueError):  # a stream that a caller put there has no such method
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    has_width = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return StandardConsole(stderr=stderr, width=None if has_width else _NO_WIDTH, closed=False)

"""The standard streams that commands print to: they may be closed, and rich is imported when one is needed."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

__all__ = ["STDOUT", "StandardConsole", "drop_output", "occupy_standard_descriptors", "open_console", "writing"]

_LAST_STANDARD = 2
STDOUT = "stdout"
"""The place of the fault when the output can't be written."""

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


@contextmanager
def writing() -> Iterator[None]:
    """Write what is printed inside to the standard streams at once.

    Raises `OutputError` when that fails, as on a full disk. A reader that is gone is no error: it has seen enough.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError as error:
        drop_output()
        found = f"{error.strerror or error}".lower()
        remedy = "Send what is printed elsewhere; what the command did stays done."
        fault = Fault(where=STDOUT, expected="a place for what is printed", found=found, remedy=remedy)
        raise OutputError(fault) from None


def drop_output() -> None:
    """Let Python write what is left in its buffer to the null device, where it can end without an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    with suppress(AttributeError, OSError, ValueError):  # a stream that a caller put there has no descriptor
        os.dup2(null, sys.stdout.fileno())
    os.close(null)


def occupy_standard_descriptors() -> None:
    """Open the null device under the numbers of standard streams that are closed.

    A file that is opened later would get such a number otherwise, and what a library prints would be written into it.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= _LAST_STANDARD:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)

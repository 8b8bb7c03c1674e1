"""The consoles that commands print to: they show no control characters of strangers, and may be closed."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment

from trtllm_ct.base.errors import Fault, OutputError
from trtllm_ct.base.texts import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["STDOUT", "SafeConsole", "occupy_standard_descriptors", "open_console", "writing"]

_LAST_STANDARD = 2
STDOUT = "stdout"
"""The place of the fault when the output can't be written."""

_NO_WIDTH = 10_000
"""The width of a pipe or file, which has none: the 80 columns that rich assumes would wrap messages and cut names.

The variable COLUMNS sets another one.
"""


class SafeConsole(Console):
    """A console that escapes control characters, which names in a checkpoint may hold, except line breaks."""

    def print(self, *arguments: Any, **keywords: Any) -> None:
        """Print to the stream; raises `OutputError` where it can't be written."""
        with writing():
            super().print(*arguments, **keywords)

    def on_broken_pipe(self) -> None:
        """Drop the rest of the output; rich would end the process with an error."""
        _drop_output()

    def render(self, *arguments: Any, **keywords: Any) -> Iterable[Segment]:
        """Yield the segments of a renderable, without control characters in their text."""
        for segment in super().render(*arguments, **keywords):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                text = "\n".join(map(printable, segment.text.split("\n")))
                yield Segment(text, segment.style)


def open_console(stream: IO[str] | None, *, stderr: bool = False) -> Console:
    """Return the console of a standard stream; what is printed to a stream that is closed is dropped.

    A character that the encoding of a stream lacks is printed as an escape.
    """
    if stream is None:  # Python's value for a stream whose descriptor was closed when the process started
        return SafeConsole(file=open(os.devnull, "w", encoding="utf-8"), width=_NO_WIDTH)  # noqa: PTH123
    with suppress(AttributeError, ValueError):  # a stream that a caller put there has no such method
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    has_width = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return SafeConsole(width=None if has_width else _NO_WIDTH, stderr=stderr)


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
        _drop_output()
    except OSError as error:
        _drop_output()
        found = f"{error.strerror or error}".lower()
        remedy = "Send what is printed elsewhere; what the command did stays done."
        fault = Fault(where=STDOUT, expected="a place for what is printed", found=found, remedy=remedy)
        raise OutputError(fault) from None


def _drop_output() -> None:
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

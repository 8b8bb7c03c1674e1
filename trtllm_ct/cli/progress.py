"""What a command shows on stderr while it works: a bar on a terminal, and a line for every tenth elsewhere.

Both have bytes, rate and remaining time.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.base.texts import format_bytes
from trtllm_ct.cli.console import StandardConsole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

__all__ = ["Start", "shown_progress"]

_QUIET_SECONDS = 10.0
"""No line is printed before: what ends sooner needs none, and scripts see nothing on stderr that they don't expect."""

_TENTHS = 10
_UNITS = ((3600.0, "h"), (60.0, "min"))
_LONG = 2


class Start(Protocol):
    """Starts to show a work of a number of bytes, which may go on beside others under a name of its own."""

    def __call__(self, total: int, what: str = ...) -> Callable[[int], None]:
        """Return the function to call with bytes that are done."""
        ...


@contextmanager
def shown_progress(console: StandardConsole | Console, what: str) -> Iterator[Start]:
    """Yield the function that starts to show how far a work is that `what` names, such as `Converting`."""
    if not console.is_terminal:  # A disabled bar still writes a line break at its end in older releases of rich.
        yield lambda total, what=what: _Lines(console, what, total, time.monotonic()).add
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console.rich if isinstance(console, StandardConsole) else console) as bar:

        def start(total: int, what: str = what) -> Callable[[int], None]:
            task = bar.add_task(what, total=total)
            return lambda nbytes: bar.advance(task, nbytes)

        yield start


@dataclass(slots=True)
class _Lines:
    """Prints a line whenever another tenth of all bytes is done."""

    console: StandardConsole | Console
    what: str
    total: int
    started: float
    done: int = 0
    printed: int = 0
    """The tenths that the last line stood for."""

    def add(self, nbytes: int) -> None:
        """Count bytes that are done."""
        self.done += nbytes
        tenths = min(_TENTHS, _TENTHS * self.done // self.total) if self.total else _TENTHS
        seconds = time.monotonic() - self.started
        # The end alone needs no line: the report of the command follows.
        if self.printed < tenths < _TENTHS + bool(self.printed) and seconds >= _QUIET_SECONDS:
            self.printed = tenths
            self.console.print(self._line(tenths, seconds), markup=False, highlight=False)

    def _line(self, tenths: int, seconds: float) -> str:
        done = min(self.done, self.total)
        rate = done / seconds
        left = f", {_duration((self.total - done) / rate)} left" if done < self.total else ""
        of_all = f"{format_bytes(done)} of {format_bytes(self.total)}"
        return f"{self.what}: {100 * tenths // _TENTHS} %, {of_all}, {format_bytes(rate)}/s{left}"


def _duration(seconds: float) -> str:
    """Return a time as a text such as `45 s` or `12 min`."""
    for size, unit in _UNITS:
        if seconds >= _LONG * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

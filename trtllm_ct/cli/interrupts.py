"""`ending_on_signals`: Ctrl-C and SIGTERM end a command with one line and the exit code that shells expect.

Python turns Ctrl-C into `KeyboardInterrupt`, which the library of the command line reports in its own way, and SIGTERM
ends the process without a word. Both become an `Interrupted` here, which no library knows.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = ["Interrupted", "ending_on_signals", "going_on_from"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked this process to end. `remedy` is a sentence about what is left, or empty."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.remedy = ""


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End the process on SIGINT and SIGTERM: one line to stderr, exit code 130 or 143.

    What is inside ends as after an exception. A second signal ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread gets signals.
        return
    before = {number: signal.signal(number, _raise) for number in _SIGNALS}
    try:
        yield
    except Interrupted as interrupted:
        name = signal.Signals(interrupted.number).name
        print(f"Interrupted by {name}. {interrupted.remedy}".rstrip(), file=sys.stderr)
        sys.exit(128 + interrupted.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def going_on_from(remedy: Callable[[], str]) -> Iterator[None]:
    """Add to an interrupt inside what is left and what to do next, which `remedy` says when it happens."""
    try:
        yield
    except Interrupted as interrupted:
        interrupted.remedy = remedy()
        raise


def _raise(number: int, _frame: FrameType | None) -> None:
    for signal_number in _SIGNALS:
        signal.signal(signal_number, signal.SIG_DFL)
    raise Interrupted(number)

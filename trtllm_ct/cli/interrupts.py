"""`ending_on_signals`: Ctrl-C and SIGTERM end a command with one line and the exit code that shells expect.

Python turns Ctrl-C into `KeyboardInterrupt`, which the library of the command line reports in its own way, and SIGTERM
ends the process without a word. Both become an `Interrupted` here, which no library knows. While the command line is
imported there is nothing to undo, and the process ends at once (`ending_at_once`).
A rank of an MPI job that ends with an exit code is waited for by the others, so it ends in the way that ends the job.

This file imports as little as it can: before it is there, a signal does what Python does with it.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time

TYPE_CHECKING = False  # `typing` takes longer to import than all of this.
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

__all__ = ["Interrupted", "ending_at_once", "ending_on_signals", "going_on_from", "nothing_written"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_AGAIN_SECONDS = 0.01

_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
"""What launchers of MPI jobs set for each rank: those of MPICH, of PMIx and of Open MPI."""


class Interrupted(BaseException):
    """A signal asked this process to end. `remedy` is a sentence about what is left, or empty."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.remedy = ""


def ending_at_once() -> None:
    """Let SIGINT and SIGTERM end the process where it is, with one line to stderr and exit code 130 or 143."""
    try:
        for number in _SIGNALS:
            signal.signal(number, _end)
    except ValueError:
        return  # Only the main thread gets signals.


class ending_on_signals:  # noqa: N801 (used like a function, and `contextlib` would be imported before it)
    """End the process on SIGINT and SIGTERM: one line to stderr, exit code 130 or 143.

    What is inside ends as after an exception. A second signal ends the process at once.
    """

    def __enter__(self) -> None:
        self._hook = sys.unraisablehook
        try:
            self._before = {number: signal.signal(number, _raise) for number in _SIGNALS}
        except ValueError:
            self._before = {}  # Only the main thread gets signals.
            return
        sys.unraisablehook = self.raise_again

    def __exit__(self, _type: object, error: BaseException | None, _traceback: TracebackType | None) -> None:
        sys.unraisablehook = self._hook
        try:
            if isinstance(error, Interrupted):
                print(f"{_line(error.number)} {error.remedy}".rstrip(), file=sys.stderr, flush=True)
                _end_job(error.number)
                sys.exit(128 + error.number)
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def raise_again(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send the signal again if it came in code that can't raise, as when Python frees an object."""
        interrupted = unraisable.exc_value
        if not isinstance(interrupted, Interrupted):
            self._hook(unraisable)
            return
        for number in _SIGNALS:
            signal.signal(number, _raise)
        _send_again(interrupted.number)


_HOOK = ending_on_signals.raise_again.__code__


class going_on_from:  # noqa: N801 (as above)
    """Add to an interrupt inside what is left and what to do next, which `remedy` says when it happens."""

    def __init__(self, remedy: Callable[[], str]) -> None:
        self._remedy = remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: TracebackType | None) -> None:
        if isinstance(error, Interrupted):
            error.remedy = self._remedy()


def nothing_written(next_step: str) -> Callable[[], str]:
    """Return the remedy for a command that writes nothing; `next_step` says what to do."""
    return lambda: f"Nothing was written; {next_step}."


def _line(number: int) -> str:
    return f"Interrupted by {signal.Signals(number).name}."


def _end(number: int, _frame: FrameType | None) -> None:
    os.write(2, f"{_line(number)}\n".encode())
    _end_job(number)
    os._exit(128 + number)


def _end_job(number: int) -> None:
    """End this process and all other ranks if it is a rank of an MPI job; otherwise return.

    A launcher ends the job when a rank is ended by a signal. An exit code tells some launchers nothing, and the other
    ranks wait in the next call that all ranks have to make.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
        mpi.COMM_WORLD.Abort(128 + number)
    if any(name in os.environ for name in _RANK_VARIABLES):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _send_again(number: int) -> None:
    """Send a signal to this process a moment later, from a thread: without `threading`, whose locks may be held."""
    _thread.start_new_thread(_send_later, (number,))


def _send_later(number: int) -> None:
    time.sleep(_AGAIN_SECONDS)
    os.kill(os.getpid(), number)


def _raise(number: int, frame: FrameType | None) -> None:
    """Raise `Interrupted`; later, if this signal came in the hook of code that can't raise, which can't either."""
    while frame is not None:
        if frame.f_code is _HOOK:
            _send_again(number)
            return
        frame = frame.f_back
    for signal_number in _SIGNALS:
        signal.signal(signal_number, signal.SIG_DFL)
    raise Interrupted(number)

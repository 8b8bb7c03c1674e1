"""The standard streams that commands print to, which may be closed or full."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["STDOUT", "drop_output", "occupy_standard_descriptors", "writing"]

_LAST_STANDARD = 2
STDOUT = "stdout"
"""The place of the fault when the output can't be written."""


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

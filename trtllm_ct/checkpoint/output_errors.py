"""Errors of the place of an output: `unusable` before anything is written, `output_errors` afterwards."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, OutputError, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.folder import Folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

__all__ = ["NO_ROOM", "output_errors", "unusable"]

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The errors of a disk, a quota or a file that is full."""


def unusable(path: Path, found: str, remedy: str) -> UsageError:
    """Return the error of a place where no output can be put, before anything was written."""
    return UsageError(Fault(where=str(path), expected="a place for a new directory", found=found, remedy=remedy))


@contextmanager
def output_errors(work: Path, needed: int = 0, *, but: Collection[OSError] = ()) -> Iterator[None]:
    """Raise `OutputError` for any `OSError` inside; `needed` are the bytes that the output takes, 0 if not known.

    `work` is the working directory, which stays as it is. An error that is in `but` by then passes.
    """
    try:
        yield
    except OSError as error:
        if any(error is passed for passed in but):
            raise
        where = error.filename if isinstance(error.filename, str) else str(work)
        found = f"{error.strerror or error}".lower()
        if error.errno in NO_ROOM:
            expected = f"room for {needed} bytes" if needed else "room for the output"
            found += f", {_free_bytes(work)} bytes free"
            remedy = f"Free some space and run the same command again: it goes on from {work}."
        else:
            expected = "a file system that does what it is asked"
            remedy = f"Run the same command again when the cause is gone: it goes on from {work}."
        raise OutputError(Fault(where=where, expected=expected, found=found, remedy=remedy)) from None


def _free_bytes(work: Path) -> str:
    try:
        with Folder(work.parent) as parent:
            return str(file_calls.free_bytes(parent.descriptor))
    except OSError:
        return "an unknown number of"

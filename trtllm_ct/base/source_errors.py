"""`source_errors`: errors of the file system that a checkpoint is on, as `CatalogError`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, Fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["source_errors"]


@contextmanager
def source_errors(place: Path | str) -> Iterator[None]:
    """Raise `CatalogError` for any `OSError` inside, and for names that no file system has.

    It names the file of the error, or `place` if the error names none.
    """
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(place)
        found = f"{error.strerror or error}".lower()
        remedy = "Give a directory that this user can read, or make it readable."
        raise CatalogError(
            Fault(where=where, expected="files and folders that can be used", found=found, remedy=remedy)
        ) from None

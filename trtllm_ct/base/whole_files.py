"""`write_whole`: a file appears complete or not at all."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, OutputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes, *, remedy: str) -> None:
    """Write a file; an older one stays until the new one is complete.

    Others may be able to write to the folder, so the file has a name until then that nobody can guess, and no link is
    followed. Raises `OutputError` with `remedy` if that fails.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        try:
            with partial.open("xb") as file:
                file.write(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        expected, found = "a folder in which a file can be written", error.strerror or str(error)
        raise OutputError(Fault(where=str(path), expected=expected, found=found, remedy=remedy)) from None

"""Writes a page to the file of `--html`, whole or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.whole_files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_page_place", "write_page"]


def check_page_place(path: Path | None) -> None:
    """Raise `UsageError` if a page can't be at a path: before the work of which it is the report."""
    if path is None:
        return
    if path.parent.is_dir() and (path.is_file() or not os.path.lexists(path)):
        return
    raise UsageError(
        Fault(
            where="--html",
            expected="a file in a folder that exists",
            found=f"{path}, which is no file" if path.parent.is_dir() else f"no folder {path.parent}",
            remedy="Name another file, such as report.html.",
        )
    )


def write_page(path: Path, page: str) -> None:
    """Write a page; an older file stays until the new one is complete. Raises `OutputError` if that fails."""
    content = page.encode(errors="backslashreplace")
    write_whole(path, content, remedy="Name a file in another folder; the work itself is done.")

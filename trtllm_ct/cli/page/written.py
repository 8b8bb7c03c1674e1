"""Writes a page to the file of `--html`, whole or not at all, and over nothing but an earlier page."""

from __future__ import annotations

import os
from pathlib import Path

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.regular_files import open_regular, read_at
from trtllm_ct.base.whole_files import write_whole

__all__ = ["PAGE_START", "check_page_place", "write_page"]

PAGE_START = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="trtllm-ct">
"""
"""How every page begins: a file that begins otherwise is none, and is not replaced."""


def check_page_place(path: Path | None, *places: str | Path | None) -> None:
    """Raise `UsageError` if a page can't be at a path: before the work of which it is the report.

    `places` are the checkpoints and directories of the command, in which no page is written; a name of the Hub is none.
    """
    if path is None:
        return
    # Not above: every command imports this file, and most write no page.
    from trtllm_ct.checkpoint.opening import names_folder
    from trtllm_ct.checkpoint.output_place import check_file_place

    found = _obstacle(path)
    if found is not None:
        raise UsageError(
            Fault(
                where="--html",
                expected="a new file, or an earlier page of trtllm-ct, in a folder that exists",
                found=found,
                remedy="Name another file, such as report.html.",
            )
        )
    check_file_place(path, [Path(place) for place in places if place and names_folder(place)], where="--html")


def write_page(path: Path, page: str) -> None:
    """Write a page; an older one stays until the new one is complete. Raises `OutputError` if that fails."""
    content = page.encode(errors="backslashreplace")
    write_whole(path, content, remedy="Name a file in another folder; the work itself is done.")


def _obstacle(path: Path) -> str | None:
    """Say what keeps a page from a path; None if nothing does."""
    if not path.parent.is_dir():
        return f"no folder {path.parent}"
    if not os.path.lexists(path):
        return None
    start = PAGE_START.encode()
    try:
        with open_regular(path) as descriptor:
            is_page = read_at(descriptor, len(start), 0) == start
    except OSError as error:
        return f"{path}: {(error.strerror or str(error)).lower()}"
    return None if is_page else f"{path}, another file, which would be lost"

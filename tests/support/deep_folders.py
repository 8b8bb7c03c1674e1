"""Folders in folders, deeper than a path can name."""

from __future__ import annotations

import os
from pathlib import Path


def make_deep(folder: Path) -> None:
    """Make 1,200 folders in each other."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for _ in range(1200):
            os.mkdir("d")  # noqa: PTH102 (a path of this depth is too long)
            os.chdir("d")
    finally:
        os.chdir(before)

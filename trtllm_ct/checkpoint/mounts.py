"""What the kernel says about mounted file systems; Python has no call for it.

Source: proc_pid_mountinfo(5) of Linux.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

__all__ = ["is_mount_point", "is_overlay"]

_TABLE = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted at a path without links, such as the volume of a container."""
    return any(place == str(path) for _, place, _ in _mounts())


def is_overlay(device: int) -> bool:
    """Whether a device number is that of an overlay of several directories, as containers have."""
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(found == number and kind == "overlay" for found, _, kind in _mounts())


def _mounts() -> list[tuple[str, str, str]]:
    """Return device number, place and kind of each mounted file system; empty where the kernel has no such table."""
    mounts = []
    with suppress(OSError, ValueError, IndexError):
        for line in _TABLE.read_text(errors="surrogateescape").splitlines():
            fields = line.split(" ")
            place = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
            mounts.append((fields[2], place, fields[fields.index("-") + 1]))
    return mounts

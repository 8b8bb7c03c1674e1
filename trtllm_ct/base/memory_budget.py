"""How much memory this process may still take, as the kernel says it.

Inside a container the machine's free memory means little: going over the control group's limit gets the process
killed, on a node that may have hundreds of gigabytes free. So the smallest answer counts, of the machine, of the
group and of every group above it.
Source: the Linux kernel's documentation of cgroup v2 (memory.max, memory.current, memory.stat), of cgroup v1
(memory.limit_in_bytes, memory.usage_in_bytes) and of /proc/meminfo.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["available_memory"]


class _Interface(NamedTuple):
    """Where a generation of control groups keeps its numbers."""

    mount: str
    limit: str
    usage: str
    inactive: str


_V1 = _Interface("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Interface("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken before the machine or a control group runs short; None when nothing can be read.

    File cache that the kernel can drop counts as available.
    `root` is where /proc and /sys are looked for.
    """
    answers = [*_machine(root), *_groups(root)]
    return max(0, min(answers)) if answers else None


def _machine(root: Path) -> Iterator[int]:
    kibibytes = _fields(root / "proc/meminfo").get("MemAvailable")
    if kibibytes is not None:
        yield kibibytes * 1024


def _groups(root: Path) -> Iterator[int]:
    """What each group that this process is in has left, from its own up to the root of the hierarchy."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        interface = _V1 if controllers else _V2
        group = PurePosixPath(path.lstrip("/"))
        for level in (group, *group.parents):
            yield from _room(root / interface.mount / level, interface)


def _room(group: Path, interface: _Interface) -> Iterator[int]:
    """Limit less usage; nothing for a group without a limit or out of sight (a container sees only its own)."""
    limit, usage = _text(group / interface.limit).strip(), _text(group / interface.usage).strip()
    if limit.isdecimal() and usage.isdecimal():
        yield int(limit) - int(usage) + _fields(group / "memory.stat").get(interface.inactive, 0)


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines such as `name 123` or `Name:  123 kB`."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

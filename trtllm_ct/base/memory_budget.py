"""How much memory this process may still allocate, according to the Linux kernel.

Inside a container the free memory of the machine means little: the kernel kills a process that exceeds the limit of its
control group (cgroup), even when the node has hundreds of gigabytes free. The result is therefore the smallest of the
machine's available memory, what is left in the process's group, and what is left in each parent group.
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
    """File and field names of one cgroup version: mount point, limit, usage, and reclaimable cache in memory.stat."""

    mount: str
    limit: str
    usage: str
    inactive: str


_V1 = _Interface("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Interface("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can be allocated before the machine or a control group runs out of memory.

    The result is at least 0, and None when the kernel's files can't be read. File cache that the kernel can drop counts
    as available. `root` is the directory that holds `proc` and `sys`.
    """
    amounts = [*_available_on_machine(root), *_available_in_groups(root)]
    return max(0, min(amounts)) if amounts else None


def _available_on_machine(root: Path) -> Iterator[int]:
    """Yield the bytes of `MemAvailable`; yield nothing when /proc/meminfo does not have it."""
    kibibytes = _fields(root / "proc/meminfo").get("MemAvailable")
    if kibibytes is not None:
        yield kibibytes * 1024


def _available_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of this process, from its own group up to the root group."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        interface = _V1 if controllers else _V2
        group = PurePosixPath(path.lstrip("/"))
        for level in (group, *group.parents):
            yield from _available_in_group(root / interface.mount / level, interface)


def _available_in_group(group: Path, interface: _Interface) -> Iterator[int]:
    """Yield the limit minus the usage, with reclaimable file cache counted as free.

    Yields nothing for a group that has no limit or is not visible: a container sees only its own groups.
    """
    limit, usage = _text(group / interface.limit).strip(), _text(group / interface.usage).strip()
    if limit.isdecimal() and usage.isdecimal():
        yield int(limit) - int(usage) + _fields(group / "memory.stat").get(interface.inactive, 0)


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers by name of a file with lines such as `name 123` or `Name:  123 kB`."""
    lines = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _text(path: Path) -> str:
    """Return the content of a file, or an empty string when it can't be read."""
    try:
        return path.read_text()
    except OSError:
        return ""

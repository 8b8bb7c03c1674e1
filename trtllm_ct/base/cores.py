"""How many processor cores this process may use."""

from __future__ import annotations

import os

__all__ = ["available_cores"]


def available_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # exists on Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1

"""`describe_machine`: describe the machine and the software of a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trtllm_ct.base.cores import available_cores
from trtllm_ct.base.version import __version__

__all__ = ["describe_machine"]

_PACKAGES = ("torch", "numpy", "numba", "safetensors", "compressed-tensors", "transformers")


def describe_machine() -> dict[str, str]:
    """Return the processor, cores, memory, system, and the versions of packages that affect the measurements."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": str(available_cores()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "trtllm-ct": __version__,
        **{package: number for package in _PACKAGES if (number := _version(package))},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

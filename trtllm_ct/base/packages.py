"""The packages that an operation may lack: what each is for, and how to install it.

A package that is not installed is a `MissingDependencyError`, wherever it is imported first: public functions and the
command line run inside `missing_packages_as_errors`.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PACKAGES", "Package", "missing_packages_as_errors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package by the name it is imported by. `use` says who needs it, `remedy` how to install it.

    `oldest` is the oldest release of an extra that this package works with: nothing keeps an older one from lying
    beside it.
    """

    name: str
    use: str
    remedy: str
    oldest: str = ""

    @property
    def installed(self) -> bool:
        """Whether the package can be found; it is not imported."""
        try:
            return importlib.util.find_spec(self.name) is not None
        except ValueError:  # An entry of `sys.modules` without a specification.
            return False

    @property
    def outdated(self) -> str:
        """The installed release if it is older than `oldest`; empty if it is not, or if its release is not known."""
        from importlib import metadata  # which imports email: a tenth of what starting a command takes

        try:
            release = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return ""
        return release if _numbers(release) < _numbers(self.oldest) else ""

    def fault(self, found: str = "not installed") -> Fault:
        """Return the fault for a machine without this package."""
        return Fault(where=self.name, expected=f"the package: {self.use}", found=found, remedy=self.remedy)


def _numbers(release: str) -> tuple[int, ...]:
    """Return the numbers that a release begins with: (4, 57) for "4.57.0rc1"."""
    begin = re.match(r"\d+(\.\d+)*", release)
    numbers = [int(number) for number in begin[0].split(".")] if begin else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


_ALL = (
    Package(
        name="tensorrt_llm",
        use="it serves on a GPU; without it the CPU reference engine runs",
        # The default index has a package of this name that holds no engine.
        remedy="Use NVIDIA's container of TensorRT-LLM, or install its wheel from NVIDIA's package index: "
        "docs/installation.md has the commands.",
    ),
    Package(
        name="transformers",
        use="the CPU reference engine computes with its architectures",
        remedy="Run: pip install 'trtllm-ct[reference]'",
        oldest="4.53.1",
    ),
    Package(
        name="huggingface_hub",
        use="repositories of the Hugging Face Hub are read through it",
        remedy="Run: pip install 'huggingface_hub>=0.36.2'",
    ),
    Package(
        name="fsspec",
        use="URLs of other stores than the Hugging Face Hub are read through it",
        remedy="Run: pip install 'trtllm-ct[fsspec]'",
        oldest="2023.5",
    ),
    Package(
        name="compressed_tensors",
        use='decompressor="library" decodes with it',
        remedy="Run: pip install 'trtllm-ct[compressed-tensors]'",
        oldest="0.9",
    ),
    Package(
        name="mpi4py",
        use="--executor mpi runs on the ranks of an MPI job",
        remedy="Run: pip install 'trtllm-ct[mpi]', and install an MPI library by your system's means.",
    ),
    Package(
        name="torch",
        use="loaded weights are its tensors, and the CPU reference engine computes with it",
        remedy="Run: pip install 'trtllm-ct[torch]', or 'trtllm-ct[reference]' to run models too.",
    ),
    Package(
        name="numpy", use="conversions, compiled loops and `verify` need it", remedy="Run: pip install 'numpy>=1.26'"
    ),
    Package(name="numba", use="loops are compiled with it", remedy="Run: pip install numba"),
    Package(name="llvmlite", use="compiled loops are loaded with it", remedy="Run: pip install llvmlite"),
)
PACKAGES = {package.name: package for package in _ALL}
"""Every package that some operation imports, by its import name."""


@contextmanager
def missing_packages_as_errors() -> Iterator[None]:
    """Raise `MissingDependencyError` in place of the `ModuleNotFoundError` of a package in `PACKAGES`.

    Other errors pass: a package that is there and fails when it is imported is not missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None or (error.name != package.name and package.installed):
            raise
        raise MissingDependencyError(package.fault()) from error

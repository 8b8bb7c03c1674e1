"""Hugging Face repositories: resolves the id of a repository to a directory on this machine.

A repository is pinned to one commit, and other nodes download the same commit, because `main` may move in between.
The JSON files are downloaded first, and weights only for a checkpoint that this package loads. Any other model is left
to the engine's own download.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import DetectionError, Fault, MissingDependencyError
from trtllm_ct.base.packages import PACKAGES

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["Repository", "repository_named"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIGURATION = ("*.json",)
# Weights in other formats than safetensors, and the copies in the author's format that some repositories keep in
# `original/`.
_OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "original/*",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository of the Hugging Face hub. `revision` is a branch, tag or commit; None means the main branch."""

    name: str
    revision: str | None = None

    def configuration(self) -> Path:
        """Return a directory with the repository's JSON files, from the local cache or downloaded.

        Raises `DetectionError` when the repository doesn't exist or the hub can't be reached, and
        `MissingDependencyError` when huggingface_hub is not installed.
        """
        return self._snapshot(allow_patterns=_CONFIGURATION)

    def checkpoint(self) -> Path:
        """Return a directory with everything that loading needs. Raises what `configuration` raises."""
        return self._snapshot(ignore_patterns=_OTHER_WEIGHTS)

    def pinned(self, snapshot: Path) -> Repository:
        """Return this repository pinned to the commit after which the hub's cache named the directory `snapshot`."""
        return Repository(name=self.name, revision=snapshot.name)

    def _snapshot(self, **patterns: tuple[str, ...]) -> Path:
        hub = _huggingface_hub(self.name)
        download: Callable[..., str] = hub.snapshot_download
        try:
            return Path(download(self.name, revision=self.revision, **{key: list(p) for key, p in patterns.items()}))
        # These are the only common base classes of huggingface_hub's errors for missing, gated and unreachable
        # repositories.
        except (OSError, ValueError) as error:
            raise DetectionError(
                Fault(
                    where=self.name,
                    expected="a directory, or a Hugging Face repository that this machine can read",
                    found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                    remedy="Check name, revision and access (`hf auth login`); without a network, download it before.",
                )
            ) from error


def repository_named(model: str | Path, revision: str | None = None) -> Repository | None:
    """Return the repository with the id `model`; None for an existing path, a `Path`, or anything that is not an id."""
    if isinstance(model, Path) or Path(model).exists() or _ID.fullmatch(model) is None:
        return None
    return Repository(name=model, revision=revision)


def _huggingface_hub(name: str) -> ModuleType:
    """Import the package that resolves the id `name`; raises `MissingDependencyError` without it."""
    try:
        import huggingface_hub
    except ImportError as error:
        fault = PACKAGES["huggingface_hub"].fault()
        found = f"no such directory, and no {fault.where} to look up the id of a repository"
        remedy = f"Check the path, if it is that of a directory. {fault.remedy}, if it is the id of a repository."
        raise MissingDependencyError(replace(fault, where=name, found=found, remedy=remedy)) from error
    module: ModuleType = huggingface_hub
    return module

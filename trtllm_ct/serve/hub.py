"""Hugging Face repositories: which directory on this machine holds a model that is called by its repository's id.

A repository is resolved to one commit, and that commit is what other nodes are told: `main` may have moved when they
look. Configuration comes first and weights only for a checkpoint that this package loads, so that any other one is left
to the engine's own download.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import DetectionError, Fault, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["Repository", "repository_named"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIGURATION = ("*.json",)
# Weights in other formats than the one that is read, and copies of them in the originals' own.
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
    """A repository of the Hugging Face hub at a revision: a branch, tag or commit; its main branch when None."""

    name: str
    revision: str | None = None

    def configuration(self) -> Path:
        """A directory with the repository's JSON files; from the local cache, or downloaded.

        Raises `DetectionError` when the hub has no such repository or can't be asked, `MissingDependencyError` without
        huggingface_hub.
        """
        return self._snapshot(allow_patterns=_CONFIGURATION)

    def checkpoint(self) -> Path:
        """A directory with everything that loading needs; raises as `configuration` does."""
        return self._snapshot(ignore_patterns=_OTHER_WEIGHTS)

    def pinned(self, snapshot: Path) -> Repository:
        """The repository at the commit of a directory that it was found in."""
        return Repository(name=self.name, revision=snapshot.name)

    def _snapshot(self, **patterns: tuple[str, ...]) -> Path:
        hub = _huggingface_hub()
        download: Callable[..., str] = hub.snapshot_download
        try:
            return Path(download(self.name, revision=self.revision, **{key: list(p) for key, p in patterns.items()}))
        # Its errors for absent, gated and unreachable repositories share these two bases only.
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
    """The repository that `model` means; None for a directory, a file, and for what can't be the id of one."""
    if isinstance(model, Path) or Path(model).exists() or _ID.fullmatch(model) is None:
        return None
    return Repository(name=model, revision=revision)


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            Fault(
                where="Hugging Face repositories",
                expected="the huggingface_hub package",
                found="it can't be imported",
                remedy="Run: pip install huggingface_hub; or give the directory of a downloaded checkpoint.",
            )
        ) from error
    module: ModuleType = huggingface_hub
    return module

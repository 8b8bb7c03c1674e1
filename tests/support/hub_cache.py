"""A local cache of the Hugging Face hub, as huggingface_hub lays it out, and no network.

Source: huggingface_hub 1.x `file_download.py`: models--ORG--NAME/{blobs,refs,snapshots/COMMIT}, snapshots hold links.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

__all__ = ["COMMIT", "HubCache"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubCache:
    """The cache in a folder; while `monkeypatch` holds, huggingface_hub looks there and nowhere else."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        self.root = root
        root.mkdir()
        # The environment for processes that are started, the constants for this one, which has read it already.
        monkeypatch.setenv("HF_HUB_CACHE", str(root))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(self, name: str, directory: Path, *, commit: str = COMMIT, branch: str = "main") -> Path:
        """Put the files of a directory in as a repository's commit, to which `branch` then points."""
        home = self.root / f"models--{name.replace('/', '--')}"
        snapshot = home / "snapshots" / commit
        for folder in (home / "blobs", home / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "refs" / branch).write_text(commit, encoding="utf-8")
        for path in directory.iterdir():
            blob = home / "blobs" / f"{commit[:8]}-{path.name}"
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
        return snapshot

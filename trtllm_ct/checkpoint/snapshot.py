"""The files that belong to a checkpoint directory, with the links of a Hugging Face cache.

Such a cache has the files of a repository in `blobs` and, for each revision, links to them in `snapshots/REVISION`.
Source: huggingface_hub 1.0, the guide "Manage huggingface_hub cache-system".
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.regular_files import open_beneath

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Snapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A checkpoint directory without links in its path, and the folder of blobs of its repository, if it has one."""

    root: Path
    blobs: Path | None = None

    @classmethod
    def of(cls, directory: Path) -> Snapshot:
        """Return the snapshot that a checkpoint directory is, or is inside of."""
        root = directory.resolve()
        for place in (root, *root.parents):
            if place.parent.name == "snapshots" and place != place.parent:
                return cls(root=root, blobs=place.parent.parent / "blobs")
        return cls(root=root)

    def locate(self, name: str) -> Path | None:
        """Return where a file or folder is, with links followed; None if that is outside of the snapshot.

        Raises `OSError` for links that lead nowhere or in a circle.
        """
        place = Path(os.path.realpath(self.root / name, strict=True))
        return None if self._base(place) is None else place

    @contextmanager
    def open(self, name: str, limit: int) -> Iterator[int]:
        """Yield the descriptor of a regular file of at most `limit` bytes.

        Links are resolved first, and none is followed afterwards. Raises `OSError`, also for links that lead out of the
        snapshot; see `open_beneath`.
        """
        place = self.locate(name)
        base = None if place is None else self._base(place)
        if place is None or base is None:
            raise OSError(errno.EXDEV, "a link that leads out of the checkpoint", name)
        with open_beneath(base, place, limit) as descriptor:
            yield descriptor

    def _base(self, place: Path) -> Path | None:
        """Return the folder of the snapshot that a path without links is in or below."""
        bases = (self.root, self.blobs)
        return next((base for base in bases if base is not None and (base == place or base in place.parents)), None)

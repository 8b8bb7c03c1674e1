"""`open_source`: what a name on the command line means, a folder of this machine or a place far away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.hub.naming import repository_named
from trtllm_ct.checkpoint.source import as_source

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.source import Source

__all__ = ["names_folder", "open_source"]


def names_folder(place: str | Path) -> bool:
    """Whether `place` is the path of a folder of this machine, which need not exist; see `open_source`."""
    return isinstance(place, Path) or os.path.lexists(place) or (repository_named(place) is None and "://" not in place)


def open_source(place: str | Path | Source) -> Source:
    """Return the source that `place` names; nothing is read of a folder.

    A `Path` is a folder of this machine, and so is a text that names one, whatever else it could mean. Any other text
    is a repository of the Hub (`ORG/NAME`, `ORG/NAME@REVISION`, or its URL), another URL that fsspec opens, such as
    `s3://BUCKET/FOLDER`, or the path of a folder that does not exist.
    Raises `HubError` for a repository or a URL that can't be read, and `MissingDependencyError` if a package that reads
    it is not installed, and `UsageError` for what is no text, path or source.
    """
    if not isinstance(place, str) or names_folder(place):
        return as_source(place)
    repository = repository_named(place)
    if repository is not None:
        from trtllm_ct.checkpoint.hub.client import open_repository

        return open_repository(repository)
    from trtllm_ct.checkpoint.object_store import open_url

    return open_url(place)

"""The list of everything in an output directory, by which a later run knows that it may replace it.

It is the hidden file `.trtllm_ct.json` in the directory. What is not in the list was put there by somebody else, and
what differs from it was changed by somebody else; both are reasons not to delete the directory.
"""

from __future__ import annotations

import json
import stat
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.catalog import PICKLE_SUFFIXES
from trtllm_ct.checkpoint.header import format_names

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from trtllm_ct.checkpoint.folder import Folder

__all__ = ["MANIFEST", "listed_in_manifest", "reason_to_keep", "write_manifest"]

MANIFEST = ".trtllm_ct.json"
"""The name of the list in an output directory."""

_MAX_BYTES = 2**26

_HASHED_BYTES = 2**20
"""Files up to this size are compared by content."""

_WRITER = "trtllm-ct"
_CONFIG_FILES = {"config.json", "params.json"}
_WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf")


def write_manifest(folder: Folder, files: Iterable[str]) -> None:
    """Write the list of an output's files into its directory; names are those of `Folder.files`."""
    folder.remove(MANIFEST)
    entries = {file: _entry(folder, file) for file in sorted(files)}
    content = {"written_by": _WRITER, "version": __version__, "files": entries}
    folder.write(MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def reason_to_keep(folder: Folder, *, force: bool) -> str | None:
    """Return why a directory may not be replaced, None if it may be.

    An empty directory may be, one with a list of all that it holds, unchanged, and with `force` any model directory.
    A file counts as changed if its size or content differs; that of a large file is not read, but it must not have been
    written to after the list was. Raises `OSError`.
    """
    names = list(folder.files())
    listed = _listed(folder)
    unlisted = [name for name in names if name != MANIFEST and name not in listed]
    if not names or (listed and not unlisted and not (changed := _changed(folder, names, listed))):
        return None
    if force and (listed or _is_model(names)):
        return None
    if listed and unlisted:
        return f"files that it did not write: {format_names(ascii(name) for name in unlisted)}"
    if listed:
        return f"files that were changed since: {format_names(ascii(name) for name in changed)}"
    return "a directory that holds no model" if force else "a directory that it did not write"


def listed_in_manifest(folder: Folder) -> frozenset[str]:
    """Return the names in the list of a directory, empty if there is none."""
    return frozenset(_listed(folder))


def _entry(folder: Folder, name: str) -> list[int | str]:
    """Return what the list says about a file: its size and, if it is small, its hash. The same files give the same."""
    status = folder.status(name)
    if status is None or not stat.S_ISREG(status.st_mode):
        return []
    if status.st_size > _HASHED_BYTES:
        return [status.st_size]
    return [status.st_size, sha256(folder.read(name, _HASHED_BYTES)).hexdigest()]


def _changed(folder: Folder, names: list[str], listed: Mapping[str, Any]) -> list[str]:
    """Return the files of a directory that are not as they were when its list was written."""
    written = folder.status(MANIFEST)
    return [name for name in names if name != MANIFEST and not _is_as_written(folder, name, listed[name], written)]


def _is_as_written(folder: Folder, name: str, entry: object, written: os.stat_result | None) -> bool:
    status = folder.status(name)
    if status is None or written is None or entry != _entry(folder, name):
        return False
    return status.st_size <= _HASHED_BYTES or status.st_mtime_ns <= written.st_mtime_ns


def _listed(folder: Folder) -> Mapping[str, Any]:
    """Return the list of a directory; empty if there is none."""
    try:
        content = json.loads(folder.read(MANIFEST, _MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    files = content.get("files") if isinstance(content, dict) and content.get("written_by") == _WRITER else None
    return files if isinstance(files, dict) else {}


def _is_model(names: list[str]) -> bool:
    """Whether a directory has a configuration and weights."""
    return not _CONFIG_FILES.isdisjoint(names) and any(name.endswith(_WEIGHT_SUFFIXES) for name in names)

"""The list of everything in an output directory, by which a later run knows that it may replace it.

It is the hidden file `.trtllm_ct.json` in the directory. What is not in the list was put there by somebody else, and is
a reason not to delete the directory.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.catalog import PICKLE_SUFFIXES
from trtllm_ct.checkpoint.header import format_names

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.folder import Folder

__all__ = ["MANIFEST", "reason_to_keep", "write_manifest"]

MANIFEST = ".trtllm_ct.json"
"""The name of the list in an output directory."""

_MAX_BYTES = 2**26
_WRITER = "trtllm-ct"
_CONFIG_FILES = {"config.json", "params.json"}
_WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf")


def write_manifest(folder: Folder, *, but: str) -> None:
    """Write the list of all files in and below a directory into it, without the file `but`."""
    folder.remove(MANIFEST)
    files = sorted(file for file in folder.files() if file != but)
    content = {"written_by": _WRITER, "version": __version__, "files": files}
    folder.write(MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def reason_to_keep(folder: Folder, *, force: bool) -> str | None:
    """Return why a directory may not be replaced, None if it may be.

    An empty directory may be, one with a list of all that it holds, and with `force` any model directory.
    """
    names = list(folder.files())
    listed = _listed(folder)
    unlisted = [name for name in names if name not in listed]
    if not unlisted or (force and (listed or _is_model(names))):
        return None
    if listed:
        return f"files that it did not write: {format_names(ascii(name) for name in unlisted)}"
    return "a directory that holds no model" if force else "a directory that it did not write"


def _listed(folder: Folder) -> frozenset[str]:
    """Return the list of a directory, which counts itself; empty if there is none."""
    try:
        content = json.loads(folder.read(MANIFEST, _MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return frozenset()
    files = content.get("files") if isinstance(content, dict) and content.get("written_by") == _WRITER else None
    if not isinstance(files, list):
        return frozenset()
    return frozenset({MANIFEST, *(file for file in files if isinstance(file, str))})


def _is_model(names: list[str]) -> bool:
    """Whether a directory has a configuration and weights."""
    return not _CONFIG_FILES.isdisjoint(names) and any(name.endswith(_WEIGHT_SUFFIXES) for name in names)

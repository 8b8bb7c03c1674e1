"""Read a JSON file of a checkpoint, or raise a fault that says why it can't be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError, Fault
from trtllm_ct.base.json_values import CONFIGURATION_VALUES, require_few_values
from trtllm_ct.base.regular_files import CONFIGURATION_BYTES
from trtllm_ct.checkpoint.source import Folder

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.checkpoint.source import Source

__all__ = ["not_an_object", "read_json_object", "read_json_of"]

_MAX_DEPTH = 64
"""The most levels of objects and lists; real configurations have up to 8."""


def read_json_object(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file of this machine; see `read_json_of`."""
    return read_json_of(Folder(path.parent), path.name)


def read_json_of(source: Source, name: str) -> Mapping[str, Any]:
    """Return the object in a JSON file, which is UTF-8 with or without a byte order mark.

    Raises `ConfigError` for a file that is missing, unreadable, no regular file, too large, damaged, a Git LFS pointer,
    or not a JSON object.
    """
    text = b""
    try:
        text = source.read(name, CONFIGURATION_BYTES)
        require_few_values(text, CONFIGURATION_VALUES)
        content = json.loads(text.decode("utf-8-sig"))
        _require_shallow(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(_unreadable(source.where(name), error, text)) from error
    if isinstance(content, Mapping):
        return content
    raise ConfigError(not_an_object(source.where(name), content))


def not_an_object(where: str, content: object) -> Fault:
    """Return the fault for a JSON value that should be an object."""
    return Fault(
        where=where,
        expected="a JSON object",
        found=f"a JSON value of type {type(content).__name__}",
        remedy="Take the file from where the checkpoint was published.",
    )


def _require_shallow(content: object) -> None:
    """Raise `ValueError` for nesting that is too deep for code that visits the values by recursion."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [inner for value in level for inner in _members(value) if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {_MAX_DEPTH} levels of nesting")


def _members(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unreadable(where: str, error: Exception, text: bytes) -> Fault:
    remedy = "Take the file again from where the checkpoint was published; it is damaged or was edited by hand."
    if isinstance(error, FileNotFoundError):
        remedy = "Fetch it from where the checkpoint was published; an interrupted download may lack files."
    elif isinstance(error, OSError):
        remedy = "It must be a file that this user can read, of a size that fits a configuration."
    elif text.startswith(b"version https://git-lfs"):
        remedy = "This is a Git LFS pointer, not the file; run git lfs pull in the checkpoint directory."
    found = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
    return Fault(where=where, expected="readable JSON", found=found, remedy=remedy)

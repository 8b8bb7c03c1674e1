"""Read a JSON file of a checkpoint directory, or raise a fault that says why it can't be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError, Fault

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["not_an_object", "read_json_object"]


def read_json_object(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file, which is UTF-8 with or without a byte order mark.

    Raises `ConfigError` for a file that is missing, unreadable, damaged, a Git LFS pointer, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(_unreadable(path, error)) from error
    if isinstance(content, Mapping):
        return content
    raise ConfigError(not_an_object(str(path), content))


def not_an_object(where: str, content: object) -> Fault:
    """Return the fault for a JSON value that should be an object."""
    return Fault(
        where=where,
        expected="a JSON object",
        found=f"a JSON value of type {type(content).__name__}",
        remedy="Take the file from where the checkpoint was published.",
    )


def _unreadable(path: Path, error: Exception) -> Fault:
    remedy = "Take the file again from where the checkpoint was published; it is damaged or was edited by hand."
    if isinstance(error, FileNotFoundError):
        remedy = "Fetch it from where the checkpoint was published; an interrupted download may lack files."
    elif isinstance(error, OSError):
        remedy = "Make the file readable for this user."
    elif path.read_bytes().startswith(b"version https://git-lfs"):
        remedy = "This is a Git LFS pointer, not the file; run git lfs pull in the checkpoint directory."
    return Fault(where=str(path), expected="readable JSON", found=str(error), remedy=remedy)

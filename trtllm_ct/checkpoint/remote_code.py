"""Which Python files of a checkpoint its configurations name as code of the model or tokenizer.

`auto_map` in a configuration names classes as `module.Class`. Such a module may import others of the checkpoint with a
relative import.
Source: transformers 4.57 `dynamic_module_utils.py: get_relative_import_files`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_values import CONFIGURATION_VALUES, require_few_values
from trtllm_ct.base.regular_files import CODE_BYTES, CONFIGURATION_BYTES, read_descriptor

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.snapshot import Snapshot

__all__ = ["CONFIGURATIONS", "named_code"]

CONFIGURATIONS = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""The files at the top of a checkpoint that may name code."""

_IMPORT = re.compile(rb"^[ \t]*(?:from[ \t]+\.(\w+)[ \t]+import\b|import[ \t]+\.(\w+))", re.MULTILINE)
_MODULE = re.compile(r"\w+")
_MAX_MODULES = 100


def named_code(snapshot: Snapshot) -> frozenset[str]:
    """Return the names of the Python files at the top of a snapshot that `auto_map` names, and that these import.

    Names code of another repository (`owner/name--module.Class`) is not in the snapshot. A configuration that can't be
    read names nothing: it is refused elsewhere if it is needed.
    """
    modules: set[str] = set()
    named = {module for name in CONFIGURATIONS for module in _modules_named_in(snapshot, name)}
    pending = sorted(named)
    while pending and len(modules) < _MAX_MODULES:
        module = pending.pop()
        text = _content(snapshot, f"{module}.py", CODE_BYTES)
        if text:
            modules.add(module)
            imported = {(match[1] or match[2]).decode() for match in _IMPORT.finditer(text)} - named
            named |= imported
            pending += sorted(imported)[:_MAX_MODULES]
    return frozenset(f"{module}.py" for module in modules)


def _modules_named_in(snapshot: Snapshot, name: str) -> Iterator[str]:
    """Yield the modules that `auto_map` of a configuration names."""
    try:
        text = _content(snapshot, name, CONFIGURATION_BYTES) or b"{}"
        require_few_values(text, CONFIGURATION_VALUES)
        document = json.loads(text)
    except (ValueError, RecursionError):
        return
    auto_map: Any = document.get("auto_map") if isinstance(document, Mapping) else None
    for value in auto_map.values() if isinstance(auto_map, Mapping) else ():
        for reference in value if isinstance(value, list) else [value]:
            module = reference.partition(".")[0] if isinstance(reference, str) else ""
            if _MODULE.fullmatch(module):
                yield module


def _content(snapshot: Snapshot, name: str, limit: int) -> bytes:
    """Return the content of a file of the snapshot; empty if it can't be read."""
    try:
        with snapshot.open(name, limit) as descriptor:
            return read_descriptor(descriptor, os.fstat(descriptor).st_size)
    except OSError:
        return b""

"""Which files beside the weights are known, and what a pattern of file names means.

A pattern has the wildcards of a shell, and is compared with a name from the top of the checkpoint, folder by folder:
`*.txt` means files at the top, `assets/*.png` those of one folder, and `assets` everything in and below that folder.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from trtllm_ct.base.arguments import texts_of
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.checkpoint.catalog import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "CARRIED",
    "START_BYTES",
    "TARGET_FILES",
    "carried_patterns",
    "is_code",
    "is_excluded",
    "is_known",
    "matches_any",
    "may_hold",
    "starts_as_code",
]

CARRIED = (
    # Tokenizers.
    "tokenizer*.json", "tokenizer.model", "tokenizer.model.*", "tekken.json", "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges.txt", "*.tiktoken", "*.spm", "spiece.model", "sentencepiece*.model",
    # What requests and images are turned into.
    "chat_template*", "*.jinja", "additional_chat_templates/*.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "*_preprocessor_config.json", "*_processor_config.json",
    "mm_projector_config.json", "SYSTEM_PROMPT*",
    # What the publisher says.
    "README*", "LICENSE*", "LICENCE*", "license*", "NOTICE*", "COPYING*", "USE_POLICY*", "MODEL_CARD*", "*.md",
    "recipe*.yaml", "configuration.json",
)  # fmt: skip
"""The side files that are known: those of transformers, mistral-common, ModelScope and llm-compressor.

A pattern that ends in a star matches only names with one of the suffixes `TEXT_SUFFIXES`, or the number of a version.
"""

TEXT_SUFFIXES = frozenset({"", ".md", ".markdown", ".txt", ".rst", ".json", ".jinja", ".jinja2", ".pdf"})
"""The kinds of files that publishers add under names of their own, such as `LICENSE-MODEL.pdf`; none can be run."""

_VERSION = re.compile(r"\.(\d+|v\d+(m\d+)?)")

TARGET_FILES = ("config.json", "hf_quant_config.json", "quant_cfg.json", "params.json")
"""Excluded at the top level only. The target writes the first three itself.

params.json belongs to Mistral's own weight names, which are not copied, and some engines detect their format by it.
"""

_WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES, ".safetensors", ".index.json", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
)  # fmt: skip
_NEVER = (".safetensors", ".safetensors.index.json")
_CODE_SUFFIXES = (
    # What runs code when it is loaded as data.
    *PICKLE_SUFFIXES, ".pkl", ".pickle", ".dill", ".joblib", ".npy", ".npz", ".pt2", ".ptl", ".keras", ".h5", ".mar",
    # Programs, libraries, and archives of them.
    ".so", ".dll", ".dylib", ".pyd", ".exe", ".com", ".scr", ".cpl", ".msi", ".app", ".appimage", ".run", ".o", ".a",
    ".ko", ".wasm", ".elf", ".class", ".jar", ".war", ".apk", ".deb", ".rpm", ".whl", ".egg", ".pyz", ".pyc", ".pyo",
    ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".iso", ".dmg", ".pkg",
    # Scripts, and documents that a desktop runs.
    ".py", ".pyw", ".pyi", ".pyx", ".ipynb", ".sh", ".bash", ".zsh", ".fish", ".csh", ".ksh", ".command", ".bat",
    ".cmd", ".ps1", ".psm1", ".vbs", ".vbe", ".wsf", ".hta", ".lnk", ".desktop", ".reg", ".js", ".mjs", ".cjs", ".ts",
    ".pl", ".pm", ".rb", ".php", ".lua", ".tcl", ".r", ".jl", ".java", ".awk", ".html", ".htm", ".xhtml", ".svg",
)  # fmt: skip

_CODE_STARTS = re.compile(
    rb"\x7fELF|MZ[^\n]{0,60}\x00|\xca\xfe\xba\xbe|[\xce\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]|\x00asm|!<arch>\n"
    rb"|#![ \t]*/|L\x00\x00\x00\x01\x14\x02"
    rb"|PK\x03\x04|PK\x05\x06|\x1f\x8b|BZh[1-9]|\xfd7zXZ|7z\xbc\xaf|Rar!"
    rb"|\x80[\x02-\x05]|\x93NUMPY|\x89HDF\r\n"
)
"""The first bytes of programs, scripts, archives, pickles and arrays that may hold them."""

_LIBRARY = re.compile(r"\.so(\.\d+)+$")

START_BYTES = 64
"""So many bytes of a file are enough for `starts_as_code`."""


def carried_patterns(carry: object) -> tuple[str, ...]:
    """Return the patterns of an option `carry`: one text is one pattern.

    Raises `UsageError` for anything but texts, and for patterns that match no name: empty ones, and those that lead out
    of the checkpoint.
    """
    patterns = texts_of("carry", carry)
    for pattern in patterns:
        if not {"", ".", ".."}.isdisjoint(pattern.strip("/").split("/")):
            raise UsageError(
                Fault(
                    where="--carry",
                    expected="a pattern of names from the top of the checkpoint, without `.` and `..`",
                    found=repr(pattern),
                    remedy="Write a pattern such as 'assets/*', or copy the files yourself.",
                )
            )
    return patterns


def matches_any(name: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns matches a file, or a folder that the file is in."""
    parts = name.split("/")
    return any(_leads_to(pattern.strip("/").split("/"), parts) for pattern in patterns)


def is_known(name: str) -> bool:
    """Whether a name is that of a known side file."""
    parts = name.split("/")
    suffix = PurePosixPath(name).suffix.lower()
    is_text = suffix in TEXT_SUFFIXES or _VERSION.fullmatch(suffix) is not None
    patterns = (pattern for pattern in CARRIED if is_text or not pattern.endswith("*"))
    return any(len(parts) == pattern.count("/") + 1 for pattern in patterns if _leads_to(pattern.split("/"), parts))


def may_hold(folder: str, patterns: Collection[str]) -> bool:
    """Whether a folder may hold a file that one of the patterns matches."""
    parts = folder.split("/")
    for pattern in patterns:
        wanted = pattern.strip("/").split("/")
        if len(wanted) > len(parts) and _leads_to(wanted[: len(parts)], parts):
            return True
    return False


def is_excluded(name: str, patterns: Collection[str]) -> bool:
    """Whether a file is not carried and not reported either: hidden, a cache, weights, or what the target writes.

    A file that `patterns` ask for is reported or carried, unless it is part of the weights that a target writes itself.
    """
    if name in TARGET_FILES or name.endswith(_NEVER):
        return True
    last = name.rpartition("/")[2]
    unwanted = last.startswith(".") or last == "__pycache__" or last.endswith(_WEIGHT_SUFFIXES)
    return unwanted and not (matches_any(name, patterns) or may_hold(name, patterns))


def is_code(name: str) -> bool:
    """Whether a file is code by its name, or of a kind that can run code when it is loaded."""
    return name.lower().endswith(_CODE_SUFFIXES) or _LIBRARY.search(name.lower()) is not None


def starts_as_code(start: bytes) -> bool:
    """Whether a file whose first bytes are `start` is a program, a script, an archive or a pickle."""
    return _CODE_STARTS.match(start) is not None


def _leads_to(pattern: list[str], parts: list[str]) -> bool:
    """Whether a pattern matches a name or the first folders of it."""
    return len(pattern) <= len(parts) and all(map(fnmatchcase, parts, pattern))

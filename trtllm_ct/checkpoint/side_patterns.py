"""Which files beside the weights are known, and what a pattern of file names means.

A pattern has the wildcards of a shell, and is compared with a name from the top of the checkpoint, folder by folder:
`*.txt` means files at the top, `assets/*.png` those of one folder, and `assets` everything in and below that folder.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.catalog import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["CARRIED", "TARGET_FILES", "is_code", "is_excluded", "is_known", "matches_any", "may_hold"]

CARRIED = (
    # Tokenizers.
    "tokenizer*.json", "tokenizer.model*", "tekken.json", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges.txt", "*.tiktoken", "*.spm", "spiece.model", "sentencepiece*.model",
    # What requests and images are turned into.
    "chat_template*", "*.jinja", "additional_chat_templates/*.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "*_preprocessor_config.json", "*_processor_config.json",
    "mm_projector_config.json", "SYSTEM_PROMPT*",
    # What the publisher says.
    "README*", "LICENSE*", "LICENCE*", "license*", "NOTICE*", "COPYING*", "USE_POLICY*", "MODEL_CARD*", "*.md",
    "recipe*.yaml", "configuration.json",
)  # fmt: skip
"""The side files that are known: those of transformers, mistral-common, ModelScope and llm-compressor."""

TARGET_FILES = ("config.json", "hf_quant_config.json", "quant_cfg.json", "params.json")
"""Excluded at the top level only. The target writes the first three itself.

params.json belongs to Mistral's own weight names, which are not copied, and some engines detect their format by it.
"""

_WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES, ".safetensors", ".index.json", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
)  # fmt: skip
_NEVER = (".safetensors", ".safetensors.index.json")
_CODE_SUFFIXES = (
    *PICKLE_SUFFIXES, ".pkl", ".pickle", ".joblib", ".py", ".pyc", ".pyw", ".ipynb", ".so", ".sh", ".bat", ".cmd",
    ".ps1", ".exe", ".dll", ".dylib", ".jar", ".js",
)  # fmt: skip


def matches_any(name: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns matches a file, or a folder that the file is in."""
    parts = name.split("/")
    return any(_leads_to(pattern.strip("/").split("/"), parts) for pattern in patterns)


def is_known(name: str) -> bool:
    """Whether a name is that of a known side file."""
    parts = name.split("/")
    return any(len(parts) == pattern.count("/") + 1 for pattern in CARRIED if _leads_to(pattern.split("/"), parts))


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
    return name.lower().endswith(_CODE_SUFFIXES)


def _leads_to(pattern: list[str], parts: list[str]) -> bool:
    """Whether a pattern matches a name or the first folders of it."""
    return len(pattern) <= len(parts) and all(map(fnmatchcase, parts, pattern))

"""`Listing`: the files of a repository at one commit, as the Hub lists them.

Source: the answer of `/api/models/NAME/revision/REVISION?blobs=true`, as huggingface_hub 2.4.0 reads it
(`hf_api.py: HfApi.model_info`, `ModelInfo`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_values import INDEX_VALUES, require_few_values
from trtllm_ct.checkpoint.remote import is_inside

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COMMIT", "LISTING_BYTES", "Listing"]

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

LISTING_BYTES = 32 * 10**6
"""The longest list of files that is read; one of 100 000 files has 20 MB."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The commit, and the size in bytes of each file by its path.

    `hashes` are the SHA-256 of the files that the Hub stores outside of the repository's git: weights above all.
    """

    commit: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: bytes) -> Listing:
        """Read a listing from the answer of the Hub, or from what `dump` returned; raises `ValueError`."""
        require_few_values(text, INDEX_VALUES)
        try:
            document = json.loads(text)
        except RecursionError as error:
            raise ValueError(str(error)) from None
        commit = document.get("sha") if isinstance(document, dict) else None
        files = document.get("siblings") if isinstance(document, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not isinstance(files, list):
            raise ValueError("an answer without a commit and files")
        sizes = dict(map(_file, files))
        return cls(commit, sizes, {entry["rfilename"]: entry["lfs"]["sha256"] for entry in files if _is_hashed(entry)})

    def dump(self) -> bytes:
        """Return the text from which `parse` reads this listing."""
        files = [
            {"rfilename": path, "size": size} | ({"lfs": {"sha256": self.hashes[path]}} if path in self.hashes else {})
            for path, size in self.sizes.items()
        ]
        return json.dumps({"sha": self.commit, "siblings": files}).encode()

    def inside(self, folder: str) -> Listing:
        """Return the listing of a folder of the repository, with paths in it."""
        start = f"{folder}/" if folder else ""
        sizes = {path.removeprefix(start): size for path, size in self.sizes.items() if path.startswith(start)}
        hashes = {path.removeprefix(start): digest for path, digest in self.hashes.items() if path.startswith(start)}
        return Listing(self.commit, sizes, hashes)


def _file(entry: Any) -> tuple[str, int]:
    """Return path and size of a file; raises `ValueError` if the entry has none."""
    path = entry.get("rfilename") if isinstance(entry, dict) else None
    size = entry.get("size") if isinstance(entry, dict) else None
    if not isinstance(path, str) or not is_inside(path):
        raise ValueError("a file without a path")
    if type(size) is not int or not 0 <= size < 2**63:
        raise ValueError(f"no size of {path}")
    return path, size


def _is_hashed(entry: Mapping[str, Any]) -> bool:
    """Whether the Hub states the SHA-256 of a file."""
    stored = entry.get("lfs")
    digest = stored.get("sha256") if isinstance(stored, dict) else None
    return isinstance(digest, str) and _SHA256.fullmatch(digest) is not None

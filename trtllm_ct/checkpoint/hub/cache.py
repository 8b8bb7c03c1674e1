"""`HubCache`: what was read of repositories before. Commits never change, so nothing of it gets out of date.

It is in `trtllm_ct/hub` in the user's cache folder: a folder for each commit, with its list of files and a file for
each part that was read, and a file for each branch, which says to which commit it pointed. Only this user can read and
write it, as parts of private repositories are in it. Where it can't be used, parts are fetched each time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.own_folders import open_own_folder, require_own
from trtllm_ct.base.regular_files import read_descriptor
from trtllm_ct.checkpoint.hub.listing import COMMIT, Listing

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.source import Part

__all__ = ["HubCache", "hub_cache_folder"]

_MOST_COMMITS = 64
"""Commits that are kept; those that were used last. The largest known has 50 MB."""

_LISTING = "listing.json"
_HASH_BYTES = 32
_MOST_BYTES = 2**30
_COMMITS, _BRANCHES = "commits", "branches"


def hub_cache_folder() -> Path | None:
    """Return the folder of the cache; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path raises without a home)
    return Path(home) / "trtllm_ct" / "hub" if os.path.isabs(home) else None  # noqa: PTH117 (as XDG says)


@dataclass(frozen=True, slots=True)
class HubCache:
    """What was read of the repository `name` of the Hub at `endpoint`."""

    endpoint: str
    name: str

    def commit_of(self, revision: str) -> str | None:
        """Return the commit to which a revision pointed when the Hub was asked last; None if that is not known."""
        if COMMIT.fullmatch(revision):
            return revision
        text = (_load(_BRANCHES, self._key(revision)) or b"").decode("ascii", errors="replace")
        return text if COMMIT.fullmatch(text) else None

    def listing(self, commit: str) -> Listing | None:
        """Return the files of a commit."""
        text = _load(self._folder(commit), _LISTING)
        with suppress(ValueError):
            return None if text is None else Listing.parse(text)
        return None

    def keep_listing(self, revision: str, listing: Listing) -> None:
        """Keep the files of a commit, and that `revision` points to it."""
        _store(_BRANCHES, self._key(revision), listing.commit.encode())
        _store(self._folder(listing.commit), _LISTING, listing.dump())
        _drop_old()

    def part(self, commit: str, part: Part) -> bytes | None:
        """Return the bytes of a part of a file, if they were kept."""
        data = _load(self._folder(commit), self._key(*map(str, part)))
        return data if data is not None and len(data) == part.nbytes else None

    def keep_part(self, commit: str, part: Part, data: bytes) -> None:
        """Keep the bytes of a part of a file."""
        _store(self._folder(commit), self._key(*map(str, part)), data)

    def _folder(self, commit: str) -> str:
        return f"{_COMMITS}/{self._key(commit)}"

    def _key(self, *parts: str) -> str:
        return hashlib.sha256("\n".join((self.endpoint, self.name, *parts)).encode()).hexdigest()[:_HASH_BYTES]


def _load(folder: str, name: str) -> bytes | None:
    """Return the content of a file; None if it is missing, damaged, or may be another user's."""
    root = hub_cache_folder()
    if root is None:
        return None
    try:
        with open_own_folder(root / folder, create=False) as opened:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=opened)
        try:
            require_own(os.fstat(descriptor), root / folder / name)
            content = read_descriptor(descriptor, _MOST_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    data = content[_HASH_BYTES:]
    return data if hashlib.sha256(data).digest() == content[:_HASH_BYTES] else None


def _store(folder: str, name: str, data: bytes) -> None:
    """Write a file, under another name at first; a cache that can't be written is none."""
    root = hub_cache_folder()
    if root is None:
        return
    partial = f"{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(OSError), open_own_folder(root / folder, create=True, private=True) as opened:
        try:
            descriptor = os.open(partial, flags, stat.S_IRUSR | stat.S_IWUSR, dir_fd=opened)
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            os.rename(partial, name, src_dir_fd=opened, dst_dir_fd=opened)
        except OSError:
            os.unlink(partial, dir_fd=opened)
            raise


def _drop_old() -> None:
    """Delete the commits that were listed longest ago, all but `_MOST_COMMITS`."""
    root = hub_cache_folder()
    if root is None:
        return
    with suppress(OSError):
        ages = sorted((root / _COMMITS).iterdir(), key=lambda path: path.stat().st_mtime)
        for path in ages[:-_MOST_COMMITS]:
            shutil.rmtree(path, ignore_errors=True)

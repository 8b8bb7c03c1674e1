"""`open_repository`: a repository of the Hub as a source of headers and small files, at one commit.

The Hub is asked once, for the commit that a revision points to and for all files with their sizes. A commit whose
files are known is not asked for again. Parts of files come from huggingface_hub's own cache if it has the file, from
the cache of parts if they were read before, and from the Hub otherwise.
Source: huggingface_hub 2.4.0 and 0.36.2, `file_download.py: hf_hub_url, try_to_load_from_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from trtllm_ct.base.errors import HubError
from trtllm_ct.checkpoint.hub.cache import HubCache
from trtllm_ct.checkpoint.hub.faults import no_listing, not_cached
from trtllm_ct.checkpoint.hub.listing import LISTING_BYTES, Listing
from trtllm_ct.checkpoint.hub.ranges import Reader
from trtllm_ct.checkpoint.hub.session import Session
from trtllm_ct.checkpoint.remote import RemoteFolder
from trtllm_ct.checkpoint.source import Folder, open_local

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from trtllm_ct.checkpoint.hub.naming import Repository
    from trtllm_ct.checkpoint.source import Part, Source

__all__ = ["open_repository"]

_KEPT_BYTES = 2**20
"""The largest part of a file behind its header that is kept: values that decide a mode, and no weights."""


def open_repository(repository: Repository) -> Source:
    """Return a repository as a source, at the commit to which its revision points now.

    Without a network (HF_HUB_OFFLINE), that is the commit to which it pointed when it was read last; if the headers
    were never read, but huggingface_hub has downloaded files of it, these are the source.
    Raises `HubError` if the Hub has no such repository for this user, or can't be reached, and
    `MissingDependencyError` without huggingface_hub.
    """
    session = Session(str(repository))
    cache = HubCache(session.endpoint, repository.name)
    listing = _known_listing(repository, session, cache)
    if listing is None and session.offline:
        snapshot = session.downloaded(repository.name, "config.json", repository.revision, repository.folder)
        if snapshot is None:
            raise HubError(not_cached(repository, session, "the list of files"))
        return Folder(snapshot.parent)
    if listing is None:
        listing = _ask(repository, session)
        cache.keep_listing(repository.revision, listing)
    inside = listing.inside(repository.folder)
    return RemoteFolder(_HubFolder(repository, listing.commit, inside.sizes, inside.hashes, session, cache))


def _known_listing(repository: Repository, session: Session, cache: HubCache) -> Listing | None:
    """Return the files of a commit that was read before; those of a branch only if the Hub must not be asked."""
    commit = cache.commit_of(repository.revision)
    if commit is None or (commit != repository.revision and not session.offline):
        return None
    return cache.listing(commit)


def _ask(repository: Repository, session: Session) -> Listing:
    """Ask the Hub for commit and files."""
    revision = quote(repository.revision, safe="")
    url = f"{session.endpoint}/api/models/{repository.name}/revision/{revision}?blobs=true"
    text = Reader(session, repository).read_text(url, LISTING_BYTES)
    try:
        return Listing.parse(text)
    except ValueError as error:
        raise HubError(no_listing(repository, session, str(error))) from None


@dataclass(frozen=True, slots=True)
class _HubFolder:
    """A folder of a repository at a commit, as a `Transport`; `sizes` and `hashes` are those of its files."""

    repository: Repository
    commit: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    session: Session
    cache: HubCache

    @property
    def place(self) -> str:
        """The name of the repository with its commit."""
        folder = self.repository.folder
        return f"{self.repository.name}@{self.commit}" + f"/{folder}" * bool(folder)

    def fetch(self, part: Part) -> bytes:
        """Return the bytes of a part of a file; raises `HubError`."""
        downloaded = self.session.downloaded(self.repository.name, part.file, self.commit, self.repository.folder)
        if downloaded is not None and (data := _read_local(downloaded, part, self.sizes[part.file])) is not None:
            return data
        data = self.cache.part(self.commit, self._stored(part))
        if data is not None:
            return data
        if self.session.offline:
            raise HubError(not_cached(self.repository, self.session, part.file))
        data = Reader(self.session, self.repository).read_range(self._url(part), part, self.sizes[part.file])
        if part.offset == 0 or part.nbytes <= _KEPT_BYTES:
            self.cache.keep_part(self.commit, self._stored(part), data)
        return data

    def version(self, file: str) -> str:
        """What the content of a file is known by, beside the commit: its SHA-256 if the Hub states one."""
        return self.hashes.get(file, "")

    def downloaded(self, file: str) -> Path | None:
        """Return the path of a file in huggingface_hub's own cache, if it is there with all of its bytes."""
        path = self.session.downloaded(self.repository.name, file, self.commit, self.repository.folder)
        return path if path is not None and path.stat().st_size == self.sizes[file] else None

    def copy(self, part: Part, take: Callable[[bytes], object], pause: Callable[[float], object]) -> None:
        """Pass the bytes of a part of a file to `take`, in order; raises `HubError`, and what the functions raise."""
        self.require_reachable([part.file])
        reader = Reader(self.session, self.repository)
        reader.copy_range(self._url(part), part, self.sizes[part.file], take, pause)

    def require_reachable(self, files: Sequence[str]) -> None:
        """Raise `HubError` if files have to be fetched while requests are forbidden."""
        if files and self.session.offline:
            more = f" and {len(files) - 1} other files" if len(files) > 1 else ""
            raise HubError(not_cached(self.repository, self.session, f"{files[0]}{more}"))

    def _url(self, part: Part) -> str:
        return self.session.url(self.repository.name, self._stored(part).file, self.commit)

    def _stored(self, part: Part) -> Part:
        """Return a part with the path of its file in the repository."""
        folder = self.repository.folder
        return part._replace(file=f"{folder}/{part.file}") if folder else part


def _read_local(path: Path, part: Part, size: int) -> bytes | None:
    """Return a part of a downloaded file; None if the file has another size than the repository's."""
    with open_local(path) as stored:
        data = stored.read(part.nbytes, part.offset) if stored.size == size else b""
    return data if len(data) == part.nbytes else None

"""`Session`: GET requests through huggingface_hub, which knows token, proxies, endpoint and certificates of the user.

huggingface_hub 0.36 sends requests with the library requests, 1.x with httpx, and 2.x with httpx2. Their interfaces for
answers that are read piece by piece differ; this file is all that knows about it.
Source: huggingface_hub 0.36.2 and 2.4.0, `utils/_http.py: get_session`, `utils/_headers.py: build_hf_headers`,
`constants.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import MissingDependencyError
from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.base.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Answer", "Session"]

_PIECE_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Answer:
    """The beginning of an answer: its status, its headers by names in any case, and the pieces of its body."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]


class Session:
    """Sends GET requests as huggingface_hub does. `failures` are the exceptions of connections that fail.

    Raises `MissingDependencyError`, which names the `repository`, if huggingface_hub is not installed.
    """

    def __init__(self, repository: str) -> None:
        try:
            from huggingface_hub import constants, file_download, utils
            from huggingface_hub.errors import HfHubHTTPError
        except ImportError as error:
            fault = PACKAGES["huggingface_hub"].fault()
            found = f"no such directory, and no {fault.where} to look up the id of a repository"
            remedy = f"Check the path, if it is that of a directory. {fault.remedy}, if it is the id of a repository."
            raise MissingDependencyError(replace(fault, where=repository, found=found, remedy=remedy)) from error
        self._constants: Any = constants
        self._utils: Any = utils
        self._download: Any = file_download
        self.failures: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])
        self._headers: dict[str, str] = self._utils.build_hf_headers(
            library_name="trtllm_ct", library_version=__version__
        ) | {"Accept-Encoding": "identity"}

    @property
    def endpoint(self) -> str:
        """The URL of the Hub, without a slash at its end."""
        return str(self._constants.ENDPOINT)

    @property
    def offline(self) -> bool:
        """Whether the user forbids requests."""
        return bool(self._constants.HF_HUB_OFFLINE)

    @property
    def has_token(self) -> bool:
        """Whether requests carry a token."""
        return any(name.lower() == "authorization" for name in self._headers)

    def url(self, name: str, path: str, commit: str) -> str:
        """Return the URL of a file."""
        return str(self._download.hf_hub_url(name, path, revision=commit))

    def downloaded(self, name: str, path: str, revision: str, folder: str = "") -> Path | None:
        """Return the path of a file in huggingface_hub's own cache; None if it is not there."""
        path = f"{folder}/{path}" if folder else path
        found = self._download.try_to_load_from_cache(name, path, revision=revision)
        return Path(found) if isinstance(found, str) else None

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Send a request and yield its answer, of which only those pieces are read that are asked for.

        Redirects are followed; the token goes to no other host.
        """
        session, headers = self._utils.get_session(), {**self._headers, **headers}
        timeout = self._constants.HF_HUB_DOWNLOAD_TIMEOUT
        if callable(getattr(session, "stream", None)):  # httpx; the attribute of requests is a boolean
            with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
                yield Answer(answer.status_code, answer.headers, answer.iter_raw())
        else:
            with session.get(url, headers=headers, timeout=timeout, stream=True) as answer:
                yield Answer(answer.status_code, answer.headers, _pieces(answer))


def _pieces(answer: Any) -> Iterator[bytes]:
    """Yield what has come of an answer of requests, as soon as it comes.

    `iter_content` waits for whole pieces, and drops the beginning of one when the connection breaks. Older
    releases of urllib3 have nothing else. Raises `ConnectionError` when the connection breaks.
    """
    read = getattr(answer.raw, "read1", None)
    if read is None:
        yield from answer.iter_content(_PIECE_BYTES)
        return
    from urllib3.exceptions import HTTPError

    try:
        while piece := read(_PIECE_BYTES):
            yield piece
    except HTTPError as error:  # requests makes errors of its own from these in `iter_content` only
        raise ConnectionError(str(error)) from error

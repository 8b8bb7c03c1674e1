"""A local HTTP server that speaks the Hub's API, and behaves as badly as it is told to.

Source: huggingface_hub 2.4.0: `hf_api.py: HfApi.model_info`, `file_download.py: get_hf_file_metadata`,
`utils/_http.py: hf_raise_for_status`. Weights are sent by another host, to which `resolve` redirects.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

__all__ = ["COMMIT", "TOKEN", "HubServer", "Request", "hub_at", "serving"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_of_this_test"
_API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_PIECE = 2**16


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came: to the `hub` or to the `store` of weights."""

    host: str
    path: str
    range: str
    token: str


@dataclass(slots=True)
class _Repository:
    directory: Path
    commit: str
    branches: dict[str, str]
    access: str


@dataclass(slots=True)
class HubServer:
    """The repositories, what was asked for, and how to behave.

    `latency` are the seconds before an answer, `rate` the bytes per second of each answer, None for all at once.
    `cuts` is the number of next answers of the store that break off in the middle, `statuses` those that the next
    requests get in place of an answer. `lie` changes the Content-Range, `surplus` is sent after the bytes that were
    asked for, and with `whole` ranges are ignored. `listing` replaces the list of files. `sent` counts bytes of bodies.
    With `hashes` the list has the SHA-256 of weight files. `weights_left` are the bytes that the store sends before it
    only breaks off connections, None for no end; `weights_sent` counts what it has sent, and from `stalled_at` on it
    sends nothing as long as that is set.
    """

    latency: float = 0
    rate: float | None = None
    cuts: int = 0
    statuses: list[int] = field(default_factory=list)
    lie: Callable[[str], str] | None = None
    surplus: bytes = b""
    whole: bool = False
    encoding: str = ""
    listing: bytes | None = None
    hashes: bool = False
    weights_left: int | None = None
    weights_sent: int = 0
    stalled_at: int | None = None
    endpoint: str = ""
    store: str = ""
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    at_once: int = 0
    most_at_once: int = 0
    repositories: dict[str, _Repository] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, name: str, directory: Path, *, commit: str = COMMIT, branch: str = "main", access: str = "public"
    ) -> str:
        """Serve a directory as a repository, whose `branch` points to `commit`; `access` may be private or gated."""
        self.repositories[name] = _Repository(directory, commit, {branch: commit}, access)
        return name

    @property
    def is_stalled(self) -> bool:
        """Whether the store sends nothing more."""
        return self.stalled_at is not None and self.weights_sent >= self.stalled_at

    def asked(self, text: str) -> list[Request]:
        """The requests whose path contains `text`."""
        return [request for request in self.requests if text in request.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    host: str

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        with hub.lock:
            hub.requests.append(Request(self.host, path, self.headers.get("Range", ""), token))
            status = hub.statuses.pop(0) if hub.statuses else 0
            hub.at_once += 1
            hub.most_at_once = max(hub.most_at_once, hub.at_once)
        time.sleep(hub.latency)
        # Before the answer: a client that has it may send the next request first.
        with hub.lock:
            hub.at_once -= 1
        if status:
            self._refuse(status, {"Retry-After": "0"})
        elif self.host == "store":
            self._send_file(Path(path))
        elif match := _API.fullmatch(urlsplit(self.path).path):
            self._list(match["name"], unquote(match["revision"]))
        elif match := _FILE.fullmatch(path):
            self._resolve(match["name"], match["revision"], match["path"])
        else:
            self._refuse(404, {})

    def _repository(self, name: str) -> _Repository | None:
        """Return a repository that the token may read; None after a refusal."""
        found, token = self.hub.repositories.get(name), self.headers.get("Authorization", "")
        if token and token != f"Bearer {TOKEN}":
            self._refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif found is None or (found.access == "private" and not token):
            self._refuse(404 if token else 401, {"X-Error-Code": "RepoNotFound"} if token else {})
        elif found.access == "closed" or (found.access == "gated" and not token):
            self._refuse(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        else:
            return found
        return None

    def _list(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if revision not in {*repository.branches, repository.commit}:
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
            return
        paths = sorted(path for path in repository.directory.rglob("*") if path.is_file())
        files = [
            {
                "rfilename": path.relative_to(repository.directory).as_posix(),
                "size": path.stat().st_size,
                "blobId": "0" * 40,
            }
            | self._stored(path)
            for path in paths
        ]
        document = {"id": name, "sha": repository.commit, "siblings": files, "gated": False, "tags": ["safetensors"]}
        self._send(200, {}, self.hub.listing or json.dumps(document).encode())

    def _stored(self, path: Path) -> dict[str, object]:
        """What the list says of a file that is not stored in git."""
        if not self.hub.hashes or path.suffix != ".safetensors":
            return {}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"lfs": {"sha256": digest, "size": path.stat().st_size, "pointerSize": 134}}

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        file = repository.directory / path
        if revision not in {*repository.branches, repository.commit}:
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        elif not file.is_file():
            self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        elif file.suffix == ".safetensors":
            self._send(302, {"Location": f"{self.hub.store}{file}", "X-Repo-Commit": repository.commit}, b"")
        else:
            self._send_file(file)

    def _send_file(self, file: Path) -> None:
        hub, size = self.hub, file.stat().st_size
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None or hub.whole:
            self._send(200, {}, file.read_bytes())
            return
        begin, end = int(asked[1]), min(int(asked[2]) + 1, size)
        if begin >= size:
            self._refuse(416, {"Content-Range": f"bytes */{size}"})
            return
        with file.open("rb") as stream:
            stream.seek(begin)
            data = stream.read(end - begin)
        stated = f"bytes {begin}-{end - 1}/{size}"
        headers = {"Content-Range": hub.lie(stated) if hub.lie else stated}
        if hub.encoding:
            headers["Content-Encoding"] = hub.encoding
        with hub.lock:
            cut = self.host == "store" and hub.cuts > 0
            hub.cuts -= cut
        self._send(206, headers, data + hub.surplus, cut=cut)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self._send(status, headers, b"no")

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"ETag": '"0"'} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        part = body[: len(body) // 2] if cut else body
        if self.host == "store" and status == 206:
            part, cut = self._left(part, cut=cut)
        for begin in range(0, len(part), _PIECE):
            piece = part[begin : begin + _PIECE]
            while self.host == "store" and self.hub.is_stalled:
                time.sleep(0.01)
            try:
                self.wfile.write(piece)
            except OSError:  # the other side has read enough
                self.close_connection = True
                return
            with self.hub.lock:
                self.hub.sent += len(piece)
                self.hub.weights_sent += len(piece) * (self.host == "store")
            if self.hub.rate:
                time.sleep(len(piece) / self.hub.rate)
        if cut:
            self.close_connection = True
            self.wfile.flush()

    def _left(self, part: bytes, *, cut: bool) -> tuple[bytes, bool]:
        """Return what the store still sends of an answer, and whether it breaks off then."""
        with self.hub.lock:
            left = len(part) if self.hub.weights_left is None else min(len(part), self.hub.weights_left)
            if self.hub.weights_left is not None:
                self.hub.weights_left -= left
        return part[:left], cut or left < len(part)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: the other side may close a connection whenever it has read enough."""


@contextmanager
def serving(**behaviour: object) -> Iterator[HubServer]:
    """Yield a running server; `behaviour` are fields of `HubServer`."""
    hub = HubServer(**behaviour)  # type: ignore[arg-type]
    servers = []
    for host, address in (("hub", "127.0.0.1"), ("store", "localhost")):
        handler = type("Handler", (_Handler,), {"hub": hub, "host": host})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        url = f"http://{address}:{server.server_address[1]}"
        hub.endpoint, hub.store = (url, "") if host == "hub" else (hub.endpoint, url)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def hub_at(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, *, token: str | None = None) -> None:
    """While `monkeypatch` holds, huggingface_hub knows this server alone, and caches are in `folder`."""
    from huggingface_hub import constants, file_download, utils

    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(folder / "hf"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "NO_PROXY": "*",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # release 0.36 has it in both
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    # Sessions that were made before may know a proxy. Releases call this differently.
    getattr(utils, "close_session", getattr(utils, "reset_sessions", lambda: None))()

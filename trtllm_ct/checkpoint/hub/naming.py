"""Which texts name a repository of the Hub: ids with or without a revision, and the URLs that a browser shows."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from trtllm_ct.base.errors import Fault, UsageError

__all__ = ["ENDPOINT_VARIABLE", "Repository", "repository_named"]

ENDPOINT_VARIABLE = "HF_ENDPOINT"
"""Environment variable of huggingface_hub: the URL of another Hub, or of a mirror."""

_MAIN = "main"
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"(?:hf://)?(?P<name>{_PART}/{_PART})(?:@(?P<revision>[\w.][\w./-]*))?", re.ASCII)
_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_OTHER_KINDS = frozenset({"datasets", "spaces", "api", "docs", "papers", "collections", "kernels", "buckets"})
_REFERENCE = re.compile(r"(?P<revision>refs/(?:pr|convert)/[^/]+)(?:/(?P<inner>.*))?")
_OF_FILES = frozenset({"blob", "resolve", "raw"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model repository of the Hub. `revision` is a branch, tag or commit, and `folder` a folder in it, or empty."""

    name: str
    revision: str = _MAIN
    folder: str = ""

    def __str__(self) -> str:
        return self.name + f"@{self.revision}" * (self.revision != _MAIN) + f"/{self.folder}" * bool(self.folder)


def repository_named(text: str) -> Repository | None:
    """Return the repository that a text names; None if it names none.

    It is an id, `ORG/NAME` or `ORG/NAME@REVISION`, or the URL of a repository, of one of its folders or of a file in
    it. Raises `UsageError` for the URL of something else on the Hub.
    """
    if match := _ID.fullmatch(text):
        return Repository(name=match["name"], revision=match["revision"] or _MAIN)
    try:
        url = urlsplit(text)
    except ValueError:  # brackets of an address that is none
        return None
    if url.scheme not in {"http", "https"} or url.netloc not in _HOSTS | {urlsplit(_endpoint()).netloc}:
        return None
    return _repository_at(text, [unquote(part) for part in url.path.split("/") if part])


def _endpoint() -> str:
    return os.environ.get(ENDPOINT_VARIABLE, "")


def _repository_at(url: str, parts: list[str]) -> Repository:
    """Return the repository at the path of a URL of the Hub, which `parts` are."""
    name, (kind, *rest) = "/".join(parts[:2]), (parts[2:] or ["tree"])
    if _ID.fullmatch(name) is None or parts[0] in _OTHER_KINDS or kind not in {"tree", *_OF_FILES}:
        raise UsageError(
            Fault(
                where=url,
                expected="the URL of a model repository, such as https://huggingface.co/ORG/NAME/tree/REVISION",
                found="the URL of something else",
                remedy="Give the page of the model, or its id ORG/NAME.",
            )
        )
    path = "/".join(rest)
    if match := _REFERENCE.fullmatch(path):  # names of references have slashes
        revision, inner = match["revision"], match["inner"] or ""
    else:
        revision, _, inner = path.partition("/")
    if kind in _OF_FILES:
        inner = inner.rpartition("/")[0]
    return Repository(name=name, revision=revision or _MAIN, folder=inner.strip("/"))

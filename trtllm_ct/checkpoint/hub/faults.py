"""What went wrong with a repository of the Hub, and what to do.

The Hub says by a header what an answer means: the status alone does not, as it is 401 for a repository that does not
exist too, to somebody without a token.
Source: huggingface_hub 2.4.0 and 0.36.2, `utils/_http.py: hf_raise_for_status`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.hub.naming import Repository
    from trtllm_ct.checkpoint.hub.session import Answer, Session

__all__ = ["no_listing", "not_cached", "refusal", "unreachable"]

_CODE = "X-Error-Code"
_MESSAGE = "X-Error-Message"
_BAD_TOKEN = "Invalid credentials in Authorization header"


def refusal(repository: Repository, session: Session, answer: Answer, file: str) -> Fault:
    """Return the fault for an answer whose status is none of success; `file` was asked for, or the list of files."""
    code, message = answer.headers.get(_CODE, ""), answer.headers.get(_MESSAGE, "")
    token = "the token of this machine" if session.has_token else "no token on this machine"
    where = str(repository)
    if code == "GatedRepo":
        found = f"a gated repository, and {token}{' may not read it' if session.has_token else ''}"
        page = f"{session.endpoint}/{repository.name}"
        remedy = f"Ask for access at {page}, then run hf auth login, or set HF_TOKEN."
        return Fault(where=where, expected="a repository that this machine may read", found=found, remedy=remedy)
    if code == "RevisionNotFound":
        expected = "a branch, tag or commit of the repository"
        remedy = f"Choose one of those at {session.endpoint}/{repository.name}/tree/main."
        return Fault(where=where, expected=expected, found=f"no revision {repository.revision!r}", remedy=remedy)
    if code == "EntryNotFound":
        remedy = "It was listed a moment ago: try again, or name a commit as revision."
        return Fault(where=f"{where}: {file}", expected="the file", found="no such file", remedy=remedy)
    if message == _BAD_TOKEN:
        remedy = "Run hf auth login again, or set HF_TOKEN to a valid token; public repositories need none."
        return Fault(where=where, expected="a valid token", found="a token that the Hub refuses", remedy=remedy)
    if code == "RepoNotFound" or answer.status in {401, 404}:
        return _not_found(repository, session, token)
    found = f"status {answer.status}" + (f": {message}" if message else "")
    remedy = "Check what the token may read, and that the repository is open at its page on the Hub."
    return Fault(where=where, expected=f"an answer of {session.endpoint}", found=found, remedy=remedy)


def _not_found(repository: Repository, session: Session, token: str) -> Fault:
    """Return the fault for a name that is neither a directory nor a repository that can be read."""
    return Fault(
        where=str(repository),
        expected=_both_readings(session),
        found=f"neither: no such directory, and no such repository that can be read with {token}",
        remedy="Check the path or the name; for a private repository, run hf auth login, or set HF_TOKEN.",
    )


def unreachable(repository: Repository, session: Session, found: str) -> Fault:
    """Return the fault for a Hub that does not answer, or breaks off."""
    return Fault(
        where=str(repository),
        expected=_both_readings(session),
        found=f"no such directory, and from the Hub {found}",
        remedy="Check path, network, proxy and HF_ENDPOINT, and try again; what was read before is there with "
        "HF_HUB_OFFLINE=1.",
    )


def not_cached(repository: Repository, session: Session, what: str) -> Fault:
    """Return the fault for what was not read before, where requests are forbidden."""
    return Fault(
        where=str(repository),
        expected=_both_readings(session),
        found=f"no such directory, and {what} of the repository was not read before, while HF_HUB_OFFLINE is set",
        remedy="Check the path, or unset HF_HUB_OFFLINE.",
    )


def no_listing(repository: Repository, session: Session, found: str) -> Fault:
    """Return the fault for an answer that does not list the files of a repository."""
    return Fault(
        where=str(repository),
        expected=f"a list of its files from {session.endpoint}",
        found=found,
        remedy="Check that HF_ENDPOINT is the URL of a Hub, and that no proxy answers in its place.",
    )


def _both_readings(session: Session) -> str:
    return f"a directory of this machine, or a model repository on {session.endpoint}"

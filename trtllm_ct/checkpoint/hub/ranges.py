"""`Reader`: some bytes of a file on the Hub, whatever happens on the way.

An answer is believed only if it says that it has the bytes that were asked for, and has as many of them. One that has
more is cut off. A connection that breaks is opened again for the bytes that are missing, a few times; a long file may
break more often, as long as a good part of it came in between.
Source: RFC 9110, 14.4 Content-Range, 15.3.7 Partial Content, 10.2.3 Retry-After.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, HubError
from trtllm_ct.checkpoint.hub.faults import refusal, unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from trtllm_ct.checkpoint.hub.naming import Repository
    from trtllm_ct.checkpoint.hub.session import Answer, Session
    from trtllm_ct.checkpoint.source import Part

__all__ = ["Reader"]

_WAITS = (0.25, 0.5, 1.0, 2.0)
"""Seconds to wait before a request is sent again: so there are five tries."""

_GOOD_PART = 2**24
"""Bytes after which tries are counted anew: a connection that brought so many works."""

_LONGEST_WAIT = 30.0
"""The most seconds that the Hub may have this process wait."""

_PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that may be gone in a moment."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

_FALSE_ANSWER = "A proxy or a mirror may change answers: go around it, or set HF_ENDPOINT to another one."


class _PassingError(Exception):
    """A failure that may be gone at the next try; the Hub may say how many seconds to wait."""

    def __init__(self, found: str, seconds: float = 0) -> None:
        super().__init__(found)
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads what the Hub has of a repository, which messages name as it was given."""

    session: Session
    repository: Repository

    def read_range(self, url: str, part: Part, size: int) -> bytes:
        """Return the bytes of a part of the file at `url`, which has `size` bytes; raises `HubError`."""
        data = bytearray()
        self.copy_range(url, part, size, data.extend)
        return bytes(data)

    def copy_range(
        self,
        url: str,
        part: Part,
        size: int,
        take: Callable[[bytes], object],
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """Pass the bytes of a part of the file at `url`, which has `size` bytes, to `take`, piece by piece in order.

        `pause` waits for some seconds. Raises `HubError`, and what `take` and `pause` raise, which ends the copy.
        """
        body = _Body(take)

        def attempt() -> None:
            begin, end = part.offset + body.nbytes, part.offset + part.nbytes
            with self.session.get(url, {"Range": f"bytes={begin}-{end - 1}"}) as answer:
                self._require_success(answer, part.file)
                last = _end_of_range(answer, begin, end, size, where=f"{self.repository}: {part.file}")
                self._append(answer, body, last - begin, part.file, cut_off=answer.status == 200 and end < size)
            if body.nbytes < part.nbytes:
                raise _PassingError("an answer with a part of them")

        self._try(attempt, body, lambda: f"{body.nbytes} of {part.nbytes} bytes of {part.file}, then ", pause)

    def read_text(self, url: str, limit: int) -> bytes:
        """Return what is at `url`, at most `limit` bytes; raises `HubError`."""
        data = bytearray()

        def attempt() -> None:
            data.clear()
            with self.session.get(url, {}) as answer:
                self._require_success(answer, "")
                self._append(answer, _Body(data.extend), limit, "the list of its files")

        self._try(attempt, _Body(data.extend), str)
        return bytes(data)

    def _try(
        self,
        attempt: Callable[[], None],
        body: _Body,
        done: Callable[[], str],
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """Make an attempt until it succeeds, at most once more than `_WAITS` has entries without a good part of `body`.

        Raises `HubError` for the last failure, with what was `done` until then.
        """
        passing: tuple[type[Exception], ...] = (_PassingError, *self.session.failures)
        failures, counted_from = 0, 0
        while True:
            try:
                return attempt()
            except passing as error:
                asked = error.seconds if isinstance(error, _PassingError) else 0
                found = str(error) if isinstance(error, _PassingError) else _described(error)
            if body.nbytes - counted_from >= _GOOD_PART:
                failures, counted_from = 0, body.nbytes
            if failures == len(_WAITS):
                found = f"{done()}{found}, {failures + 1} times"
                raise HubError(unreachable(self.repository, self.session, found))
            (pause or time.sleep)(min(max(_WAITS[failures], asked), _LONGEST_WAIT))
            failures += 1

    def _require_success(self, answer: Answer, file: str) -> None:
        if answer.status in _PASSING:
            asked = answer.headers.get("Retry-After", "")
            raise _PassingError(f"status {answer.status}", float(asked) if asked.isascii() and asked.isdigit() else 0)
        if answer.status not in {200, 206}:
            raise HubError(refusal(self.repository, self.session, answer, file))

    def _append(self, answer: Answer, body: _Body, nbytes: int, what: str, *, cut_off: bool = False) -> None:
        """Add the body of an answer to `body`, with `cut_off` only its beginning.

        Raises `HubError` for a body of more than `nbytes` bytes, and for one that is compressed.
        """
        where = f"{self.repository}: {what}"
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            found = f"an answer in {answer.headers['Content-Encoding']!r}"
            raise HubError(Fault(where=where, expected="bytes as they are", found=found, remedy=_FALSE_ANSWER))
        for piece in answer.pieces:
            body.add(piece[:nbytes])
            if len(piece) > nbytes and not cut_off:
                found = "an answer that goes on after them"
                raise HubError(Fault(where=where, expected=f"{body.nbytes} bytes", found=found, remedy=_FALSE_ANSWER))
            nbytes -= len(piece)
            if nbytes <= 0 and cut_off:
                return


@dataclass(slots=True)
class _Body:
    """Counts the bytes that are passed on to `take`."""

    take: Callable[[bytes], object]
    nbytes: int = 0

    def add(self, piece: bytes) -> None:
        """Pass a piece on."""
        self.take(piece)
        self.nbytes += len(piece)


def _end_of_range(answer: Answer, begin: int, end: int, size: int, *, where: str) -> int:
    """Return the end of the range that an answer has, which may be shorter than up to `end`.

    An answer with status 200 has the whole file. Raises `HubError` if it has other bytes than those from `begin` on.
    """
    stated = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(stated) if answer.status == 206 else None
    if match is not None and int(match[1]) == begin <= int(match[2]) < end and match[3] in {"*", str(size)}:
        return int(match[2]) + 1
    if answer.status == 200 and begin == 0:
        return end
    found = f"Content-Range {stated!r}" if answer.status == 206 else "the whole file"
    expected = f"bytes {begin}-{end - 1} of {size}"
    raise HubError(Fault(where=where, expected=expected, found=found, remedy=_FALSE_ANSWER))


def _described(error: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"

"""`Shards`: the source files of a conversion while units read them.

Of a directory, all of them are there. Those far away come and go as `stays.py` has planned it: this file moves the
bytes. A few are fetched at a time, ahead of the units that need them as long as there is room.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.checkpoint.output_errors import output_errors
from trtllm_ct.convert.stays import Need, plan_stays, room_for_once

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from trtllm_ct.checkpoint.staged import Staged
    from trtllm_ct.convert.stays import Stay

__all__ = ["AllThere", "BoundedShards", "DownloadStarted", "Shards"]

logger = logging.getLogger("trtllm_ct")

_AT_ONCE = 8
"""Shards that are fetched at a time: as many as huggingface_hub downloads files at a time."""

DownloadStarted = Callable[[int], Callable[[int], object]]
"""Called with the bytes of all downloads before the first one; returns a callback for bytes that have come."""


class Shards(Protocol):
    """Lends source files to units."""

    @property
    def room(self) -> int:
        """The most bytes that downloaded files take on the disk."""
        ...

    @property
    def downloaded(self) -> int:
        """The bytes that were downloaded until now."""
        ...

    def opened(self, units: Sequence[int]) -> AbstractContextManager[None]:
        """Make files ready for units, by their numbers, that begin in this order."""
        ...

    def lend(self, unit: int) -> None:
        """Wait until the files of a unit are here; they stay until it is given back."""
        ...

    def give_back(self, unit: int) -> None:
        """Let the files of a unit go that no other one needs; its work must be recorded before."""
        ...

    def stop(self) -> None:
        """Let no unit wait any more; `lend` raises `StoppedError` then."""
        ...


class AllThere:
    """The files of a directory."""

    room = downloaded = 0

    @contextmanager
    def opened(self, units: Sequence[int]) -> Iterator[None]:
        """Do nothing."""
        del units
        yield

    def lend(self, unit: int) -> None:
        """Do nothing."""

    def give_back(self, unit: int) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class StoppedError(Exception):
    """A unit or a download was stopped because another one has failed."""


class BoundedShards:
    """Files far away, of which at most `room` bytes are on the disk; see `Shards`.

    `reads` are the files that each unit reads, and `on_download` shows how far the downloads are.
    """

    def __init__(
        self,
        source: Staged,
        reads: Sequence[frozenset[str]],
        sizes: Mapping[str, int],
        room: int,
        on_download: DownloadStarted,
    ) -> None:
        self._source = source
        self._reads = reads
        self._sizes = sizes
        self.room = room
        self.downloaded = 0
        self._on_download = on_download
        self._show: Callable[[int], object] = int
        self._state = threading.Condition()
        self._stays: tuple[Stay, ...] = ()
        self._stays_of: dict[int, list[int]] = {}
        self._served: list[int] = []
        self._begun = 0
        self._here: set[int] = set()
        self._over: set[int] = set()
        self._failure: BaseException | None = None
        self._stopped = threading.Event()

    @contextmanager
    def opened(self, units: Sequence[int]) -> Iterator[None]:
        """Plan the stays of files for units and begin to fetch them.

        What an earlier run has fetched stays if it is among the first. Raises `HubError` if files can't be fetched.
        """
        needs = [Need(unit, self._reads[unit]) for unit in units]
        self._stays = plan_stays(needs, self._sizes, self.room)
        fetched = sorted({stay.file for stay in self._stays if stay.nbytes})
        self._source.remote.transport.require_reachable(fetched)
        self._served = [len(stay.units) for stay in self._stays]
        self._stays_of = {unit: [] for unit in units}
        for number, stay in enumerate(self._stays):
            for unit in stay.units:
                self._stays_of[unit].append(number)
        with output_errors(self._source.work.path):
            first = {stay.file for stay in takewhile(lambda stay: not stay.after, self._stays)}
            self._source.remove_but(first, self._sizes)
        total = sum(stay.nbytes for stay in self._stays)
        if repeated := total - sum(self._sizes[file] for file in fetched):
            enough = room_for_once(needs, self._sizes)
            logger.warning("%d bytes are downloaded more than once; with --keep %d none would be", repeated, enough)
        self._show = self._on_download(total) if total else int
        threads = [
            threading.Thread(target=self._fetch_all, name=f"fetch-{number}", daemon=True)
            for number in range(min(_AT_ONCE, len(self._stays)))
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop()
            for thread in threads:
                thread.join()

    def lend(self, unit: int) -> None:
        """Wait until the files of a unit are here; raises the error of a download that failed."""
        stays = self._stays_of[unit]
        with self._state:
            self._state.wait_for(lambda: self._here.issuperset(stays) or self._stopped.is_set())
            if not self._here.issuperset(stays):
                raise self._failure or StoppedError

    def give_back(self, unit: int) -> None:
        """Remove the files of stays that have served all their units, of which this is one that has ended."""
        with self._state:
            for number in self._stays_of[unit]:
                self._served[number] -= 1
            over = [number for number in self._stays_of[unit] if not self._served[number]]
        with output_errors(self._source.work.path):
            for number in over:
                self._source.remove(self._stays[number].file)
        with self._state:
            self._over.update(over)
            self._state.notify_all()

    def stop(self) -> None:
        """Begin no more downloads, end those that are running, and let no unit wait for one."""
        self._stopped.set()
        with self._state:
            self._state.notify_all()

    def _fetch_all(self) -> None:
        """Fetch one file after the other until all have begun."""
        try:
            while (number := self._next()) is not None:
                stay = self._stays[number]
                before = self._source.fetch(stay.file, self._take, self._pause)
                with self._state:
                    self.downloaded += stay.nbytes - before
                    self._here.add(number)
                    self._state.notify_all()
        except BaseException as error:  # noqa: BLE001 (raised by the units that wait for the file)
            with self._state:
                self._failure = self._failure or error
            self.stop()

    def _next(self) -> int | None:
        """Wait until the next stay may begin; return its number, None if all have begun or downloads are stopped."""
        with self._state:
            self._state.wait_for(lambda: self._stopped.is_set() or self._is_all_begun() or self._has_room())
            if self._stopped.is_set() or self._is_all_begun():
                return None
            self._begun += 1
            self._state.notify_all()
            return self._begun - 1

    def _is_all_begun(self) -> bool:
        return self._begun == len(self._stays)

    def _has_room(self) -> bool:
        return self._over.issuperset(self._stays[self._begun].after)

    def _take(self, nbytes: int) -> None:
        """Show bytes that have come; raises `StoppedError` when no more are wanted."""
        if self._stopped.is_set():
            raise StoppedError
        with self._state:
            self._show(nbytes)

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise StoppedError

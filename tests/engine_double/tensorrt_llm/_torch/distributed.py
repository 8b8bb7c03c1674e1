"""Imitates `_torch/distributed/`: collectives, all built on one exchange of values within a group."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hub", "Peers", "allgather", "allreduce", "here", "set_peers"]


class Peers(Protocol):
    """How a rank communicates with the other ranks."""

    def exchange(self, group: tuple[int, ...], value: Any) -> list[Any]:
        """Send a value to the group, and return the values of all its ranks in order."""
        ...


class Hub:
    """The exchange between the ranks of one model; when a rank fails, waiting ranks get an error."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._meetings: dict[tuple[int, ...], dict[int, Any]] = {}
        self._broken = False

    def exchange(self, group: tuple[int, ...], rank: int, value: Any) -> list[Any]:
        with self._changed:
            meeting = self._meetings.setdefault(group, {})
            meeting[rank] = value
            if len(meeting) == len(group):
                del self._meetings[group]
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._broken or len(meeting) == len(group))
            if len(meeting) < len(group):
                raise ConnectionAbortedError("another rank failed")
            return [meeting[member] for member in group]

    def abort(self) -> None:
        with self._changed:
            self._broken = True
            self._changed.notify_all()


_of_thread = threading.local()


def set_peers(peers: Peers) -> None:
    """Set how this thread, which is one rank, communicates with the others."""
    _of_thread.peers = peers


def here() -> Peers:
    peers: Peers = _of_thread.peers
    return peers


def allreduce(value: Tensor, group: list[int]) -> Tensor:
    """Return the sum over a group."""
    if len(group) == 1:
        return value
    parts = here().exchange(tuple(group), value)
    total: Tensor = sum(parts[1:], parts[0])
    return total


def allgather(value: Tensor, group: list[int]) -> Tensor:
    """Return the tensors of a group, concatenated along the last dimension."""
    import torch

    return value if len(group) == 1 else torch.cat(here().exchange(tuple(group), value), dim=-1)

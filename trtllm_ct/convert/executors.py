"""Executors that run the units of a conversion: threads of this process, or the ranks of an MPI job.

Both have the interface of `concurrent.futures.Executor`; any other executor with that interface works as well.
"""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

from trtllm_ct.base.arguments import check_arguments, whole_number
from trtllm_ct.base.cores import available_cores
from trtllm_ct.base.errors import Fault, MissingDependencyError, UsageError
from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.checkpoint.windows import address_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EXECUTORS", "Pool", "open_pool", "require_executor"]

EXECUTORS = ("threads", "mpi")

_MAX_WORKERS = 1024
"""The most threads; machines have fewer cores."""

_ADDRESSES_OF_A_WORKER = 2 << 30
"""What a thread has room in with the tensors of a large module; torch itself takes a part of it."""

_SWITCH_INTERVAL_SECONDS = 0.0005


class Pool(NamedTuple):
    """An executor and the number of units that it runs at the same time."""

    executor: Executor
    workers: int


@contextmanager
def open_pool(name: str = "threads", workers: int | None = None) -> Iterator[Pool | None]:
    """Open the executor `name`, with `workers` threads (one for each core, as far as addresses last, when None).

    With `mpi`, every rank of the job must call this. Rank 0 gets the pool and submits work to the other ranks; these
    get None after all work is done. A single rank runs the work itself. Raises `UsageError` for an unknown executor or
    an invalid number of workers, and `MissingDependencyError` when mpi4py or an MPI library is missing.
    """
    require_executor(name, workers)
    if name == "mpi":
        with _mpi_pool() as pool:
            yield pool
        return
    count = workers or _default_workers()
    with _short_switch_interval(), ThreadPoolExecutor(count, thread_name_prefix="trtllm-ct") as executor:
        yield Pool(executor, count)


def _default_workers() -> int:
    """Return one thread for each core; where addresses are limited, not more than have room for their tensors."""
    limit = address_limit()
    return available_cores() if limit is None else max(1, min(available_cores(), limit // _ADDRESSES_OF_A_WORKER))


@contextmanager
def _short_switch_interval() -> Iterator[None]:
    """Shorten the interpreter's switch interval, so that worker threads get the interpreter lock back quickly.

    Worker threads return from system calls and compiled loops about a thousand times a second. With the default
    interval each would wait 5 ms for a thread that holds the lock, for instance one that imports torch.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _mpi_pool() -> Iterator[Pool | None]:
    try:
        with _ended_by_signals():
            from mpi4py import MPI
            from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        raise MissingDependencyError(PACKAGES["mpi4py"].fault(found=str(error))) from None
    ranks = MPI.COMM_WORLD.Get_size()
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        # MPICommExecutor gives an object with the methods of an Executor that is no subclass of it.
        yield None if executor is None else Pool(cast("Executor", executor), max(1, ranks - 1))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process inside, in the main thread, where nothing has been written yet.

    The import waits until all ranks have come, in a call that no handler in Python can interrupt. If another rank was
    interrupted before, it would wait for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def require_executor(name: str, workers: int | None) -> None:
    """Raise `UsageError` for an unknown executor, or a number of workers that the executor does not accept."""
    if name not in EXECUTORS:
        expected, found, remedy = " or ".join(EXECUTORS), repr(name), "Choose one of these."
        raise UsageError(Fault(where="--executor", expected=expected, found=found, remedy=remedy))
    if name == "mpi" and workers is not None:
        remedy = "Leave it out: mpirun -n says how many ranks there are."
        raise UsageError(Fault(where="--workers", expected="none beside mpi", found=str(workers), remedy=remedy))
    check_arguments({"workers": whole_number("a number of threads").or_none()}, {"workers": workers})
    if workers is not None and not 1 <= workers <= _MAX_WORKERS:
        expected, remedy = f"1 to {_MAX_WORKERS}", "Leave it out for one thread a core."
        raise UsageError(Fault(where="--workers", expected=expected, found=str(workers), remedy=remedy))

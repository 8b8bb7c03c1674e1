"""Who runs the units of a conversion: threads of this process, or the ranks of an MPI job.

Both are executors of the standard library's shape (`concurrent.futures`); any other one does as well.
"""

from __future__ import annotations

import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

from trtllm_ct.base.cores import available_cores
from trtllm_ct.base.errors import Fault, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EXECUTORS", "Pool", "open_pool", "require_executor"]

EXECUTORS = ("threads", "mpi")

_SECONDS_OF_A_TURN = 0.0005


class Pool(NamedTuple):
    """An executor, and how many units it runs at once."""

    executor: Executor
    workers: int


@contextmanager
def open_pool(name: str = "threads", workers: int | None = None) -> Iterator[Pool | None]:
    """The executor `name`, with `workers` threads (one for each core when None).

    With `mpi` every rank of the job calls this. Rank 0 hands out work to all others, which get None when all of it is
    done; alone, it works itself. Raises `UsageError` for an unknown name or number, `MissingDependencyError` without
    mpi4py.
    """
    require_executor(name, workers)
    if name == "mpi":
        with _mpi_pool() as pool:
            yield pool
        return
    count = workers or available_cores()
    with _short_turns(), ThreadPoolExecutor(count, thread_name_prefix="trtllm-ct") as executor:
        yield Pool(executor, count)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Threads that come back from the kernel or a loop, a thousand times a second, get the interpreter at once.

    By default they wait 5 ms for one that holds it, for instance while it imports torch.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SECONDS_OF_A_TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _mpi_pool() -> Iterator[Pool | None]:
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, and no MPI library
        raise MissingDependencyError(
            Fault(
                where="--executor mpi",
                expected="mpi4py and an MPI library",
                found=str(error),
                remedy="Install them with: pip install 'trtllm-ct[mpi]', and MPI by your system's means.",
            )
        ) from None
    ranks = MPI.COMM_WORLD.Get_size()
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        # It has the methods of an Executor, and no common ancestor.
        yield None if executor is None else Pool(cast("Executor", executor), max(1, ranks - 1))


def require_executor(name: str, workers: int | None) -> None:
    """Raise `UsageError` for an unknown executor, and for a number of workers that it can't have."""
    if name not in EXECUTORS:
        expected, found, remedy = " or ".join(EXECUTORS), repr(name), "Choose one of these."
        raise UsageError(Fault(where="--executor", expected=expected, found=found, remedy=remedy))
    if name == "mpi" and workers is not None:
        remedy = "Leave it out: mpirun -n says how many ranks there are."
        raise UsageError(Fault(where="--workers", expected="none beside mpi", found=str(workers), remedy=remedy))
    if workers is not None and workers < 1:
        remedy = "Leave it out for one thread a core."
        raise UsageError(Fault(where="--workers", expected="at least 1", found=str(workers), remedy=remedy))

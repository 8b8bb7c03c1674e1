"""`stream_delivered`: loads and maps one module after another, on several threads."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.cores import available_cores
from trtllm_ct.base.errors import CatalogError, FaultCollector
from trtllm_ct.checkpoint.guarded_maps import guarded_maps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Executor, Future

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.formats.codecs import Codec
    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["stream_delivered"]

logger = logging.getLogger("trtllm_ct")

_MOST_WORKERS = 4
"""The largest default number of threads; about as many saturate the memory bus of one processor."""


def stream_delivered(
    plan: Plan,
    catalog: Catalog,
    *,
    codec: Codec | None = None,
    reader: TensorReader | None = None,
    workers: int | None = None,
) -> Iterator[tuple[ModulePlan, dict[str, StoredArray]]]:
    """Yield each module with its delivered tensors, in the order of the plan.

    `plan` is the plan of a whole checkpoint, or the plan of one rank from `plan_for_rank`. Stored tensors are views of
    memory-mapped files. `reader` may be given by a caller that needs its `bytes_read`; it must be a reader of
    `catalog`, and it is closed at the end.
    `workers` threads convert modules ahead of the one that is yielded next. The default is one thread per core, but at
    most 4.
    Memory: the delivered tensors of up to twice as many modules as workers (of one module with one worker), and the
    int8 codes of those that are being dequantized.
    Raises `CatalogError` when a file shrinks while its bytes are converted. A tensor that needs no change is a view of
    the file: who reads it after its file has shrunk is sent SIGBUS, as by any reader of mapped files.
    """
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.formats.codecs import NATIVE
    from trtllm_ct.pipeline.fused_scalars import FusedScalars

    count = workers or min(available_cores(), _MOST_WORKERS)
    fused_scalars, logged = FusedScalars(), set[str]()
    ahead: deque[_Begun] = deque()
    names = {catalog.tensors[run.name].file for module in plan.modules for run in module.runs}
    paths = {(catalog.directory / name).resolve(): name for name in names}
    with (
        guarded_maps(paths) as damaged,
        reader or TensorReader(catalog) as files,
        ThreadPoolExecutor(count) as pool,
    ):
        try:
            for module, following in zip_longest(plan.modules, plan.modules[1:]):
                if following is not None:
                    files.prefetch(following.runs)
                stored = {run.name: files.read(run.name, run.begin, run.end) for run in module.runs}
                ahead.append(_begin(pool, module, stored, codec or NATIVE))
                while len(ahead) >= (2 * count - 1 if following is not None else 1):
                    begun = ahead.popleft()
                    try:
                        delivered = begun.delivered.result()
                    finally:  # A warning may explain a fault, so it is logged before the fault is raised.
                        _log_new(begun.module, begun.warnings, logged)
                        _require_whole([paths[path] for path in damaged])
                    fused_scalars.check(begun.module, delivered)
                    yield begun.module, delivered
        finally:
            for begun in ahead:
                begun.delivered.cancel()


class _Begun(NamedTuple):
    """A module that another thread maps; `warnings` is complete when `delivered` is done."""

    module: ModulePlan
    delivered: Future[dict[str, StoredArray]]
    warnings: list[str]


def _begin(pool: Executor, module: ModulePlan, stored: StoredTensors, codec: Codec) -> _Begun:
    """Start to map a module in a thread of the pool."""
    from trtllm_ct.pipeline.mapper import ModuleMapper

    warnings: list[str] = []
    mapper = ModuleMapper(codec=codec, on_warning=lambda _module, warning: warnings.append(warning))
    return _Begun(module, pool.submit(mapper.map_module, module, stored), warnings)


def _require_whole(damaged: list[str]) -> None:
    """Raise `CatalogError` for files that became shorter while they were mapped; zeros stand for the lost bytes.

    The error comes before any other: zeros look like bad values.
    """
    faults = FaultCollector()
    for name in sorted(damaged):
        remedy = "The file changed or vanished while it was in use: wait until it is complete and start again."
        found = "a file that became shorter, or bytes that the disk could not deliver"
        faults.add(where=name, expected="a file that stays as it is while it is read", found=found, remedy=remedy)
    faults.raise_if_any(CatalogError)


def _log_new(module: ModulePlan, warnings: Iterable[str], logged: set[str]) -> None:
    """Log the warnings that are not in `logged`, and add them to it."""
    for warning in warnings:
        if warning not in logged:
            logged.add(warning)
            logger.warning("%s: %s", module.name, warning)

"""`stream_delivered`: load and map, one module after another, on several threads."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from concurrent.futures import Executor, Future

    from torch import Tensor

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.formats.codecs import Codec
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["stream_delivered"]

logger = logging.getLogger("trtllm_ct")

_MOST_WORKERS = 4
"""Threads that convert at a time unless more are asked for: about as many fill the memory bus of one processor."""


def stream_delivered(
    plan: Plan,
    catalog: Catalog,
    *,
    codec: Codec | None = None,
    device: str = "cpu",
    reader: TensorReader | None = None,
    workers: int | None = None,
) -> Iterator[tuple[ModulePlan, dict[str, Tensor]]]:
    """Load and map: the delivered tensors of one module after another, in the order of the plan.

    `plan` is that of a whole checkpoint or, by `plan_for_rank`, of one rank. Operations run on `device`; delivered
    tensors stay there. Stored tensors are views of mapped files. `reader` is one of `catalog` that the caller keeps,
    for its `bytes_read`; it is closed at the end.
    `workers` threads convert modules ahead of the one that is waited for: by default one for each core up to 4, and a
    single one for another device than the CPU.
    Memory: of twice as many modules as workers, but of a single one with a single worker, their delivered tensors and
    their int8 codes while they are dequantized.
    """
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.formats.codecs import NATIVE
    from trtllm_ct.pipeline.fused_scalars import FusedScalars

    count = workers or (min(available_cores(), _MOST_WORKERS) if device == "cpu" else 1)
    fused_scalars, told = FusedScalars(), set[str]()
    ahead: deque[_Begun] = deque()
    with reader or TensorReader(catalog) as files, ThreadPoolExecutor(count) as pool:
        try:
            for module, following in zip_longest(plan.modules, plan.modules[1:]):
                if following is not None:
                    files.prefetch(following.runs)
                stored = {run.name: files.read(run.name, run.begin, run.end) for run in module.runs}
                ahead.append(_begin(pool, module, stored, codec or NATIVE, device))
                while len(ahead) >= (2 * count - 1 if following is not None else 1):
                    begun = ahead.popleft()
                    try:
                        delivered = begun.delivered.result()
                    finally:  # what a fault may come from is told before it
                        _tell(begun.module, begun.warnings, told)
                    fused_scalars.check(begun.module, delivered)
                    yield begun.module, delivered
        finally:
            for begun in ahead:
                begun.delivered.cancel()


class _Begun(NamedTuple):
    """A module that is mapped by another thread; what its values warn of is complete when that has ended."""

    module: ModulePlan
    delivered: Future[dict[str, Tensor]]
    warnings: list[str]


def _begin(pool: Executor, module: ModulePlan, stored: Mapping[str, Tensor], codec: Codec, device: str) -> _Begun:
    from trtllm_ct.pipeline.mapper import CompressedTensorsWeightMapper

    warnings: list[str] = []
    mapper = CompressedTensorsWeightMapper(
        codec=codec, device=device, on_warning=lambda _module, warning: warnings.append(warning)
    )
    return _Begun(module, pool.submit(mapper.map_module, module, stored), warnings)


def _tell(module: ModulePlan, warnings: Iterable[str], told: set[str]) -> None:
    """Log each warning once, with the first module of the plan that gives rise to it."""
    for warning in warnings:
        if warning not in told:
            told.add(warning)
            logger.warning("%s: %s", module.name, warning)

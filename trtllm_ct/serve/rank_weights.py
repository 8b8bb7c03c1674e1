"""`deliver_for_rank`: everything that one rank of the engine is handed, proved to be complete."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.pipeline.stream import stream_delivered
from trtllm_ct.plan.ranks.shard import plan_for_rank
from trtllm_ct.serve.completeness import prove_complete, refuse_missing_modules
from trtllm_ct.serve.load_report import LoadReport, report_of

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_ct.engine.parallel import Rank
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.serve.sidecar import Sidecar

__all__ = ["deliver_for_rank", "rank_plan"]


def rank_plan(sidecar: Sidecar, rank: Rank) -> Plan:
    """The plan of one rank of the engine's own sizes.

    Raises `SidecarError` when the source changed or the sizes need other modes than the engine was told, `LoadError`
    when the plan lacks a module that the rank computes with.
    """
    whole, model = sidecar.plan_for(rank.parallel), sidecar.checkpoint.model
    own = plan_for_rank(whole, model, rank)
    refuse_missing_modules(whole, own, model, rank)
    return own


def deliver_for_rank(sidecar: Sidecar, rank: Rank) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of one rank by Hugging Face name, on the CPU, of full logical shape, and what loading them took.

    Tensors that need no change are views of mapped files; the next module is read ahead while one is converted.
    Memory: the result, and one module. Raises `PayloadError` for bad values, `LoadError` when what was delivered is not
    what the plan promised and the engine reads, and what `rank_plan` raises.
    """
    from trtllm_ct.checkpoint.reader import TensorReader

    started = time.perf_counter()
    plan, catalog = rank_plan(sidecar, rank), sidecar.checkpoint.catalog
    weights: dict[str, Tensor] = {}
    with collector_paused(), TensorReader(catalog) as reader:
        for _module, tensors in stream_delivered(plan, catalog, reader=reader):
            weights |= tensors
        bytes_read = reader.bytes_read
    unread = prove_complete(plan, weights)
    report = report_of(
        plan,
        rank,
        source=sidecar.source,
        bytes_read=bytes_read,
        seconds=time.perf_counter() - started,
        unread=unread,
    )
    return weights, report

"""`load_rank_weights`: loads all tensors of one rank of the engine and checks that they are complete."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.layouts.torch_tensors import tensors_of
from trtllm_ct.pipeline.stacking import stack_experts
from trtllm_ct.pipeline.stream import stream_delivered
from trtllm_ct.plan.ranks.shard import plan_for_rank
from trtllm_ct.serve.completeness import prove_complete, refuse_missing_modules
from trtllm_ct.serve.load_report import LoadReport, report_of

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_ct.engine.parallel import Rank
    from trtllm_ct.layouts.stored_array import StoredArray
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.serve.sidecar import Sidecar

__all__ = ["load_rank_weights", "rank_plan"]


def rank_plan(sidecar: Sidecar, rank: Rank) -> Plan:
    """Return the plan of one rank, for the parallel sizes in `rank.parallel`.

    Raises `SidecarError` when the source changed, or when these sizes need other modes than the engine was configured
    with. Raises `LoadError` when the plan lacks a module that the rank computes with.
    """
    whole_plan, model = sidecar.plan_for(rank.parallel), sidecar.checkpoint.model
    plan = plan_for_rank(whole_plan, model, rank)
    refuse_missing_modules(whole_plan, plan, model, rank)
    return plan


def load_rank_weights(sidecar: Sidecar, rank: Rank) -> tuple[dict[str, Tensor], LoadReport]:
    """Load the tensors of one rank. Returns them by Hugging Face name, with a report.

    The tensors are on the CPU and have the shape of the whole tensor, not of the rank's slice. Plain experts are
    stacked if the model's class reads them so. Tensors that need no conversion are views of memory-mapped files.
    Modules are read ahead while others are converted.
    Memory: the result, and the modules that are being converted, see `stream_delivered`.
    Raises `PayloadError` for invalid values, `LoadError` when the loaded tensors differ from the plan or from what the
    engine reads, and what `rank_plan` raises.
    """
    from trtllm_ct.checkpoint.reader import TensorReader

    started = time.perf_counter()
    plan, catalog = rank_plan(sidecar, rank), sidecar.checkpoint.catalog
    arrays: dict[str, StoredArray] = {}
    with collector_paused(), TensorReader(catalog) as reader:
        for _module, delivered in stream_delivered(plan, catalog, reader=reader):
            arrays |= delivered
        bytes_read = reader.bytes_read
    unread = prove_complete(plan, tensors_of(arrays))
    stack_experts(arrays, plan.stacks)
    weights = tensors_of(arrays)
    report = report_of(
        plan,
        rank,
        source=sidecar.source,
        bytes_read=bytes_read,
        seconds=time.perf_counter() - started,
        unread=unread,
    )
    return weights, report

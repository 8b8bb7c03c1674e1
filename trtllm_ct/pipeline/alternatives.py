"""`alternative`: another release, target, GPU or parallel size at which the modules that cost most keep their codes.

Each of them is one more plan from the same headers; nothing is read again.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import TrtllmCtError
from trtllm_ct.base.texts import format_bytes
from trtllm_ct.engine.parallel import ONE_RANK
from trtllm_ct.engine.platform import SMS
from trtllm_ct.engine.target import ENGINES, MODELOPT, TENSORRT_LLM
from trtllm_ct.plan.verdict import costliest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import Plan

__all__ = ["alternative"]

_TENSOR_SIZES = (1, 2, 4, 8)
_MODULES = 60_000
"""How many modules are planned for all changes together, two seconds' work; nothing is tried for a larger model."""


def alternative(checkpoint: Checkpoint, plan: Plan, options: Mapping[str, Any]) -> str:
    """Return what to change so that the modules that cost most keep their codes, and the bytes then.

    Empty if nothing that was tried does, and for models of very many modules, for which nothing is tried.

    `options` are the arguments of `Checkpoint.plan` that the plan was made with. Of several changes it is the first one
    that works: a later release, the target that this package loads itself, the SM of the GPUs, a tensor-parallel size.
    """
    costly = [module.name for module in costliest(plan)]
    if not costly or plan.target not in {MODELOPT.name, TENSORRT_LLM.name}:
        return ""
    for text, change in islice(_changes(plan, options), _MODULES // len(plan.modules)):
        try:
            other = checkpoint.plan(**{**options, **change})
        except TrtllmCtError:
            continue  # Such a plan does not exist, for instance because the ranks can't divide the model.
        if other.problems or other.delivered_bytes >= plan.delivered_bytes:
            continue
        modules = other.by_name
        if not any(modules[name].dequantized for name in costly if name in modules):
            return f"{text} keeps the codes of these modules: {format_bytes(other.delivered_bytes)} in all"
    return ""


def _changes(plan: Plan, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the changes to try, as the options of the command line and as arguments."""
    names = [*ENGINES]
    for engine in names[names.index(plan.engine) + 1 :]:
        yield f"--engine {engine}", {"engine": engine}
    if plan.target == MODELOPT.name:
        yield "LLM with this package installed (--to tensorrt_llm)", {"to": TENSORRT_LLM.name}
    for sm in SMS:
        if sm != plan.sm:
            yield f"--sm {sm}", {"sm": sm}
    parallel = options.get("parallel", ONE_RANK)
    for size in _TENSOR_SIZES if parallel != ONE_RANK else ():
        if size != parallel.tensor and size % parallel.expert == 0:
            yield f"--tp {size}", {"parallel": replace(parallel, tensor=size)}

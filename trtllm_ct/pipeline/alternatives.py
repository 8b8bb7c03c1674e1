"""Other options with which more modules keep their codes: `alternative` finds one, `elsewhere` compares many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_form import fields_form
from trtllm_ct.base.texts import format_bytes
from trtllm_ct.engine.parallel import ONE_RANK
from trtllm_ct.engine.platform import SMS
from trtllm_ct.engine.target import ENGINES, MODELOPT, TENSORRT_LLM
from trtllm_ct.pipeline.gpus import TENSOR_SIZES
from trtllm_ct.pipeline.trials import Change, trials
from trtllm_ct.plan.verdict import costliest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.options import PlanOptions
    from trtllm_ct.plan.plan import Plan

__all__ = ["ServedOn", "alternative", "elsewhere", "elsewhere_text"]


_MODULES = 60_000
"""How many modules `alternative` plans for all changes together, two seconds' work; none for a larger model."""
_MODULES_ELSEWHERE = 300_000
"""The same for `elsewhere`, which is asked for."""
_NEWEST_FIRST = (100, 90, 120, 89)
"""The SMs in the order in which they are tried: those of data centers first."""
_OF_RELEASES = frozenset({MODELOPT.name, TENSORRT_LLM.name})


def alternative(checkpoint: Checkpoint, plan: Plan, options: PlanOptions) -> str:
    """Return what to change so that the modules that cost most keep their codes, and the bytes then.

    Empty if nothing that was tried does, and for models of very many modules, for which nothing is tried.

    `options` are those that the plan was made with. Of several changes it is the first one
    that works: a later release, the target that this package loads itself, the SM of the GPUs, a tensor-parallel size.
    """
    costly = [module.name for module in costliest(plan)]
    if not costly or plan.target not in _OF_RELEASES:
        return ""
    for change, other in trials(checkpoint, plan, options, _changes(plan, options), _MODULES):
        if other is None or other.problems or other.delivered_bytes >= plan.delivered_bytes:
            continue
        modules = other.by_name
        if all(modules[name].keeps_codes for name in costly if name in modules):
            return f"{change.text} keeps the codes of these modules: {format_bytes(other.delivered_bytes)} in all"
    return ""


def _changes(plan: Plan, options: PlanOptions) -> Iterator[Change]:
    """Yield the changes that `alternative` tries."""
    names = [*ENGINES]
    for engine in names[names.index(plan.engine) + 1 :]:
        yield Change(f"--engine {engine}", {"engine": engine})
    if plan.target == MODELOPT.name:
        yield Change("LLM with this package installed (--to tensorrt_llm)", {"to": TENSORRT_LLM.name})
    for sm in SMS:
        if sm != plan.sm:
            yield Change(f"--sm {sm}", {"sm": sm})
    parallel = options.parallel
    for size in TENSOR_SIZES if parallel != ONE_RANK else ():
        if size != parallel.tensor and size % parallel.expert == 0:
            yield Change(f"--tp {size}", {"parallel": replace(parallel, tensor=size)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedOn:
    """How a release on GPUs of an SM would serve a checkpoint.

    `sm` is None if no SM was asked for; `sms` are those that have a kernel for every mode. `kept` of `quantized`
    modules keep their codes, of which the engine computes `deviating` ones otherwise than their scheme asks for.
    `problems` is the number of reasons why it can't serve the result.
    """

    engine: str
    sm: int | None
    sms: tuple[int, ...]
    quantized: int
    kept: int
    deviating: int
    delivered_bytes: int
    problems: int

    @classmethod
    def of(cls, plan: Plan) -> ServedOn:
        """Return how the release and the GPUs of a plan serve the checkpoint."""
        kept = [module for module in plan.modules if module.keeps_codes]
        return cls(
            engine=plan.engine,
            sm=plan.sm,
            sms=plan.sms or (),
            quantized=sum(module.weight is not None for module in plan.modules),
            kept=len(kept),
            deviating=sum(bool(module.note) for module in kept),
            delivered_bytes=plan.delivered_bytes,
            problems=len(plan.problems),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)


def elsewhere(checkpoint: Checkpoint, plan: Plan, options: PlanOptions) -> tuple[ServedOn, ...]:
    """Return how each release and GPU would serve a checkpoint, those of `plan` first.

    `options` are those of `alternative`. Of a model with very many modules not all are tried. Empty for a target that
    no release reads.
    """
    if plan.target not in _OF_RELEASES:
        return ()
    found = trials(checkpoint, plan, options, _places(plan), _MODULES_ELSEWHERE)
    return (ServedOn.of(plan), *(ServedOn.of(other) for _, other in found if other is not None))


def _places(plan: Plan) -> Iterator[Change]:
    """Yield the releases and GPUs other than those of a plan; this release and the newest one first on each."""
    names = [*ENGINES]
    for sm in _NEWEST_FIRST:
        for engine in dict.fromkeys((plan.engine, names[-1], *names)):
            if (engine, sm) != (plan.engine, plan.sm):
                yield Change(f"--engine {engine} --sm {sm}", {"engine": engine, "sm": sm})


def elsewhere_text(found: Sequence[ServedOn]) -> str:
    """Return one sentence about what `elsewhere` returned: the release and GPU that serve most; empty for nothing."""
    if not found:
        return ""
    here, best = found[0], min(found, key=_rank)
    if _rank(best) == _rank(here):
        return f"none of {len(found) - 1} other releases and GPUs keeps the codes of more modules"
    return (
        f"--engine {best.engine} --sm {best.sm} serves most of it natively: {best.kept} of {best.quantized} quantized "
        f"modules keep their codes ({here.kept} here), {format_bytes(best.delivered_bytes)}"
    )


def _rank(served: ServedOn) -> tuple[bool, int, int, int]:
    """Return the key by which the best place is the smallest one."""
    return bool(served.problems), -served.kept, served.delivered_bytes, served.deviating

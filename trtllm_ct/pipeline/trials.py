"""`trials`: plans of one checkpoint with other options, as many as take a bounded time.

Each of them is one more plan from the same headers; nothing is read again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import TrtllmCtError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.options import PlanOptions
    from trtllm_ct.plan.plan import Plan

__all__ = ["Change", "trials"]


@dataclass(frozen=True, slots=True)
class Change:
    """Other options of a plan: `text` as the command line has them, `arguments` those fields of `PlanOptions`."""

    text: str
    arguments: Mapping[str, Any]


def trials(
    checkpoint: Checkpoint, plan: Plan, options: PlanOptions, changes: Iterable[Change], most: int
) -> Iterator[tuple[Change, Plan | None]]:
    """Yield changes with the plans that they give; None for one that gives none, as if ranks can't divide the model.

    `plan` is that without a change, and `options` are those that it was made with. The plans have at most
    `most` modules together, so that a large model gets fewer of them.
    """
    for change in islice(changes, most // max(1, len(plan.modules))):
        try:
            yield change, checkpoint.plan_for(replace(options, **change.arguments))
        except TrtllmCtError:
            yield change, None

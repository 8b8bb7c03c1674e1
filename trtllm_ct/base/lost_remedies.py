"""What to do about a tensor that no file has.

Where a file may be missing, it is to be fetched. Where none can be, because the index or the names of the files tell
how many there are, the checkpoint was saved without the tensor: `save_pretrained` has dropped the scales of some
models, and there is nothing to fetch. Code that finds a lost tensor knows one module or one format and not the files;
so it always writes `FETCH` as a sentence or the beginning of one, and the planner, which knows them, changes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import TensorSpec

__all__ = ["FETCH", "FETCH_OR_OTHER_MODEL", "lost_or_damaged", "say_nothing_is_missing"]

FETCH = "Fetch the shard that holds it from where the checkpoint was published"
"""The remedy for a lost tensor, without a full stop."""

FETCH_OR_OTHER_MODEL = (
    f"{FETCH}. If the model has no such part, config.json describes another one: take it from where the weights were "
    "published."
)
"""The remedy for what the files lack by the numbers in config.json."""

_SAVED_WITHOUT = (
    "No file is missing, so the checkpoint was saved without it: quantize the model again, or ask the author of the "
    "checkpoint"
)


def lost_or_damaged(spec: TensorSpec | None) -> str:
    """Return the remedy, without a full stop, for a tensor that is lost (None) or that has another shape or dtype."""
    return FETCH if spec is None else "Download the checkpoint again"


def say_nothing_is_missing(faults: FaultCollector) -> None:
    """Change the remedies for lost tensors of a checkpoint of which no file can be missing."""
    faults.faults = [replace(fault, remedy=fault.remedy.replace(FETCH, _SAVED_WITHOUT)) for fault in faults.faults]

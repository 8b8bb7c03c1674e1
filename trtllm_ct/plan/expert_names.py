"""Decide by which spelling routed experts are delivered: that of transformers' class, or that of the engine's."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.model_class import Comparison, ModelClass
    from trtllm_ct.plan.models.sites import Model

__all__ = ["spelled", "spelling_warnings"]

_OWNER = re.compile(r"(.*(?<!shared_)experts)\.(?:\d+\.\w+|\w+)(?:\.\w+)?")


def spelled(model: Model, names: Iterable[str], model_class: ModelClass | None, target: Target) -> Model:
    """Return the model with the spelling of experts that holds for a target.

    Plain weights are for the class of transformers: what the engine's class reads has no part in them. `names` are
    those of all stored tensors. `model_class` tells its spelling if it is known and the row of the model lists no
    modules; otherwise the tables do.
    """
    model = replace(model, as_transformers=target.as_classes_read and target.capabilities.release is None)
    if model.stated is not None or model_class is None:
        return model
    owners = dict.fromkeys(match[1] for name in names if (match := _OWNER.fullmatch(name)) is not None)
    told = model_class.expert_spelling(owners) if owners else model.spelling
    # A table says more of the stacks that files have than the class does.
    if not told.known or (told.stacked is not None and model.spelling.stacked is not None):
        return model
    return replace(model, spelling=told)


def spelling_warnings(model: Model, comparison: Comparison) -> tuple[str, ...]:
    """Return a warning if experts are delivered one by one, and nothing says how the class of the model reads them."""
    if not model.as_transformers or model.spelling.known or model.discovery is None:
        return ()
    if not any(site.expert for site in model.discovery.sites):
        return ()
    why = f" ({comparison.why_not})" if comparison.why_not else ""
    text = (
        f"how {model.name} reads routed experts is not known{why}: they are delivered one by one, under the names of "
        "the files if they are stored so; a class that reads other names, or stacks, does not find them"
    )
    return (text,)

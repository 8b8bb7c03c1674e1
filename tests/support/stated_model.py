"""A model whose checkpoint has exactly the modules that config.json states, all of them plain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.plan.models.places import PLACES
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.plan.stored import StoredModule, Whole

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["stated_model"]


def stated_model(config: Mapping[str, Any]) -> Model:
    """The model of a config.json, with the sites of such a checkpoint."""
    model = Model.from_config(config)
    stored = {}
    for name, stated in model.stated_modules(PLACES[0]):
        specs = {"weight": TensorSpec(DType.BF16, stated.shape)}
        specs |= {local: TensorSpec(DType.BF16, stated.shape[:1]) for local in stated.locals}
        views = {local: Whole(name=f"{name}.{local}", spec=spec) for local, spec in specs.items()}
        stored[name] = StoredModule(name, views)
    return model.in_checkpoint(stored)

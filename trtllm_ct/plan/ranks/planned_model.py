"""`model_of_plan`: finds the modules of a model whose row lists none in the plan of its checkpoint.

A plan has the names under which modules are delivered, and the shapes of quantized weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.plan.stored import StoredModule

if TYPE_CHECKING:
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.plan import Plan

__all__ = ["model_of_plan"]


def model_of_plan(plan: Plan, model: Model) -> Model:
    """Return the model with the modules of a plan; unchanged if its row lists them, or if they were found before.

    `plan` must be the plan of all ranks: the plan of one rank lacks modules.
    """
    if model.discovery is not None:
        return model
    stored = {module.name: StoredModule(module.name, module.views) for module in plan.modules}
    shapes = {module.name: module.weight.shape for module in plan.modules if module.weight is not None}
    return model.in_checkpoint(stored, shapes)

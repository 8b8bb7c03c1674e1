"""The modules of a checkpoint as planning sees them, whatever form their tensors have in the files.

Sparse tensors are one, names are those of Hugging Face, and experts are apart.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.fused_experts import split_fused_experts
from trtllm_ct.plan.models.mistral_names import hugging_face_names
from trtllm_ct.plan.stored import stored_modules

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.formats.sparse.pieces import StoredShapes
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["gather_modules"]


def gather_modules(
    catalog: Catalog, model: Model, faults: FaultCollector, shapes: StoredShapes | None = None
) -> dict[str, StoredModule]:
    """The modules by name, in the order of the catalog; contradictions between tensors are added to `faults`.

    `shapes` are those that sparse tensors say they have; without them the model tells that of its own weights. Raises
    `PlanError` where most names mean nothing.
    """
    # Few checkpoints are sparse, and only they need the shape of every weight by name.
    of_model = cache(lambda: model.weight_shapes(catalog.tensors))
    stored = stored_modules(catalog, lambda name: of_model().get(name), faults, shapes)
    stored = hugging_face_names(stored, model, faults)
    if model.architecture.experts is not None:
        stored = split_fused_experts(stored, model.architecture.experts)
    return stored

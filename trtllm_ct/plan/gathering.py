"""Gather the modules of a checkpoint in one form, whatever form their tensors have in the files.

The pieces of a sparse tensor become one tensor, modules get their Hugging Face names, and fused experts are split into
one module per expert and projection.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.plan.models.fused_experts import split_fused_experts, stores_inputs_first
from trtllm_ct.plan.models.mistral_names import hugging_face_names
from trtllm_ct.plan.stored import stored_modules
from trtllm_ct.plan.unlisted import fill_from_unlisted

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.formats.sparse.pieces import StoredShapes
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["gather_modules"]


def gather_modules(
    catalog: Catalog,
    model: Model,
    faults: FaultCollector,
    shapes: StoredShapes | None = None,
    *,
    split_stacks: bool = False,
) -> dict[str, StoredModule]:
    """Return the modules by name, in the order of the catalog; contradictions between tensors are added to `faults`.

    With `split_stacks`, plain tensors of all experts are split for models whose row lists no modules too.
    `shapes` are the stored shapes of sparse tensors. For a sparse weight without one the shape follows from the model.
    Tensors that the index does not list are taken only where the model lacks them, see `fill_from_unlisted`.
    Raises `PlanError` when a checkpoint in Mistral's own form has modules that the model has no name for.
    """
    gather = partial(_gather, split=split_stacks or model.stated is not None)
    if not catalog.unlisted:
        return gather(catalog, model, faults, shapes)
    listed = gather(catalog.without(catalog.unlisted), model, faults, shapes)
    # Old tensors may contradict new ones; that matters only for those that are taken.
    everything = gather(catalog, model, FaultCollector(), shapes)
    return fill_from_unlisted(listed, everything, model)


def _gather(
    catalog: Catalog, model: Model, faults: FaultCollector, shapes: StoredShapes | None, *, split: bool
) -> dict[str, StoredModule]:
    """Return the modules of all tensors in the catalog; plain tensors of all experts are split with `split`."""
    # Only sparse checkpoints, which are rare, need the shape of every weight by name.
    model_shapes = cache(lambda: model.weight_shapes(catalog.tensors))
    stored = stored_modules(catalog, lambda name: model_shapes().get(name), faults, shapes)
    stored = hugging_face_names(stored, model, faults)
    if not model.experts:
        return stored
    # Where the class of a model is not known, plain stacks of experts stay as they are: it may read no other form.
    return split_fused_experts(stored, model, inputs_first=stores_inputs_first(stored, model), plain=split)

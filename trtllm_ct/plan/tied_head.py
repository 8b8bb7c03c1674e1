"""Heads that are stored although config.json ties them to the embeddings.

Such a flag is often left over: a writer gave the head a weight of its own and kept config.json. So the tensors decide.
If the stored head equals the embeddings, these serve as both. If it differs, both are delivered. If only the head is
stored, it serves as the embeddings too. A config.json that says nothing leaves it to the default of a class, which may
be unknown: then a stored head is delivered too, and if it differs, the delivered config.json says that nothing is tied.
Source: transformers 5.23.0 `modeling_utils.py: tie_weights`, which ties in the same cases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.formats import WEIGHT_TENSORS
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule, View

__all__ = ["UNTIED", "own_tensors", "tied_pair"]

UNTIED = (
    "{head} is stored and {differs} from {table}, though config.json ties them: both are delivered, "
    "and the delivered config.json says tie_word_embeddings: false"
)
"""The warning about a head that is delivered although config.json ties it."""


def tied_pair(
    model: Model, stored: Mapping[str, StoredModule], place: tuple[str, str]
) -> tuple[StoredModule, StoredModule] | None:
    """Return the stored embeddings and the stored head of a model that may tie them; None unless both are stored.

    `place` is what `Model.place` returns.
    """
    head = stored.get(place[1])
    table = next((stored[name] for name in model.table_names(place) if name in stored and name != place[1]), None)
    if model.tied is False or head is None or table is None or not head.has_weight or not table.has_weight:
        return None
    return table, head


def own_tensors(module: StoredModule) -> dict[str, View]:
    """Return the tensors that make the values of a module: its weight and what else it adds, such as a bias.

    Scales of activations, and scales that are left over beside a plain weight, are not among them.
    """
    idle = QUANTIZATION_TENSORS - WEIGHT_TENSORS.keys() if module.is_quantized else QUANTIZATION_TENSORS
    return {local: view for local, view in module.views.items() if local not in idle}

"""Refuse checkpoints that don't have the modules that config.json states, or have them in other sizes.

Where the row of the class has the modules of a layer, config.json states every one of them with its size. Otherwise the
row has the parts of a layer without their sizes (`row_parts_check.py`), and config.json has the number of experts and
the sizes of embeddings and head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.lost_remedies import FETCH, FETCH_OR_OTHER_MODEL
from trtllm_ct.plan.models.discovery import table_names_of
from trtllm_ct.plan.models.plain_tensors import EXPERT
from trtllm_ct.plan.models.sizes import stated_sizes
from trtllm_ct.plan.row_parts_check import lost_by_row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.models.plain_tensors import PlainTensors
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["refuse_unlike_config", "refuse_unlike_row"]

_NO_TENSOR = "no such tensor in any shard"
_OTHER_MODEL = "Take config.json from where the weights were published; it describes another model."


def refuse_unlike_config(
    model: Model, modules: Mapping[str, StoredModule | None], place: tuple[str, str], faults: FaultCollector
) -> None:
    """Add a fault for each module or tensor that is missing, and for each plain weight of another shape.

    `modules` are the stored modules of the sites. The shape of a quantized weight is compared when it is described.
    `place` is what `Model.place` returns.
    """
    for name, stated in model.stated_modules(place):
        module = modules.get(name)
        weight = None if module is None else module.specs.get("weight")
        if module is None or (weight is None and not module.has_weight):
            _missing(name, "weight", model.name, faults)
        elif weight is not None and weight.shape != stated.shape and not module.is_quantized:
            faults.add(
                where=f"{module.stored_name}.weight",
                expected=f"shape {list(stated.shape)} by the sizes in config.json",
                found=str(weight),
                remedy=_OTHER_MODEL,
            )
        for local in stated.locals:
            if module is not None and local not in module.specs:
                _missing(name, local, model.name, faults)


def _missing(module: str, local: str, model: str, faults: FaultCollector) -> None:
    """Add the fault of a tensor that no file has."""
    faults.add(
        where=f"{module}.{local}",
        expected=f"a tensor that {model} needs",
        found=_NO_TENSOR,
        remedy=FETCH_OR_OTHER_MODEL,
    )


def refuse_unlike_row(tensors: PlainTensors, model: Model, place: tuple[str, str], faults: FaultCollector) -> None:
    """Add a fault for what a checkpoint lacks by the row of its class, if the row doesn't have the modules of a layer.

    `tensors` are those of the whole checkpoint as plain weights; `place` is what `Model.place` returns.
    """
    inside = {name: shape for name, shape in tensors.items() if name.startswith(place[0])}
    for name, expected in lost_by_row(inside, model, place[0]):
        faults.add(where=name, expected=expected, found=_NO_TENSOR, remedy=f"{FETCH}.")
    _refuse_other_count(inside, model, faults)
    _refuse_other_ends(tensors, model, place, faults)


def _refuse_other_count(tensors: PlainTensors, model: Model, faults: FaultCollector) -> None:
    """Add a fault for each layer whose routed experts, stored one by one, are not as many as config.json says."""
    stated = stated_sizes(model.text)["experts"]
    counts: dict[str, int] = {}
    for name in tensors:
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            counts[expert[1]] = max(counts.get(expert[1], 0), int(expert[2]) + 1)
    for owner, count in counts.items():
        if stated and count != stated:
            remedy = FETCH_OR_OTHER_MODEL if count < stated else _OTHER_MODEL
            faults.add(where=owner, expected=f"{stated} experts, by config.json", found=str(count), remedy=remedy)


def _refuse_other_ends(tensors: PlainTensors, model: Model, place: tuple[str, str], faults: FaultCollector) -> None:
    """Add a fault for embeddings and a head that don't have the width of the model, or too few rows.

    Some classes have rows for a few more tokens than `vocab_size` counts.
    """
    body, head = place
    hidden, vocabulary = stated_sizes(model.text, ("hidden_size",))["hidden_size"], model.vocabulary
    for name in (*(f"{body}{table}" for table in sorted(table_names_of(model.row))), head):
        shape = tensors.get(f"{name}.weight")
        if shape is None or not hidden:
            continue
        if len(shape) != 2 or shape[0] < vocabulary or shape[1] != hidden:
            expected = f"shape {[vocabulary, hidden]} by the sizes in config.json"
            faults.add(where=f"{name}.weight", expected=expected, found=f"shape {list(shape)}", remedy=_OTHER_MODEL)

"""Refuse checkpoints that don't have the modules that config.json states, or have them in other sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["refuse_unlike_config"]


def refuse_unlike_config(
    model: Model, modules: Mapping[str, StoredModule | None], place: tuple[str, str], faults: FaultCollector
) -> None:
    """Add a fault for each module or tensor that is missing, and for each plain weight of another shape.

    `modules` are the stored modules of the sites. The shape of a quantized weight is compared when it is described.
    `place` is what `Model.place` returns.
    """
    for name, stated in model.stated_modules(place):
        module = modules.get(name)
        if module is None or not module.has_weight:
            _missing(name, "weight", model.name, faults)
        elif not module.is_quantized and module.specs["weight"].shape != stated.shape:
            faults.add(
                where=f"{module.stored_name}.weight",
                expected=f"shape {list(stated.shape)} by the sizes in config.json",
                found=str(module.specs["weight"]),
                remedy="Take config.json from where the weights were published; it describes another model.",
            )
        for local in stated.locals:
            if module is not None and local not in module.specs:
                _missing(name, local, model.name, faults)


def _missing(module: str, local: str, model: str, faults: FaultCollector) -> None:
    """Add the fault of a tensor that no file has."""
    faults.add(
        where=f"{module}.{local}",
        expected=f"a tensor that {model} needs",
        found="no such tensor in any shard",
        remedy="Fetch the shard that holds it from where the checkpoint was published. If no shard does, "
        "config.json describes another model: take it from there too.",
    )

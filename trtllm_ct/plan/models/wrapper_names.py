"""Rename the modules of a model with several parts to the names that the engine's class reads.

Some classes keep the keys below one prefix and drop all others without a word, and transformers has moved that prefix:
files from before and after its release 4.52 differ. The names of the files remain `StoredModule.stored_name`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.engine.model_classes import WRAPPERS

if TYPE_CHECKING:
    from trtllm_ct.engine.model_classes import Wrapper
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["names_that_are_read"]


def names_that_are_read(modules: dict[str, StoredModule], model: Model, target: Target) -> dict[str, StoredModule]:
    """Return the modules by the names that the engine's class reads them under, in the same order.

    They are unchanged at targets that no engine's class reads, for classes that are not in `WRAPPERS`, and where a
    module of the new name is stored too.
    """
    wrapper = WRAPPERS.get(model.name)
    if wrapper is None or not model.multimodal or target.capabilities.release is None:
        return modules
    place = model.place(modules)
    renamed: dict[str, StoredModule] = {}
    for name, module in modules.items():
        new = _read_name(name, place, wrapper)
        new = name if new in modules else new
        renamed[new] = module.delivered_as(new)
    return renamed


def _read_name(name: str, place: tuple[str, str], wrapper: Wrapper) -> str:
    """Return the name under which a class reads a module; `place` is where the files have the text model."""
    for stored, read in wrapper.beside:
        if name.startswith(stored):
            return read + name.removeprefix(stored)
    if place in wrapper.places:
        return name
    (body, head), (read_body, read_head) = place, wrapper.places[0]
    if name == head:
        return read_head
    return read_body + name.removeprefix(body) if name.startswith(body) else name

"""Give the modules of a model the names that the engine's class reads.

Of models with several parts, some classes keep the keys below one prefix and drop all others without a word, and
transformers has moved that prefix: files from before and after its release 4.52 differ. Some classes read modules of a
layer under other names than those of the files (`ClassRow.read_as`). The names of the files remain
`StoredModule.stored_name`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtllm_ct.engine.model_classes import WRAPPERS
from trtllm_ct.plan.models.shared_attention import layers_without_values, with_values

if TYPE_CHECKING:
    from trtllm_ct.engine.model_classes import Wrapper
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["modules_as_read"]


def modules_as_read(modules: dict[str, StoredModule], model: Model, target: Target) -> dict[str, StoredModule]:
    """Return the modules that the engine's class reads, by the names that it reads them under, in the same order.

    They are unchanged at targets that no engine's class reads.
    """
    if target.capabilities.release is None:
        return modules
    return with_values(_renamed(modules, model), layers_without_values(model.row, model.text))


def _renamed(modules: dict[str, StoredModule], model: Model) -> dict[str, StoredModule]:
    """Return the modules under the names that the engine's class reads.

    They are unchanged for classes of which neither `WRAPPERS` nor a row says anything else, and where a module of the
    new name is stored too.
    """
    wrapper = WRAPPERS.get(model.name) if model.multimodal else None
    read_as = model.row.read_as
    if wrapper is None and not read_as:
        return modules
    place = model.place(modules)
    renamed: dict[str, StoredModule] = {}
    for name, module in modules.items():
        new = name if wrapper is None else _read_name(name, place, wrapper)
        for pattern, replacement in read_as:
            new = re.sub(pattern, replacement, new)
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

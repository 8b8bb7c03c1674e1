"""Tensors that lie in a shard but that the index does not list: read only where the model lacks them.

A tool that quantizes a checkpoint again may leave plain weights in old shards and drop them from the index. Another
tool may add tensors and forget to list them. The index decides first: a module that it lists completely is read as
listed. Other loaders of such a checkpoint read every tensor of a listed shard, and the last one of a name counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.formats import PACKED_CODES
from trtllm_ct.plan.stored import ACTIVATION_AND_CACHE_TENSORS, QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule, View

__all__ = ["fill_from_unlisted", "unlisted_warnings", "unread_tensors"]

_WEIGHTS = PACKED_CODES | {"weight"}


def fill_from_unlisted(
    listed: Mapping[str, StoredModule], everything: Mapping[str, StoredModule], model: Model
) -> dict[str, StoredModule]:
    """Return the modules of the listed tensors, filled with what the model lacks from all tensors.

    A module of the model is taken as a whole if the index lists no tensor of it. A module that the index lists gets its
    companions of quantization and the parameters that it must have, but never a second weight. Other unlisted modules
    are taken if they hold scales of activations or of the KV cache only, and those outside of the text
    model if the model has such parts.
    """
    model = model.in_checkpoint(listed)
    body, head = place = model.place(listed)
    needed = {name: module for module in _needed(model, place) for name in module.stored_names}
    result = dict(listed)
    for name, module in everything.items():
        module_needed = needed.get(name)
        known = listed.get(name)
        if known is not None:
            views = {local: view for local, view in module.views.items() if _completes(local, known, module_needed)}
            result[name] = replace(known, views={**known.views, **views})
        elif module_needed is not None:
            if listed.keys().isdisjoint(module_needed.stored_names):
                result[name] = module
        elif module.specs.keys() <= ACTIVATION_AND_CACHE_TENSORS or (
            model.multimodal and not name.startswith(body) and name != head
        ):
            result[name] = module
    return result


class _Needed(NamedTuple):
    """A module that the model needs: the names that it may have, and the local names beside its weight."""

    stored_names: tuple[str, ...]
    locals: tuple[str, ...]


def _needed(model: Model, place: tuple[str, str]) -> Iterator[_Needed]:
    """Yield the modules that config.json states, or those of the listed tensors if it states none."""
    if model.stated is None:
        yield from (_Needed(site.stored_names, site.locals) for site in model.sites(place))
    for name, module in model.stated_modules(place):
        yield _Needed(module.stored_names(name), module.locals)


def _completes(local: str, known: StoredModule, needed: _Needed | None) -> bool:
    """Whether an unlisted tensor completes a module of which the index lists other tensors."""
    if local in known.views:
        return False
    if local in _WEIGHTS:
        return not known.has_weight
    return local in QUANTIZATION_TENSORS or (needed is not None and local in needed.locals)


def unread_tensors(catalog: Catalog, modules: Iterable[StoredModule]) -> frozenset[str]:
    """Return the unlisted tensors of a catalog that no module is made from."""
    if not catalog.unlisted:
        return catalog.unlisted
    views: Iterable[View] = (view for module in modules for view in module.views.values())
    return catalog.unlisted.difference(*(view.sources for view in views))


def unlisted_warnings(catalog: Catalog, unread: frozenset[str]) -> tuple[str, ...]:
    """Return warnings about the unlisted tensors of a catalog: those that are read, and the `unread` ones."""
    texts = {
        "not in the index, read nevertheless": catalog.unlisted - unread,
        "not in the index, and the model is complete without them, so they are not read": unread,
    }
    return tuple(f"{text}: {format_names(sorted(names))}" for text, names in texts.items() if names)

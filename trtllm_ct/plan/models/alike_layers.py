"""Find what a checkpoint has lost, for models that no table describes: layers and experts of one kind are alike.

A layer that has lost a tensor has other tensors than all other layers. Layers differ for good reasons too: they are of
several kinds, share keys and values, or have heads of several sizes. So a layer is reported only if no other layer has
exactly its tensors, and most layers have all of them and more.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.expert_spellings import PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.models.site import Site

__all__ = ["CHECKED", "refuse_lost_modules"]

CHECKED = (
    "no table describes the modules of {name}: that none is lost was checked by the index, by the shapes of the codes, "
    "and by comparing its layers and experts with each other"
)
"""The note about the checks of a model without tables."""

_LAYER = re.compile(r"((?:.*?\.)?(?:layers|h|blocks|block))\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)")
# From fewer layers of one kind it can't be told what the others must have.
_FEWEST = 3
_MOST_NAMED = 1000


def refuse_lost_modules(sites: Iterable[Site], model: str, faults: FaultCollector) -> None:
    """Add a fault for each Linear or bias that one layer lacks although the other layers of its kind have it.

    The same holds for the projections of routed experts. `model` names the architecture in messages.
    """
    stacks: dict[str, dict[int, set[str]]] = {}
    experts: dict[str, dict[int, set[str]]] = {}
    for site in sites:
        expert = _EXPERT.fullmatch(site.module)
        if expert is not None and expert[3] in PROJECTIONS:
            experts.setdefault(expert[1], {}).setdefault(int(expert[2]), set()).update(_tensors(expert[3], site))
        elif (layer := _LAYER.fullmatch(site.module)) is not None:
            stacks.setdefault(layer[1], {}).setdefault(int(layer[2]), set()).update(_tensors(layer[3], site))
    lost = [f"{stack}.{number}.{name}" for stack, layers in stacks.items() for number, name in _lost(layers)]
    lost += [f"{owner}.{number}.{name}" for owner, parts in experts.items() for number, name in _lost_parts(parts)]
    for name in lost:
        faults.add(
            where=name,
            expected=f"a tensor that the layers of {model} have",
            found="no such tensor in any shard",
            remedy="Fetch the shard that holds it from where the checkpoint was published.",
        )


def _tensors(name: str, site: Site) -> Iterator[str]:
    """Yield the names of a module's weight and bias."""
    yield f"{name}.weight"
    if "bias" in site.locals:
        yield f"{name}.bias"


def _lost(layers: dict[int, set[str]]) -> Iterator[tuple[int, str]]:
    """Yield the tensors that more than half of all layers have and a layer lacks that is the only one of its kind."""
    kinds = Counter(frozenset(names) for names in layers.values())
    for number, names in layers.items():
        if kinds[frozenset(names)] > 1:
            continue
        for kind, count in kinds.items():
            if names < kind and count >= _FEWEST and 2 * count > len(layers):
                yield from ((number, name) for name in sorted(kind - names))


def _lost_parts(parts: dict[int, set[str]]) -> Iterator[tuple[int, str]]:
    """Yield what an expert lacks of what most experts of its layer have, and the experts that are missing."""
    usual, count = Counter(frozenset(names) for names in parts.values()).most_common(1)[0]
    if 2 * count <= len(parts):
        return
    missing = ((number, name) for number in range(max(parts) + 1) for name in sorted(usual - parts.get(number, set())))
    yield from islice(missing, _MOST_NAMED)

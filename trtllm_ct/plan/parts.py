"""`parts_of`: the bytes of a model by kind of module, as stored and as delivered."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_form import fields_form
from trtllm_ct.plan.models.class_row import entry_of
from trtllm_ct.plan.models.discovery import is_draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["KINDS", "Part", "parts_of"]

KINDS = (
    "embeddings",
    "attention",
    "MLP",
    "routed experts",
    "shared experts",
    "routers",
    "norms",
    "head",
    "draft layers",
    "outside of the text model",
)
"""The kinds of modules, in the order of reports. Linear attention and Mamba count as attention."""

_NUMBER = re.compile(r"\.\d+\.")
# The first of these that matches the path of a module decides.
_BY_PATH = (
    (re.compile(r"(?:^|\.)experts(?:\.|$)"), "routed experts"),
    (re.compile(r"(?:^|\.)shared?_(?:experts?|mlp)(?:\.|$)"), "shared experts"),
    (re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate)(?:\.wg)?$"), "routers"),
    (re.compile(r"norm(?:_f|\d)?$"), "norms"),
    (re.compile(r"(?:^|\.)mixer\.(?:up_proj|down_proj|fc\d_latent_proj)$"), "MLP"),
    (re.compile(r"(?:^|\.)(?:\w*attn|attention|mixer)(?:\.|$)"), "attention"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The modules of one kind (`KINDS`): their number, and their bytes as stored and as delivered."""

    kind: str
    modules: int
    stored_bytes: int
    delivered_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)


def parts_of(plan: Plan, model: Model) -> tuple[Part, ...]:
    """Return the parts of a plan that have modules, in the order of `KINDS`; `model` is that of the checkpoint."""
    kinds: dict[str, list[ModulePlan]] = defaultdict(list)
    known: dict[tuple[str, bool, str], str] = {}
    place = model.place(plan.by_name)
    for module in plan.modules:
        # The 10^5 modules of a large model have few paths once their numbers are left out.
        draft = is_draft(module.name) or _layer(module.name, place[0]) >= (model.layers or 1 << 31)
        key = (module.class_name, draft, _NUMBER.sub(".*.", module.name))
        if key not in known:
            known[key] = "draft layers" if draft else _kind(module, model, place)
        kinds[known[key]].append(module)
    return tuple(_part(kind, kinds[kind]) for kind in KINDS if kind in kinds)


def _layer(name: str, body: str) -> int:
    """Return the number of the text model's layer that a module is in; -1 if it is in none."""
    parts = name.removeprefix(body).split(".", 2)
    return int(parts[1]) if name.startswith(body) and len(parts) > 2 and parts[1].isdecimal() else -1


def _kind(module: ModulePlan, model: Model, place: tuple[str, str]) -> str:
    """Return the kind of a module that is in no draft layer."""
    name, (body, head) = module.name, place
    if name == head:
        return "head"
    if not name.startswith(body):
        return "outside of the text model"
    if module.class_name == "Embedding":
        return "embeddings"
    if module.experts is not None:
        return "routed experts"
    if model.row.router and entry_of({model.row.router: "routers"}, name):
        return "routers"
    return next((kind for pattern, kind in _BY_PATH if pattern.search(name)), "MLP")


def _part(kind: str, modules: Sequence[ModulePlan]) -> Part:
    return Part(
        kind=kind,
        modules=len(modules),
        stored_bytes=sum(module.stored_bytes for module in modules),
        delivered_bytes=sum(module.delivered_bytes for module in modules),
    )

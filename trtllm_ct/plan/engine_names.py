"""The names under which an engine looks up a module in `exclude_modules` and `quantized_layers`.

An entry whose name matches nothing is silently ignored: a module that should be plain is then built quantized, and a
quantized one is built in the global mode. So an entry is written under every name that the engine may compare with:

- A class that wraps a text model compares names inside of the text model, whatever the prefix in the files is:
  `_torch/models/modeling_qwen3vl.py`, `modeling_mistral.py: Mistral3VLM` and `modeling_gemma3vl.py` hand the
  configuration to the text model unchanged; `modeling_kimi_k25.py` renames `exclude_modules`, not `quantized_layers`.
- All routed experts of a layer are one module. Releases with ConfigurableMoE compute in its child `backend`, which
  `_torch/models/modeling_utils.py: apply_quant_config_exclude_modules` compares by its own name.
- A Linear that the files already have fused gets the entry of its first part: `apply_layerwise_quant_config` in the
  same file looks for `q_proj` where the engine has `qkv_proj`, and in early releases for `gate_proj` only where it has
  `gate_up_proj`. Attention as a whole has the entry of `q_proj` too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.class_row import DEFAULT_ROW

if TYPE_CHECKING:
    from typing_extensions import Self

    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.sites import Model

__all__ = ["EngineNames"]

_INNER_PLACE = ("model.", "lm_head")
_FIRST_PARTS = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNames:
    """Says which names an engine compares a module by.

    `place` is the prefix of the text model's body and the name of its head, None if the engine compares delivered names
    only. `head` is the name of the head. `experts` is the path of routed experts in a layer, empty without any;
    `wrapped` says that the engine computes them in a child called `backend`. `fused` says that it looks for the first
    part of Linears that are stored fused. `inner` are the pairs of `ClassRow.inner`. `drafts` is the prefix of draft
    layers whose numbers in the class follow those of its `layers` layers, empty if they have no prefix of their own.
    """

    place: tuple[str, str] | None = None
    head: str = _INNER_PLACE[1]
    experts: str = ""
    wrapped: bool = False
    fused: bool = False
    inner: tuple[tuple[str, str], ...] = ()
    drafts: str = ""
    layers: int = 0

    @classmethod
    def of(cls, model: Model, place: tuple[str, str], target: Target) -> Self:
        """Return the names of a model at a target; `place` is where its text model is delivered."""
        release = target.capabilities.release
        row = DEFAULT_ROW if release is None else model.row
        return cls(
            place=place if release is not None and model.multimodal else None,
            head=place[1],
            experts=model.experts,
            wrapped=release is not None and release.wraps_experts,
            fused=bool(row.splits),
            inner=row.inner,
            drafts=row.drafts,
            layers=model.layers,
        )

    def of_module(self, name: str) -> tuple[str, ...]:
        """Return the names of a module, each once; the first one is the name that it is delivered under.

        Routed experts, those of draft layers too, have the names of the module of all experts.
        """
        experts = self.all_experts(name)
        names = [experts or name, self._inside(experts or name)]
        if self.drafts and (draft := re.fullmatch(rf"{re.escape(self.drafts)}(\d+)\.(.+)", names[0])):
            names.append(f"{_INNER_PLACE[0]}layers.{self.layers + int(draft[1])}.{draft[2]}")
        names += [re.sub(pattern, replacement, name) for pattern, replacement in self.inner for name in names]
        if experts and self.wrapped:
            names += [f"{name}.backend" for name in names if name.endswith("experts")]
        around, _, leaf = name.rpartition(".")
        if self.fused and leaf in _FIRST_PARTS:
            names.append(f"{self._inside(around)}.{_FIRST_PARTS[leaf]}")
        return tuple(dict.fromkeys(names))

    def all_experts(self, name: str) -> str | None:
        """Return the name of the module of all experts that a module belongs to; None if it is no routed expert."""
        found = re.match(rf"(.+\.{re.escape(self.experts)})(\.|$)", name) if self.experts else None
        return found[1] if found else None

    def _inside(self, name: str) -> str:
        """Return the name of a module inside of the text model; the same name for a module outside of it."""
        if self.place is None:
            return name
        body, head = self.place
        if name == head:
            return _INNER_PLACE[1]
        return _INNER_PLACE[0] + name.removeprefix(body) if name.startswith(body) else name

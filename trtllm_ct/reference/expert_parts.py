"""Collect the tensors of one layer's experts as they arrive, and check that the experts are complete and uniform.

The engine gives all experts of a layer one algorithm (TensorRT-LLM `_torch/models/modeling_utils.py`,
`apply_layerwise_quant_config`), so a layer whose experts have several algorithms is a fault here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trtllm_ct.base.errors import PlanError
from trtllm_ct.reference.experts import SPELLINGS
from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.rules import WIDE_FLOATS, describe, has_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.reference.experts import ExpertsShell

__all__ = ["ExpertParts"]

_PROJECTIONS = frozenset(name for spelling in SPELLINGS for name in spelling)
_MAX_LISTED_NAMES = 4


@dataclass(slots=True, kw_only=True)
class ExpertParts:
    """The tensors that arrived for the experts of one layer.

    `shell` is transformers' experts module, `path` its path in the model, `name` its name in messages. `layer_of`
    returns the quantization of a Linear by its path, None for an unquantized Linear. `dtype` is the dtype of
    unquantized weights. `tensors` holds what arrived, by expert, projection and local name. `stacks` holds plain stacks
    that arrived where the model has a list of experts: `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I].
    """

    path: str
    name: str
    shell: ExpertsShell
    layer_of: Callable[[str], LayerQuantConfig | None]
    dtype: torch.dtype
    quantize_activations: bool
    faults: FaultCollector
    tensors: dict[int, dict[str, dict[str, Tensor]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    stacks: dict[str, Tensor] = field(default_factory=dict)

    def take(self, local: str, tensor: Tensor) -> bool:
        """Store a tensor by its name below `path`, such as `3.gate_proj.weight`.

        Returns False, and stores nothing, if this is not the name of a tensor of an expert.
        """
        expert, _, rest = local.partition(".")
        projection, _, name = rest.partition(".")
        if not expert.isdecimal() or projection not in _PROJECTIONS or not name or "." in name:
            return False
        self.tensors[int(expert)][projection][name] = tensor
        return True

    def has_linear(self, local: str) -> bool:
        """Whether tensors arrived for the Linear with this name below `path`, such as `3.gate_proj`."""
        expert, _, projection = local.partition(".")
        return expert.isdecimal() and projection in self.tensors.get(int(expert), ())

    def split_stacks(self) -> None:
        """Store the experts of `stacks` as single experts."""
        gate, up, down = SPELLINGS[0]
        for local, stack in self.stacks.items():
            for expert, weight in enumerate(stack):
                parts = {down: weight} if local == down else dict(zip((gate, up), weight.chunk(2), strict=True))
                for projection, part in parts.items():
                    self.tensors[expert][projection]["weight"] = part

    def build(self, count: int) -> nn.Module | None:
        """Build the module of all `count` experts.

        Returns None, after adding a fault, if experts are missing, surplus, incomplete or of several algorithms.
        """
        spelling = self._spelling()
        if spelling is None or not self._is_complete(count, spelling) or not self._has_one_mode():
            return None
        return self.shell.rebuilt(
            [
                {projection: self._linear(expert, projection, spelling) for projection in spelling}
                for expert in range(count)
            ]
        )

    def _spelling(self) -> tuple[str, ...] | None:
        """The names of gate, up and down in this layer; None, after adding a fault, if experts use different names."""
        used = {projection for expert in self.tensors.values() for projection in expert}
        for spelling in self.shell.spellings:
            if used <= set(spelling):
                return spelling
        self._fault(
            expected=" or ".join(", ".join(spelling) for spelling in self.shell.spellings),
            found=", ".join(sorted(used)),
            remedy="Name the Linears of all experts in one way.",
        )
        return None

    def _is_complete(self, count: int, spelling: tuple[str, ...]) -> bool:
        """Whether the experts 0 to `count` - 1 have all their Linears, and no other expert has tensors."""
        missing = [
            f"{expert}.{projection}"
            for expert in range(count)
            for projection in spelling
            if not self.tensors.get(expert, {}).get(projection)
        ]
        surplus = [str(expert) for expert in sorted(self.tensors) if expert >= count]
        if missing:
            self._fault(
                expected=f"{count} experts, each with {', '.join(spelling)}",
                found=f"no {_some(missing)}",
                remedy="Check that no shard is missing. Where experts were pruned, the router must lack their rows.",
            )
        if surplus:
            self._fault(
                expected=f"{count} experts, as many as the router has rows",
                found=f"tensors of experts {_some(surplus)} too",
                remedy="Check that config.json and the router belong to these experts.",
            )
        return not missing and not surplus

    def _has_one_mode(self) -> bool:
        """Whether all Linears of all experts have the same quantization; adds a fault if not."""
        first_of_mode: dict[LayerQuantConfig | None, str] = {}
        for expert in sorted(self.tensors):
            for projection in self.tensors[expert]:
                layer = self.layer_of(f"{self.path}.{expert}.{projection}")
                first_of_mode.setdefault(layer, f"{expert}.{projection}")
        if len(first_of_mode) < 2:
            return True
        self._fault(
            expected="one algorithm for all experts of the layer",
            found=", ".join(
                f"{layer.quant_algo if layer else 'none'} for {name}" for layer, name in first_of_mode.items()
            ),
            remedy="Quantize all experts of a layer alike or leave all of them plain: they share one kernel.",
        )
        return False

    def _linear(self, expert: int, projection: str, spelling: tuple[str, ...]) -> nn.Module:
        """Build one Linear of an expert.

        If its tensors don't fit, adds a fault and returns a placeholder: an `nn.Identity` or a Linear without weight.
        """
        outputs, inputs = self.shell.down_shape
        if projection != spelling[-1]:
            outputs, inputs = inputs, outputs
        name = f"{self.name}.{expert}.{projection}"
        tensors, layer = self.tensors[expert][projection], self.layer_of(f"{self.path}.{expert}.{projection}")
        if layer is None:
            return self._plain(name, tensors, outputs, inputs)
        try:
            return ReferenceLinear(
                tensors,
                layer=layer,
                in_features=inputs,
                out_features=outputs,
                quantize_activations=self.quantize_activations,
                name=name,
            )
        except PlanError as error:
            self.faults.faults.extend(error.faults)
            return nn.Identity()

    def _plain(self, name: str, tensors: dict[str, Tensor], outputs: int, inputs: int) -> nn.Module:
        """Build an unquantized Linear; a tensor that is not its weight of the right shape and dtype is a fault."""
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        for local, tensor in tensors.items():
            if local == "weight" and list(tensor.shape) == [outputs, inputs] and has_dtype(tensor, WIDE_FLOATS):
                linear.weight = nn.Parameter(tensor.to(self.dtype), requires_grad=False)
                continue
            self.faults.add(
                where=f"{name}.{local}",
                expected=f"an unquantized weight [{outputs}, {inputs}] alone, because quant_config gives it no mode",
                found=describe(tensor),
                remedy="If experts are quantized, quant_config must say so; if not, config.json is another model's.",
            )
        return linear

    def _fault(self, *, expected: str, found: str, remedy: str) -> None:
        self.faults.add(where=self.name, expected=expected, found=found, remedy=remedy)


def _some(names: Iterable[str]) -> str:
    """The first four names, and the number of the others."""
    names = list(names)
    more = len(names) - _MAX_LISTED_NAMES
    return ", ".join(names[:_MAX_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")

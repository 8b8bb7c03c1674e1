"""Assemble the mixture-of-experts layers of a model: their experts and the number of experts in their routers.

A layer gets its experts one by one, or unquantized as the two stacked tensors that transformers 5 itself uses; the
names of the delivered tensors decide. A layer may have fewer experts than config.json says if its router has as few
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.reference.expert_parts import ExpertParts
from trtllm_ct.reference.experts import ExpertList, experts_shell, is_stack_of_experts
from trtllm_ct.reference.rules import WIDE_FLOATS, describe, has_dtype

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from torch import Tensor, nn

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
    from trtllm_ct.reference.names import NameMap

__all__ = ["Mixtures"]

_STACKS = ("gate_up_proj", "down_proj")
_ROUTERS = ("gate", "router")
# What transformers 5 and 4 call the number of experts and of their groups, in routers and in the blocks around them.
_COUNTS = ("num_experts", "n_routed_experts")
_GROUPS = ("num_group", "n_group")
# Tensors beside the experts that have one entry per expert along their first axis.
_ROUTER_TENSORS = (
    "gate.weight",
    "gate.bias",
    "gate.e_score_correction_bias",
    "router.weight",
    "router.bias",
    "e_score_correction_bias",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixture:
    """One mixture-of-experts layer.

    `config_count` is the number of experts that config.json gives. `parts` collects the tensors of single experts.
    `block` is the path of the module that holds experts and router. `stacks` are the full names of the two stacked
    tensors. `per_expert` are the full names of all tensors with one entry per expert: the stacks and the router's.
    """

    config_count: int
    parts: ExpertParts
    block: str
    stacks: frozenset[str]
    per_expert: frozenset[str]


class Mixtures:
    """All mixture-of-experts layers of `model`; faults are added to `faults`."""

    def __init__(
        self,
        model: nn.Module,
        quant_config: QuantConfig,
        names: NameMap,
        *,
        dtype: torch.dtype,
        quantize_activations: bool,
        faults: FaultCollector,
    ) -> None:
        self._model = model
        self._quant_config = quant_config
        self._faults = faults
        self._reported: set[str] = set()
        self._names = names
        shells = {path: experts_shell(module) for path, module in model.named_modules()}
        self._unsupported = {
            path: type(module).__name__
            for path, module in model.named_modules()
            if is_stack_of_experts(module) and shells[path] is None
        }
        self._mixtures = {
            path: _mixture(
                ExpertParts(
                    path=path,
                    name=names.stored(path),
                    shell=shell,
                    layer_of=self._layer_of,
                    dtype=dtype,
                    quantize_activations=quantize_activations,
                    faults=faults,
                )
            )
            for path, shell in shells.items()
            if shell is not None
        }
        self._routers = {f"{mixture.block}.{name}" for mixture in self._mixtures.values() for name in _ROUTERS}
        self._per_expert = {name for mixture in self._mixtures.values() for name in mixture.per_expert}

    def has(self, module: str) -> bool:
        """Whether `module` is the path of a layer's experts module, or a path two levels below one.

        A Linear of an expert is two levels below: the number of the expert, then the projection.
        """
        known = self._mixtures.keys() | self._unsupported.keys()
        return module in known or module.rsplit(".", 2)[0] in known

    def has_linear(self, module: str) -> bool:
        """Whether `module` is the path of a Linear of a single expert of a layer that `finish` rebuilds."""
        return module.count(".") > 1 and module.rsplit(".", 2)[0] in self._mixtures

    def has_router(self, module: str) -> bool:
        """Whether `module` is the path of a router; transformers 4 has plain Linears there."""
        return module in self._routers

    def take(self, path: str, tensor: Tensor) -> bool:
        """Store a tensor of a single expert, or a stack where the model has a list; return False for any other tensor.

        Adds one fault per layer for single experts of an architecture that supports stacks only.
        """
        owner, _, local = path.rpartition(".")
        mixture = self._mixtures.get(owner)
        if mixture is not None and isinstance(mixture.parts.shell, ExpertList):
            return self._take_stack(mixture.parts, local, tensor)
        experts = path.rsplit(".", 3)[0]
        if experts in self._unsupported:
            self._refuse_once(experts, tensor)
            return True
        return experts in self._mixtures and self._mixtures[experts].parts.take(
            path.removeprefix(f"{experts}."), tensor
        )

    def _take_stack(self, parts: ExpertParts, local: str, tensor: Tensor) -> bool:
        """Store a plain stack as single experts; return False for any other tensor."""
        rows, columns = parts.shell.down_shape
        shape = [2 * columns, rows] if local == "gate_up_proj" else [rows, columns]
        if local not in _STACKS or tensor.dim() != 3 or not has_dtype(tensor, WIDE_FLOATS):
            return False
        if list(tensor.shape[1:]) != shape and f"{parts.path}.{local}".endswith(self._names.transposed):
            tensor = tensor.mT
        if list(tensor.shape[1:]) != shape:
            return False
        parts.stacks[local] = tensor
        return True

    def fits_fewer(self, path: str, tensor: Tensor, slot: Tensor) -> bool:
        """Whether a tensor with one entry per expert has the shape of `slot` except for fewer experts.

        `finish` then checks that all tensors of the layer have the same number of experts.
        """
        if path not in self._per_expert or tensor.dim() != slot.dim() or tensor.shape[1:] != slot.shape[1:]:
            return False
        return 0 < len(tensor) < len(slot)

    def finish(self, filled: Collection[str]) -> set[str]:
        """Put single experts into the model; `filled` are the names of the model's tensors that were delivered.

        Returns the names of the stacked tensors that may stay empty: single experts replace them, or a fault has been
        added for their layer.
        """
        return {name for mixture in self._mixtures.values() for name in self._finish(mixture, filled)}

    def _finish(self, mixture: _Mixture, filled: Collection[str]) -> frozenset[str]:
        """Finish one layer; returns the names of its stacked tensors that may stay empty."""
        parts = mixture.parts
        stacked = mixture.stacks.intersection(filled)
        arrived_stacked = bool(stacked or parts.stacks)
        if bool(parts.tensors) == arrived_stacked:
            self._faults.add(
                where=parts.name,
                expected="experts one by one, or plain in the two stacks gate_up_proj and down_proj",
                found="both" if arrived_stacked else "neither",
                remedy="Check that no shard is missing and that every expert is delivered once.",
            )
            return mixture.stacks
        count = self._count(mixture, filled)
        if count is None:
            return mixture.stacks
        if arrived_stacked and not self._check_plain(parts):
            return mixture.stacks
        if stacked:
            return frozenset()
        parts.split_stacks()
        self._check_entries(parts)
        experts = parts.build(count)
        if experts is not None:
            self._model.set_submodule(parts.path, experts)
        return mixture.stacks

    def _count(self, mixture: _Mixture, filled: Collection[str]) -> int | None:
        """Count the experts of a layer by its tensors with one entry per expert, and set the router to that number.

        Returns None after adding a fault: when the tensors disagree, or when the router can't work with the number.
        """
        parts = mixture.parts
        counts = {name: len(self._tensor(name)) for name in sorted(mixture.per_expert.intersection(filled))}
        counts |= {f"{parts.path}.{local}": len(stack) for local, stack in parts.stacks.items()}
        if len(set(counts.values())) > 1:
            self._faults.add(
                where=parts.name,
                expected="as many experts everywhere in the layer",
                found=", ".join(
                    f"{count} in {name.removeprefix(mixture.block + '.')}" for name, count in counts.items()
                ),
                remedy="Prune router and experts of a layer together.",
            )
            return None
        count = next(iter(counts.values()), mixture.config_count)
        return count if count == mixture.config_count or self._route_to_fewer(mixture, count) else None

    def _route_to_fewer(self, mixture: _Mixture, count: int) -> bool:
        """Set `num_experts` of the modules of a layer to `count`.

        Returns False after adding a fault if the router needs more experts, or if `count` is not a multiple of the
        number of its groups.
        """
        block = self._model.get_submodule(mixture.block)
        modules = (mixture.parts.shell.module, block, *(getattr(block, name, None) for name in _ROUTERS))
        for module in (module for module in modules if module is not None):
            chosen = getattr(module, "top_k", 1)
            groups = next((getattr(module, name) for name in _GROUPS if getattr(module, name, None)), 1)
            if count < chosen or count % groups:
                self._faults.add(
                    where=mixture.parts.name,
                    expected=f"at least {chosen} experts, in {groups} groups of one size",
                    found=f"{count}",
                    remedy="Keep as many experts as the router chooses for a token, and as many in each group.",
                )
                return False
            for name in _COUNTS:
                if hasattr(module, name):
                    setattr(module, name, count)
        return True

    def _tensor(self, name: str) -> Tensor:
        owner, _, local = name.rpartition(".")
        tensor: Tensor = getattr(self._model.get_submodule(owner), local)
        return tensor

    def _entries(self, parts: ExpertParts) -> list[str]:
        """The entries of `quantized_layers` below the experts module of a layer."""
        return [name for name in self._quant_config.quantized_layers if name.startswith(f"{parts.path}.")]

    def _check_entries(self, parts: ExpertParts) -> None:
        """Add a fault for each entry of `quantized_layers` that names a Linear of an expert without tensors."""
        for name in self._entries(parts):
            if not parts.has_linear(name.removeprefix(f"{parts.path}.")):
                self._faults.add(
                    where=f"quantized_layers: {parts.name}{name.removeprefix(parts.path)}",
                    expected="a Linear of an expert, called as its tensors are",
                    found="no tensors of that name",
                    remedy="Check the number of the expert and the spelling of its Linears.",
                )

    def _check_plain(self, parts: ExpertParts) -> bool:
        """Whether `quant_config` calls the experts unquantized that arrived as stacks; adds a fault if not."""
        entries = [parts.path, *self._entries(parts)]
        layer = next((layer for layer in map(self._layer_of, entries) if layer is not None), None)
        if layer is not None:
            self._faults.add(
                where=parts.name,
                expected=f"experts in {layer.quant_algo}, as quant_config says",
                found="plain stacks",
                remedy="List the experts in exclude_modules if they are not quantized.",
            )
        return layer is None

    def _layer_of(self, path: str) -> LayerQuantConfig | None:
        """The quantization of an experts module, or of a Linear of one expert; None for an unquantized one.

        An entry of `quantized_layers` for the experts module applies to all Linears of its experts.
        """
        layer = self._quant_config.layer_config(path)
        if layer is None and path not in self._quant_config.exclude_modules:
            layer = self._quant_config.quantized_layers.get(path.rsplit(".", 2)[0])
        return layer

    def _refuse_once(self, experts: str, tensor: Tensor) -> None:
        """Add a fault for single experts of an unsupported architecture, once per layer."""
        if experts in self._reported:
            return
        self._reported.add(experts)
        self._faults.add(
            where=experts,
            expected=f"the two stacks of {self._unsupported[experts]}, which computes more than gate, up and down",
            found=f"tensors of single experts, such as {describe(tensor)}",
            remedy="The reference engine can't take the experts of this architecture one by one; deliver plain stacks.",
        )


def _mixture(parts: ExpertParts) -> _Mixture:
    block = parts.path.rpartition(".")[0]
    stacks = frozenset(f"{parts.path}.{name}" for name in parts.shell.stacks)
    routers = frozenset(f"{block}.{name}" for name in _ROUTER_TENSORS)
    return _Mixture(
        config_count=parts.shell.count, parts=parts, block=block, stacks=stacks, per_expert=stacks | routers
    )

"""Compare what a plan delivers with what the engine's class reads, by its row.

A class looks for the tensors of the modules that it has built, and no loader misses those that nobody asked for. So a
bias that the class builds no parameter for would silently be left out of the sum, and config.json doesn't decide it:
several classes build attention without biases whatever `attention_bias` says. Others always build a bias, and stop
while they load a model that has none.
Source: TensorRT-LLM `_torch/models/modeling_utils.py: _load_weights_impl_v2` and `_torch/modules/linear.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.engine.model_classes import has_class
from trtllm_ct.plan.models.class_row import ALWAYS, entry_of
from trtllm_ct.plan.models.discovery import head_names_of, is_draft, table_names_of
from trtllm_ct.plan.models.row_defaults import with_row_defaults
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.engine.releases import Release
    from trtllm_ct.plan.models.layer_parts import Part
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["read_problems", "unread_warnings"]

_EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+\.")


def read_problems(
    modules: Iterable[ModulePlan], model: Model, place: tuple[str, str], release: Release | None
) -> tuple[Fault, ...]:
    """Return the faults of biases that the engine's class never reads, and of those that it misses.

    `modules` are what a plan delivers, and `place` is what `Model.place` returns. There are none at targets that no
    engine's class reads (`release` is None), and of a release that lacks the class.
    """
    if release is None or not has_class(release, model.name):
        return ()
    reads = _ClassReads(model, *place)
    unread: list[tuple[str, str]] = []
    missed: list[tuple[str, str]] = []
    for module in modules:
        stored = "bias" in module.views
        # No class decides about the biases of experts by config.json, and a large model has 10^5 experts.
        path = reads.path(module.name) if stored or module.experts is None else None
        if path is None:
            continue
        if stored and not reads.reads_bias(path):
            unread.append((module.name, path))
        elif not stored and module.deliveries and reads.builds_bias(path):
            missed.append((module.name, path))
    return (*_unread_fault(unread, model.name), *_missed_fault(missed, model.name))


def unread_warnings(
    modules: Iterable[ModulePlan], model: Model, place: tuple[str, str], release: Release | None
) -> tuple[str, ...]:
    """Return warnings about delivered tensors of parts that the class doesn't build, and of those that it may not know.

    The latter are tensors of the text model that no part of the class's row has; biases are left to `read_problems`,
    whose arguments these are. A model whose row lists the modules of a layer has no other tensors.
    """
    if model.stated is not None or release is None or not has_class(release, model.name):
        return ()
    reads = _ClassReads(model, *place)
    modules = list(modules)
    unbuilt = reads.unbuilt(module.name for module in modules if module.deliveries)
    names = [
        delivery.name
        for module in modules
        if module.experts is None and module.name not in unbuilt
        for delivery in module.deliveries
        if not delivery.name.endswith(".bias") and not reads.has(delivery.name, quantized=module.weight is not None)
    ]
    texts = []
    if unbuilt:
        parts = " and no ".join(part for part in model.row.unbuilt if any(part in name for name in unbuilt))
        texts.append(
            f"{model.name} of the engine builds no {parts}, and no layer with one: it reads nothing of "
            f"{len(unbuilt)} modules"
        )
    if names:
        texts.append(
            f"{model.name} of the engine is not known to read these, and would drop them unseen: {format_names(names)}"
        )
    return tuple(texts)


@dataclass(frozen=True)
class _ClassReads:
    """What a class reads of the text model whose body is behind `body` and whose head is called `head`."""

    model: Model
    body: str
    head: str

    def path(self, name: str) -> str | None:
        """Return the path of a module or tensor in its layer, or in the body; the head has its name.

        None outside of the text model, and in draft layers.
        """
        if name == self.head or name.startswith(f"{self.head}."):
            return name
        if is_draft(name) or not name.startswith(self.body):
            return None
        layers, _, rest = name[len(self.body) :].partition(".")
        number, _, path = rest.partition(".")
        if layers == "layers" and number.isdecimal():
            return _EXPERT_NUMBER.sub("", path) if int(number) < self.model.layers else None
        path = name[len(self.body) :]
        # Other parts of a wrapper may be behind the same prefix.
        known = not self.model.multimodal or not self._modules.isdisjoint({path, path.rpartition(".")[0]})
        return path if known else None

    def unbuilt(self, names: Iterable[str]) -> dict[str, None]:
        """Return the modules that the class doesn't build, in their order: each by itself, or with its whole layer."""
        names = list(names) if self.model.row.unbuilt else []
        parts = set(self.model.row.unbuilt)
        found = {name for name in names if not parts.isdisjoint(name.split("."))}
        layer = re.compile(rf"{re.escape(self.body)}layers\.\d+\.")
        layers = tuple({match[0] for name in found if (match := layer.match(name))})
        return dict.fromkeys(name for name in names if name in found or name.startswith(layers))

    def builds_bias(self, path: str) -> bool:
        """Whether the class builds a Linear with a bias, by its path in a layer."""
        keys = entry_of(self.model.row.built_biases, path) or ()
        return any(key == ALWAYS or self._text.get(key) for key in keys)

    def reads_bias(self, path: str) -> bool:
        """Whether the class reads a bias: of such a Linear, and of what each of its layers has a bias for."""
        if self.builds_bias(path) or f"{path}.bias" in self._always:
            return True
        row = self.model.row
        return path.startswith(f"{row.experts}.") and any("bias" in part.expert_locals for part in self._parts)

    def has(self, name: str, *, quantized: bool) -> bool:
        """Whether a delivered tensor is of a module of the class, or one of its parameters.

        `quantized` says that the module is; then its tensors depend on its mode.
        """
        path = self.path(name)
        if path is None or name.startswith(f"{self.head}."):
            return True
        around, _, local = path.rpartition(".")
        if path in self._named or around.startswith(self.model.row.experts):
            return True
        return around in self._modules and (quantized or local == "weight" or local in QUANTIZATION_TENSORS)

    @cached_property
    def _text(self) -> dict[str, object]:
        return with_row_defaults(self.model.text, self.model.name)

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        row = self.model.row
        return (row.ends, *(part for choice in row.layer for part in choice))

    @cached_property
    def _always(self) -> frozenset[str]:
        """The tensors that are in a part whatever config.json says."""
        return frozenset(spelling for part in self._parts for name in part.tensors for spelling in name.split("|"))

    @cached_property
    def _named(self) -> frozenset[str]:
        """The tensors that some part has, unless config.json says with a false that the class builds none of them."""
        config = {key: self._text.get(key) is not False for part in self._parts for key in (*part.when, part.key)}
        names = (name for part in self._parts for name in part.names(config))
        return frozenset(spelling for name in names for spelling in name.split("|"))

    @cached_property
    def _modules(self) -> frozenset[str]:
        row = self.model.row
        ends = table_names_of(row) | head_names_of(row)
        return ends | {name.rpartition(".")[0] for name in self._named}


def _unread_fault(unread: list[tuple[str, str]], name: str) -> Iterator[Fault]:
    if unread:
        yield Fault(
            where=_named(unread),
            expected=f"no bias: {name} of the engine builds these modules without one, whatever config.json says",
            found=f"biases of {_paths(unread)}, which nothing would add",
            remedy="Convert with --to dense for a program that adds them.",
        )


def _missed_fault(missed: list[tuple[str, str]], name: str) -> Iterator[Fault]:
    if missed:
        yield Fault(
            where=_named(missed),
            expected=f"a bias: {name} of the engine builds these modules with one",
            found=f"none of {_paths(missed)}",
            remedy="Convert with --to dense for a program that builds the model without them.",
        )


def _named(modules: list[tuple[str, str]]) -> str:
    """Name the bias of the first module, and how many others there are."""
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"{modules[0][0]}.bias{more}"


def _paths(modules: list[tuple[str, str]]) -> str:
    """Name the modules by their paths in a layer, which are few."""
    return ", ".join(dict.fromkeys(path for _, path in modules))

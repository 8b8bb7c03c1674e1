"""Transforms that run with the model: which modules have one, and which stored tensors make it.

compressed-tensors keeps the matrix in a child of the module that it is applied to (`down_proj.R4_input.weight`, and
`.perm` beside it when it is randomized). Modules whose matrices have one name and one size share them, and
`save_pretrained` stores them once, with any of the modules; so a module without its own takes the only one of its kind.
Source: compressed-tensors 0.20 `transform/factory/*.py`, `transform/apply.py`; vLLM 0.33 shares by the same key in
`compressed_tensors/transform/module.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.match import compile_pattern, matches
from trtllm_ct.layouts.folds import Fold
from trtllm_ct.plan.models.sites import name_variants
from trtllm_ct.plan.stored import Shared, StoredModule

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.config.quantization_config import QuantizationConfig, Transform
    from trtllm_ct.plan.models.sites import Model, Site

__all__ = ["OnlineTransforms", "folds_of"]

_LINEAR = "Linear"
_EMBEDDING = "Embedding"
_FOLDED = frozenset({"input", "output"})
_ENDINGS = ("_input", "_output", "_k_cache", "_q_attn")

_Kind = tuple[str, int, bool | None]


def folds_of(transforms: Iterable[Transform], class_name: str) -> tuple[Fold, ...]:
    """What is multiplied onto the weight of a Linear or an embedding, in this order.

    Of several transforms at one side the first one of the configuration is next to the weight: the library's hooks on
    inputs run last registered first, those on outputs in the order of registration.
    """
    linear = class_name == _LINEAR
    return tuple(
        Fold(
            matrix=f"{transform.module}.weight",
            permutation=f"{transform.module}.perm" if transform.permuted else None,
            axis=_axis(transform, class_name),
            # The inverse of a Hadamard matrix is its transpose; that of any other matrix is stored itself.
            transposed=linear != (transform.inverse and transform.hadamard),
            normalized=transform.hadamard,
        )
        for transform in transforms
    )


def _axis(transform: Transform, class_name: str) -> Literal[0, 1]:
    """The axis of the weight that a transform mixes: an embedding's output lies along its columns."""
    return 0 if transform.location == "output" and class_name == _LINEAR else 1


@dataclass(slots=True)
class OnlineTransforms:
    """The transforms of one checkpoint that fold into weights. Those of attention don't and are refused elsewhere."""

    config: QuantizationConfig
    model: Model
    faults: FaultCollector
    _online: list[Transform] = field(init=False)
    _kept: dict[_Kind, list[StoredModule]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._online = [transform for transform in self.config.transforms if transform.location in _FOLDED]

    def attach(self, stored: Mapping[str, StoredModule]) -> dict[str, StoredModule]:
        """The modules, with stored matrices as tensors of the modules that they are applied to.

        Adds a fault for each matrix that the configuration does not name: nothing says what it is for.
        """
        known = {transform.module for transform in self.config.transforms if transform.online}
        children = [name for name in stored if name.endswith(_ENDINGS) and _is_child(name, stored, known)]
        modules = dict(stored)
        for name in children:
            child = modules.pop(name)
            owner, _, leaf = name.rpartition(".")
            if leaf not in known or (owner not in stored and leaf.endswith(tuple(_FOLDED))):
                self._refuse_unnamed(child)
                continue
            self._keep(leaf, child)
            if owner in modules:
                views = {f"{leaf}.{local}": view for local, view in child.views.items()}
                modules[owner] = replace(modules[owner], views={**modules[owner].views, **views})
        return modules

    def claim(self, module: StoredModule, site: Site) -> StoredModule:
        """A module of the text model with its transforms and everything that they need; faults where one won't fold."""
        if not self._online:
            return module
        meant = [each for each in self._online if self._matches(each, module.stored_name, (site.class_name,))]
        self._refuse_unused(module, meant)
        for transform in meant:
            why_not = self._obstacle(transform, module, site)
            if why_not is not None:
                self._refuse(transform, module.stored_name, why_not)
            else:
                module = self._with_transform(module, transform, site)
        return module

    def refuse_on(self, module: StoredModule, *, by_class: bool) -> None:
        """Add a fault for a module outside the text model's layers that has a transform.

        `by_class` says whether a class as target means it too: layers for drafting were never Linears of a model.
        """
        weight = module.specs.get("weight")
        matrix = module.is_quantized or (weight is not None and len(weight.shape) == 2)
        classes = (_LINEAR,) if by_class and matrix else ()
        for transform in self._online:
            if transform.module in _children(module) or self._matches(transform, module.stored_name, classes):
                self._refuse(transform, module.stored_name, "a module outside the text model's layers")

    def check_targets(self, stored: Collection[str], head: str) -> None:
        """Add a fault for each target that may mean something else than a Linear or an embedding.

        `stored` are the names of all modules, `head` is that of the language-model head.
        """
        if not self._online:
            return
        names = {*stored, head}
        containers = {prefix for name in names for prefix in _prefixes(name)} - names
        for transform in self._online:
            for target in transform.targets:
                if not _is_clear(target, names):
                    self._refuse(transform, target, "a target that names no Linear or embedding of this model")
            for name in containers:
                if self._matches(transform, name, ()):
                    self._refuse(transform, name, "a module that is no Linear")
            if self.model.tied and self._matches(transform, head, (_LINEAR,)):
                self._refuse(transform, head, "a head that shares its weight with the embeddings")

    def _keep(self, leaf: str, child: StoredModule) -> None:
        """Note a stored matrix for the modules that share it, unless the configuration uses it in several ways."""
        matrix = child.specs.get("weight")
        if matrix is None or not matrix.shape:
            return
        kinds = {_kind(each, matrix.shape[0]) for each in self.config.transforms if each.module == leaf}
        if len(kinds) == 1:
            self._kept.setdefault(kinds.pop(), []).append(child)

    def _obstacle(self, transform: Transform, module: StoredModule, site: Site) -> str | None:
        """Why a transform does not fold into the weight of the module that it is applied to."""
        if site.class_name not in {_LINEAR, _EMBEDDING}:
            return "a module that is no Linear"
        if site.class_name == _EMBEDDING and transform.location == "input":
            return "a table, whose input is no vector"
        if site.class_name == _EMBEDDING and self.model.tied:
            return "a table that is the weight of the head too"
        if self._may_be_no_linear(transform, module, site):
            return "a plain router or expert, which need not be a Linear; only its class is targeted"
        return None

    def _may_be_no_linear(self, transform: Transform, module: StoredModule, site: Site) -> bool:
        """Routers and plain experts are Linears in some releases of transformers only."""
        experts = self.model.architecture.experts
        if experts is None or module.is_quantized or transform.module in _children(module):
            return False
        unclear = site.expert or site.module.endswith(f".{experts.router.path}")
        return unclear and not self._matches(transform, module.stored_name, ())

    def _matches(self, transform: Transform, name: str, classes: tuple[str, ...]) -> bool:
        names = name_variants(name) if self.model.multimodal else (name,)

        def named_by(entries: Iterable[str]) -> bool:
            return any(matches(variant, entry, classes) for variant in names for entry in entries)

        return named_by(transform.targets) and not named_by(transform.ignore)

    def _with_transform(self, module: StoredModule, transform: Transform, site: Site) -> StoredModule:
        """The module with a transform and its tensors, its own or shared ones; unchanged after a fault."""
        length = site.shape[_axis(transform, site.class_name)]
        size = transform.head_dim or length
        where = module.full_name(f"{transform.module}.weight")
        if length % size:
            self.faults.add(
                where=where,
                expected=f"head_dim that divides {length}",
                found=str(size),
                remedy="transform_config and config.json belong to different models.",
            )
            return module
        if transform.module not in _children(module):
            shared = self._kept.get(_kind(transform, size), [])
            if not _is_one(shared, transform):
                self._refuse_missing(where, transform, size, shared)
                return module
            views = {f"{transform.module}.{local}": Shared.of_view(view) for local, view in shared[0].views.items()}
            module = replace(module, views={**module.views, **views})
        if not self._are_right(module, transform, size):
            return module
        return replace(module, transforms=(*module.transforms, transform))

    def _are_right(self, module: StoredModule, transform: Transform, size: int) -> bool:
        """Whether there is a square matrix of floats, and a permutation exactly where one is due."""
        before = len(self.faults.faults)
        expected: dict[str, tuple[int, ...]] = {f"{transform.module}.weight": (size, size)}
        if transform.permuted:
            expected[f"{transform.module}.perm"] = (size,)
        stored = [local for local in module.specs if local.rpartition(".")[0] == transform.module]
        for local in dict.fromkeys((*expected, *stored)):
            spec, shape = module.specs.get(local), expected.get(local)
            of_numbers = spec is not None and (spec.dtype.is_wide_float or spec == TensorSpec(DType.I64, (size,)))
            if spec is None or shape is None or spec.shape != shape or not of_numbers:
                self.faults.add(
                    where=module.full_name(local),
                    expected=f"{list(shape)} numbers of transform {transform}" if shape else "no such tensor",
                    found=str(spec) if spec else "no such tensor",
                    remedy="transform_config and the tensors belong to different checkpoints; download both again.",
                )
        return len(self.faults.faults) == before

    def _refuse_missing(
        self, where: str, transform: Transform, size: int, candidates: Collection[StoredModule]
    ) -> None:
        self.faults.add(
            where=where,
            expected=f"the matrix [{size}, {size}] of transform {transform}, here or at one module that shares it",
            found=f"{len(candidates)} modules with one of that name and size" if candidates else "no such tensor",
            remedy="Without it the weight is wrong; download the checkpoint again or look for a lost shard.",
        )

    def _refuse(self, transform: Transform, where: str, found: str) -> None:
        self.faults.add(
            where=where,
            expected=f"transform {transform} at a Linear of the text model or behind its embeddings",
            found=found,
            remedy="Without the rotation the model is wrong; quantize again with offline transforms only.",
        )

    def _refuse_unused(self, module: StoredModule, meant: Sequence[Transform]) -> None:
        """Every stored matrix is used, and none by two transforms that mean different ones."""
        names = [transform.module for transform in meant]
        for child in sorted(_children(module) - set(names)):
            self.faults.add(
                where=module.full_name(child),
                expected="a transform that transform_config gives to this module",
                found="a matrix that it says nothing about",
                remedy="Check targets and ignore in transform_config against the tool that wrote the file.",
            )
        for transform in meant:
            if not transform.hadamard and names.count(transform.module) > 1:
                self._refuse(transform, module.full_name(transform.module), "one stored matrix for several transforms")

    def _refuse_unnamed(self, child: StoredModule) -> None:
        self.faults.add(
            where=child.stored_name,
            expected="a transform of this name in transform_config, and the module that it is applied to",
            found=", ".join(f"{local} {spec}" for local, spec in child.specs.items()),
            remedy="Take config.json from where the checkpoint was published: without it the rotation is lost.",
        )


def _is_clear(target: str, names: Collection[str]) -> bool:
    """Whether all that a target can mean is known: a pattern, a class that has a weight, or a module by name."""
    if compile_pattern(target) is not None or target in {_LINEAR, _EMBEDDING}:
        return True
    return any(name in names for name in name_variants(target))


def _is_one(shared: Collection[StoredModule], transform: Transform) -> bool:
    """Whether it is clear which matrix is shared: the only one, or any of those that are not random."""
    same = transform.type == "hadamard" and not transform.randomize
    return len(shared) == 1 or (same and len(shared) > 1)


def _kind(transform: Transform, size: int) -> _Kind:
    """What makes two transforms share a matrix: `inverse` only where the inverse is stored itself."""
    return transform.name, size, None if transform.hadamard else transform.inverse


def _is_child(name: str, stored: Mapping[str, StoredModule], known: Collection[str]) -> bool:
    """Whether a stored module holds a matrix: by the name that the configuration gives it, or below a weight."""
    owner, _, leaf = name.rpartition(".")
    return leaf in known or (owner in stored and stored[owner].has_weight)


def _children(module: StoredModule) -> set[str]:
    """The names of the transforms whose tensors a module holds."""
    return {local.rpartition(".")[0] for local in module.views if "." in local}


def _prefixes(name: str) -> Iterator[str]:
    """The names of the modules that a module lies in."""
    while name := name.rpartition(".")[0]:
        yield name

"""Transforms that run with the model: which modules have one, and which stored tensors it consists of.

compressed-tensors stores the matrix in a child of the module that it is applied to (`down_proj.R4_input.weight`, and
`.perm` beside it when it is randomized). Modules share a matrix if name and size are equal, and `save_pretrained`
stores a shared matrix only once, with any of the modules. So a module without a stored matrix uses the only stored one
with the same name and size.
Source: compressed-tensors 0.20 `transform/factory/*.py`, `transform/apply.py`; vLLM 0.33 shares by the same key in
`compressed_tensors/transform/module.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.lost_remedies import FETCH
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.match import compile_pattern, matches
from trtllm_ct.layouts.folds import Fold
from trtllm_ct.plan.models.places import name_variants
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

_SharingKey = tuple[str, int, bool | None]


def folds_of(transforms: Iterable[Transform], class_name: str) -> tuple[Fold, ...]:
    """Return the matrices to multiply with the weight of a Linear or an embedding, in this order.

    If there are several transforms on one side, the first in the configuration is next to the weight. This is the order
    in which the library's hooks run: on inputs the hook that was registered last runs first, on outputs the hooks run
    in the order of registration.
    """
    linear = class_name == _LINEAR
    return tuple(
        Fold(
            matrix=f"{transform.module}.weight",
            permutation=f"{transform.module}.perm" if transform.permuted else None,
            axis=_axis(transform, class_name),
            # The inverse of a Hadamard matrix is its transpose. For any other matrix the inverse itself is stored.
            transposed=linear != (transform.inverse and transform.hadamard),
            normalized=transform.hadamard,
        )
        for transform in transforms
    )


def _axis(transform: Transform, class_name: str) -> Literal[0, 1]:
    """Return the axis of the weight that a transform mixes; an embedding's output corresponds to its columns."""
    return 0 if transform.location == "output" and class_name == _LINEAR else 1


@dataclass(slots=True)
class OnlineTransforms:
    """The online transforms of one checkpoint that can be folded into weights.

    Transforms inside attention can't be folded and are refused elsewhere (`refuse_unsupported`).
    """

    config: QuantizationConfig
    model: Model
    faults: FaultCollector
    _online: list[Transform] = field(init=False)
    _shared: dict[_SharingKey, list[StoredModule]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._online = [transform for transform in self.config.transforms if transform.location in _FOLDED]

    def attach(self, stored: Mapping[str, StoredModule]) -> dict[str, StoredModule]:
        """Return the modules, with the stored matrices as tensors of the modules that they are applied to.

        Adds a fault for each stored matrix that the configuration does not name.
        """
        known = {transform.module for transform in self.config.transforms if transform.online}
        children = [name for name in stored if name.endswith(_ENDINGS) and _is_child(name, stored, known)]
        modules = dict(stored)
        for name in children:
            child = modules.pop(name)
            parent, _, leaf = name.rpartition(".")
            if leaf not in known or (parent not in stored and leaf.endswith(tuple(_FOLDED))):
                self._refuse_unnamed(child)
                continue
            self._note_shared(leaf, child)
            if parent in modules:
                views = {f"{leaf}.{local}": view for local, view in child.views.items()}
                modules[parent] = replace(modules[parent], views={**modules[parent].views, **views})
        return modules

    def claim(self, module: StoredModule, site: Site) -> StoredModule:
        """Return a module of the text model with its transforms and their tensors.

        Adds a fault for each transform that can't be folded into the weight.
        """
        if not self._online:
            return module
        applied = [
            transform for transform in self._online if self._matches(transform, module.stored_name, (site.class_name,))
        ]
        self._refuse_unused(module, applied)
        for transform in applied:
            obstacle = self._obstacle(transform, module, site)
            if obstacle is not None:
                self._refuse(transform, module.stored_name, obstacle)
            else:
                module = self._with_transform(module, transform, site)
        return module

    def refuse_on(self, module: StoredModule, *, by_class: bool) -> None:
        """Add a fault for each transform of a module that is outside the text model's layers.

        `by_class` says whether targets that name a class apply to the module too. They don't apply to draft layers,
        which were never Linears of the model that was quantized.
        """
        weight = module.specs.get("weight")
        is_matrix = module.is_quantized or (weight is not None and len(weight.shape) == 2)
        classes = (_LINEAR,) if by_class and is_matrix else ()
        for transform in self._online:
            if transform.module in _children(module) or self._matches(transform, module.stored_name, classes):
                self._refuse(transform, module.stored_name, "a module outside the text model's layers")

    def check_targets(self, stored: Collection[str], head: str) -> None:
        """Add a fault for each target that may apply to something else than a Linear or an embedding.

        `stored` are the names of all modules, `head` is the name of the language-model head.
        """
        if not self._online:
            return
        names = {*stored, head}
        containers = {prefix for name in names for prefix in _prefixes(name)} - names
        for transform in self._online:
            for target in transform.targets:
                if not _is_understood(target, names):
                    self._refuse(transform, target, "a target that names no Linear or embedding of this model")
            for name in containers:
                if self._matches(transform, name, ()):
                    self._refuse(transform, name, "a module that is no Linear")
            if self.model.tied and self._matches(transform, head, (_LINEAR,)):
                self._refuse(transform, head, "a head that shares its weight with the embeddings")

    def _note_shared(self, leaf: str, child: StoredModule) -> None:
        """Remember a stored matrix for the modules that may share it.

        A matrix that the configuration uses in several ways is not shared.
        """
        matrix = child.specs.get("weight")
        if matrix is None or not matrix.shape:
            return
        keys = {
            _sharing_key(transform, matrix.shape[0]) for transform in self.config.transforms if transform.module == leaf
        }
        if len(keys) == 1:
            self._shared.setdefault(keys.pop(), []).append(child)

    def _obstacle(self, transform: Transform, module: StoredModule, site: Site) -> str | None:
        """Return why a transform can't be folded into the weight of its module; None if it can."""
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
        """Whether a module may have been no Linear when the model was quantized, and only its class is targeted.

        That holds for routers and plain experts, which are Linears only in some releases of transformers.
        """
        router = self.model.row.router
        if not self.model.experts or module.is_quantized or transform.module in _children(module):
            return False
        unclear = site.expert or (bool(router) and site.module.endswith(f".{router}"))
        return unclear and not self._matches(transform, module.stored_name, ())

    def _matches(self, transform: Transform, name: str, classes: tuple[str, ...]) -> bool:
        """Whether a transform targets a module of this name and these classes, and does not ignore it."""
        names = name_variants(name) if self.model.multimodal else (name,)

        def named_by(entries: Iterable[str]) -> bool:
            return any(matches(variant, entry, classes) for variant in names for entry in entries)

        return named_by(transform.targets) and not named_by(transform.ignore)

    def _with_transform(self, module: StoredModule, transform: Transform, site: Site) -> StoredModule:
        """Return the module with a transform and its tensors, which may be shared; unchanged after a fault."""
        length = site.shape[_axis(transform, site.class_name)]
        size = transform.head_dim or length
        where = module.full_name(f"{transform.module}.weight")
        if length % size:
            self.faults.add(
                where=where,
                expected=f"head_dim that divides {length}",
                found=str(size),
                remedy="Take config.json, with transform_config in it, from where the weights were published.",
            )
            return module
        if transform.module not in _children(module):
            shared = self._shared.get(_sharing_key(transform, size), [])
            if not _is_unambiguous(shared, transform):
                self._refuse_missing(where, transform, size, shared)
                return module
            views = {f"{transform.module}.{local}": Shared.of_view(view) for local, view in shared[0].views.items()}
            module = replace(module, views={**module.views, **views})
        if not self._has_valid_tensors(module, transform, size):
            return module
        return replace(module, transforms=(*module.transforms, transform))

    def _has_valid_tensors(self, module: StoredModule, transform: Transform, size: int) -> bool:
        """Whether a transform has a square matrix, and a permutation exactly if it is permuted; adds faults if not."""
        faults_before = len(self.faults.faults)
        expected: dict[str, tuple[int, ...]] = {f"{transform.module}.weight": (size, size)}
        if transform.permuted:
            expected[f"{transform.module}.perm"] = (size,)
        stored = [local for local in module.specs if local.rpartition(".")[0] == transform.module]
        for local in dict.fromkeys((*expected, *stored)):
            spec, shape = module.specs.get(local), expected.get(local)
            valid_dtype = spec is not None and (spec.dtype.is_wide_float or spec == TensorSpec(DType.I64, (size,)))
            if spec is None or shape is None or spec.shape != shape or not valid_dtype:
                self.faults.add(
                    where=module.full_name(local),
                    expected=f"{list(shape)} numbers of transform {transform}" if shape else "no such tensor",
                    found=str(spec) if spec else "no such tensor",
                    remedy="transform_config and the tensors are of different checkpoints: take both from one place.",
                )
        return len(self.faults.faults) == faults_before

    def _refuse_missing(
        self, where: str, transform: Transform, size: int, candidates: Collection[StoredModule]
    ) -> None:
        self.faults.add(
            where=where,
            expected=f"the matrix [{size}, {size}] of transform {transform}, here or at one module that shares it",
            found=f"{len(candidates)} modules with one of that name and size" if candidates else "no such tensor",
            remedy=f"Without it the weight is wrong. {FETCH}.",
        )

    def _refuse(self, transform: Transform, where: str, found: str) -> None:
        self.faults.add(
            where=where,
            expected=f"transform {transform} at a Linear of the text model or behind its embeddings",
            found=found,
            remedy="Without the rotation the model is wrong; quantize again with offline transforms only.",
        )

    def _refuse_unused(self, module: StoredModule, applied: Sequence[Transform]) -> None:
        """Add a fault for each stored matrix that no transform uses, and for each that several transforms use.

        A Hadamard matrix may be used by several transforms.
        """
        names = [transform.module for transform in applied]
        for child in sorted(_children(module) - set(names)):
            self.faults.add(
                where=module.full_name(child),
                expected="a transform that transform_config gives to this module",
                found="a matrix that it says nothing about",
                remedy="Check targets and ignore in transform_config against the tool that wrote the file.",
            )
        for transform in applied:
            if not transform.hadamard and names.count(transform.module) > 1:
                self._refuse(transform, module.full_name(transform.module), "one stored matrix for several transforms")

    def _refuse_unnamed(self, child: StoredModule) -> None:
        self.faults.add(
            where=child.stored_name,
            expected="a transform of this name in transform_config, and the module that it is applied to",
            found=", ".join(f"{local} {spec}" for local, spec in child.specs.items()),
            remedy="Take config.json from where the checkpoint was published: without it the rotation is lost.",
        )


def _is_understood(target: str, names: Collection[str]) -> bool:
    """Whether it is known which modules a target applies to: it is a pattern, a known class, or a module's name."""
    if compile_pattern(target) is not None or target in {_LINEAR, _EMBEDDING}:
        return True
    return any(name in names for name in name_variants(target))


def _is_unambiguous(shared: Collection[StoredModule], transform: Transform) -> bool:
    """Whether it is clear which of the stored matrices a module shares.

    It is clear if there is exactly one, or if all of them are the same because they are not random.
    """
    all_equal = transform.type == "hadamard" and not transform.randomize
    return len(shared) == 1 or (all_equal and len(shared) > 1)


def _sharing_key(transform: Transform, size: int) -> _SharingKey:
    """Return the key that is equal for transforms that share a matrix.

    `inverse` is a part of it only if the inverse itself is stored, as for all matrices but Hadamard ones.
    """
    return transform.name, size, None if transform.hadamard else transform.inverse


def _is_child(name: str, stored: Mapping[str, StoredModule], known: Collection[str]) -> bool:
    """Whether a stored module holds the matrix of a transform.

    It does if the configuration names it, or if its parent is a module with a weight.
    """
    parent, _, leaf = name.rpartition(".")
    return leaf in known or (parent in stored and stored[parent].has_weight)


def _children(module: StoredModule) -> set[str]:
    """Return the names of the transforms whose tensors a module holds."""
    return {local.rpartition(".")[0] for local in module.views if "." in local}


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of all modules that contain a module, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name

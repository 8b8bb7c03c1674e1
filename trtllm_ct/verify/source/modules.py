"""The modules of a directory by what they mean: one for each projection of each expert, whatever the file has."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CheckpointError, Fault, FaultCollector
from trtllm_ct.verify.source.files import EveryNth, FileTensor, SourceTensor, Transposed
from trtllm_ct.verify.source.names import FUSED_EXPERTS, Names, expert_key
from trtllm_ct.verify.source.sparse import join_pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray

    from trtllm_ct.base.schemes import RowOrder

__all__ = ["WEIGHTS", "Module", "Modules", "read_modules"]

WEIGHTS = frozenset({"weight", "weight_packed"})
"""The names of a weight in all formats, see decoders.py."""

_QUERY_OR_KEY = re.compile(r"(vision_encoder\.)?.*\.attention\.w[qk]")
_ALWAYS_IN_PAIRS = frozenset({"weight", "bias", "qscale_weight"})
# Recomputed from config.json by every reader; what else a rotary embedding has is learned.
_FREQUENCIES = frozenset({"inv_freq", "cos_cached", "sin_cached"})

_Rows = Callable[[int, int], "NDArray[Any]"]


@dataclass(slots=True, kw_only=True)
class Module:
    """The tensors of one module by local name.

    `name` is its name in the files; for a projection in a tensor of all experts, the name that it would have alone.
    `part` of `parts` is its place among projections whose rows lie behind each other in the same tensors.
    The rows of the tensors in `in_pairs` are in Mistral's order, in heads of `head_dim` rows.
    """

    key: str
    name: str
    tensors: dict[str, SourceTensor] = field(default_factory=dict)
    part: int = 0
    parts: int = 1
    head_dim: int = 0
    in_pairs: frozenset[str] = frozenset()

    def ordered(self, local: str, fetch: _Rows, begin: int, end: int) -> NDArray[Any]:
        """Return rows `begin` to `end` of this module; `fetch` returns rows of the tensor as they are stored.

        In Mistral's order the two rows of a rotary pair are neighbours; here all first ones come before all second
        ones.
        """
        if local not in self.in_pairs:
            return fetch(begin, end)
        dim = self.head_dim
        first, last = begin // dim * dim, -(-end // dim) * dim
        stored = fetch(first, last)
        halves = stored.reshape(-1, dim // 2, 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)
        return halves[begin - first : end - first]

    def plain_shape(self, local: str) -> tuple[int, ...]:
        """Return the shape of a plain tensor of this module alone."""
        shape = self.tensors[local].shape
        return (shape[0] // self.parts, *shape[1:]) if shape else shape

    def plain_rows(self, local: str, begin: int, end: int) -> NDArray[Any]:
        """Return rows of a plain tensor of this module, as stored; of a scalar, the tensor."""
        tensor = self.tensors[local]
        if not tensor.shape:
            return tensor.whole()
        first = self.part * self.plain_shape(local)[0]
        return self.ordered(local, lambda b, e: tensor.rows(first + b, first + e), begin, end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """The modules of a directory by key, and the matrices of its online transforms by (stored module, transform)."""

    names: Names
    by_key: Mapping[str, Module]
    matrices: Mapping[tuple[str, str], Mapping[str, SourceTensor]]


def read_modules(
    tensors: Mapping[str, FileTensor],
    names: Names,
    *,
    transforms: Collection[str] = (),
    head_dims: tuple[int, int] = (0, 0),
    declared_rows: RowOrder | None = None,
    unlisted: Collection[str] = (),
) -> Modules:
    """Return the modules of a directory.

    A module whose weight the index lists has nothing of modules of the same meaning whose tensors are all `unlisted`,
    such as an old stack of experts.

    `transforms` are the names of the modules that hold matrices of transforms. `head_dims` are the rows of a head in
    the text model and in the vision tower, and `declared_rows` is the key `qk_rows` of the configuration; both matter
    for Mistral's own form only. Raises `CheckpointError` when two stored modules mean the same one.
    """
    stored: dict[str, dict[str, SourceTensor]] = defaultdict(dict)
    for name, tensor in join_pieces(tensors).items():
        module, _, local = name.rpartition(".")
        stored[module][local] = tensor
    matrices = {
        (module.rpartition(".")[0], module.rpartition(".")[2]): stored.pop(module)
        for module in list(stored)
        if module.rpartition(".")[2] in transforms
    }
    by_key: dict[str, Module] = {}
    faults = FaultCollector()
    old = {name for name, locals_ in stored.items() if all(f"{name}.{local}" in unlisted for local in locals_)}
    for name, locals_ in sorted(stored.items(), key=lambda item: item[0] in old):
        if name.endswith("rotary_emb"):
            locals_ = {local: tensor for local, tensor in locals_.items() if not _is_frequencies(local)}  # noqa: PLW2901
        for found in _split(name, locals_, names) if locals_ else ():
            if names.native:
                _note_order(found, name, locals_, head_dims, declared_rows)
            known = by_key.setdefault(found.key, found)
            if known is not found and not (name in old and not WEIGHTS.isdisjoint(known.tensors)):
                _merge(known, found, faults)
    faults.raise_if_any(CheckpointError)
    ordered = dict(sorted(by_key.items(), key=lambda entry: names.order(entry[0])))
    return Modules(names=names, by_key=ordered, matrices=matrices)


def _is_frequencies(local: str) -> bool:
    """Whether a tensor of a rotary embedding has its frequencies, of all layers or of those of one kind."""
    return local in _FREQUENCIES or local.endswith("_inv_freq")


def _merge(known: Module, module: Module, faults: FaultCollector) -> None:
    """Add the tensors of a stored module to those of another one that means the same."""
    for local in known.tensors.keys() & module.tensors.keys():
        faults.faults.append(
            Fault(
                where=f"{module.name}.{local}",
                expected="one stored tensor of this meaning",
                found=f"{known.name}.{local} too",
                remedy="Remove the files of one of the two, or the tensor that the model does not read.",
            )
        )
    known.tensors |= module.tensors


def _note_order(
    module: Module,
    name: str,
    locals_: Collection[str],
    head_dims: tuple[int, int],
    declared_rows: RowOrder | None,
) -> None:
    """Note which tensors of a query or key module in Mistral's own form are in Mistral's order."""
    match = _QUERY_OR_KEY.fullmatch(name)
    if match is None:
        return
    module.head_dim = head_dims[match[1] is not None]
    mistral = {"weight", "bias"} & set(locals_)
    if "qscale_weight" in locals_:
        mistral.add("weight_scale")
    if declared_rows == "mistral":
        mistral = set(module.tensors)
    module.in_pairs = frozenset(mistral) if module.head_dim else frozenset()


def _split(name: str, tensors: dict[str, SourceTensor], names: Names) -> Iterator[Module]:
    """Yield the module of this name, or those of all experts that its tensors hold."""
    parent, _, leaf = name.rpartition(".")
    beside = names.stack_of(name)
    if name.endswith(".experts"):
        stacks = {local: tensor for local, tensor in tensors.items() if local in FUSED_EXPERTS and _stacked(tensor)}
        inputs_first, turns = names.transposed_experts and not _outputs_first(stacks), names.alternating_experts
        for local, tensor in stacks.items():
            yield from _experts(name, local, {"weight": tensor}, names, inputs_first=inputs_first, turns=turns)
        biases = {f"{local}_bias" for local in stacks} & tensors.keys()
        for local in biases:
            yield from _experts(name, local.removesuffix("_bias"), {"bias": tensors[local]}, names, turns=turns)
        tensors = {local: tensor for local, tensor in tensors.items() if local not in stacks.keys() | biases}
    elif beside is not None and any(map(_stacked, tensors.values())):
        plain = set(tensors) == {"weight"}
        yield from _experts(*beside, tensors, names, inputs_first=plain and names.transposed_experts)
        return
    elif parent.endswith(".experts") and leaf in FUSED_EXPERTS and any(map(_stacked, tensors.values())):
        yield from _experts(parent, leaf, tensors, names)
        return
    if tensors:
        meanings = {names.tensor(name, local, tensors): tensor for local, tensor in tensors.items()}
        yield Module(key=names.key(name), name=name, tensors=meanings)


def _outputs_first(stacks: Mapping[str, SourceTensor]) -> bool:
    """Whether plain stacks are [E, 2I, H] and [E, H, I], as transformers 5 saves them whatever the class reads.

    The other order is [E, H, 2I] and [E, I, H]. No two stacks fit both, even if one of them is square.
    """
    shapes = {FUSED_EXPERTS[local]: tensor.shape[1:] for local, tensor in stacks.items()}
    gate_up, down = shapes.get(("gate", "up")), shapes.get(("down",))
    return gate_up is not None and down is not None and gate_up == (2 * down[1], down[0])


def _stacked(tensor: SourceTensor) -> bool:
    """Whether a tensor has an entry with rows and columns for each expert."""
    return isinstance(tensor, FileTensor) and len(tensor.shape) == 3


def _experts(
    parent: str,
    leaf: str,
    tensors: Mapping[str, SourceTensor],
    names: Names,
    *,
    inputs_first: bool = False,
    turns: bool = False,
) -> Iterator[Module]:
    """Yield a module for each expert and each projection in the tensors of all experts.

    The rows of several projections follow each other, or come in `turns`.
    """
    projections = FUSED_EXPERTS[leaf]
    count = next(tensor.shape[0] for local, tensor in tensors.items() if _stacked(tensor) or local == "bias")
    key = names.key(parent)
    alternating = turns and len(projections) > 1
    for expert in range(count):
        entries = {local: _entry(local, tensor, expert, inputs_first=inputs_first) for local, tensor in tensors.items()}
        for part, projection in enumerate(projections):
            own = {local: EveryNth(matrix=entry, first=part, step=len(projections)) for local, entry in entries.items()}
            yield Module(
                key=expert_key(key, expert, projection),
                name=expert_key(parent, expert, f"{projection}_proj"),
                tensors=dict(own if alternating else entries),
                part=0 if alternating else part,
                parts=1 if alternating else len(projections),
            )


def _entry(local: str, tensor: SourceTensor, expert: int, *, inputs_first: bool) -> SourceTensor:
    """Return the tensor of one expert; the shape of the weight is stored once for all."""
    if local == "weight_shape" or not isinstance(tensor, FileTensor) or not tensor.shape:
        return tensor
    entry = tensor.entry(expert)
    return Transposed(matrix=entry) if inputs_first else entry

"""The stored tensors of a checkpoint, gathered by module, with the quantized weights told from the plain ones.

What a module is gets decided by the tensors that exist; the configuration only gives the parameters. Status fields,
`ignore` and even `targets` disagree with the files often enough.
A module's tensors are views: of a stored tensor as it is, of one expert in a tensor that holds all of them, or of the
pieces of a sparse one. So later stages see every checkpoint in the one shape that most have anyway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.formats import PACKED_CODES, WEIGHT_TENSORS
from trtllm_ct.formats.sparse.pieces import find_sparse, restore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.formats.sparse.pieces import SparseTensor, StoredShapes

__all__ = ["QUANTIZATION_TENSORS", "ExpertSlice", "Shared", "StoredModule", "View", "Whole", "stored_modules"]

_ACTIVATION_AND_CACHE_TENSORS = frozenset(
    f"{tensor}_{parameter}" for tensor in ["input", "output", "q", "k", "v"] for parameter in ("scale", "zero_point")
)
_SPARSE_PIECES = frozenset({"compressed", "bitmask", "row_offsets"})
QUANTIZATION_TENSORS = (
    frozenset(WEIGHT_TENSORS) - {"weight"} | _ACTIVATION_AND_CACHE_TENSORS | _SPARSE_PIECES | {"input_global_scale"}
)
"""Local names that compressed-tensors gives to parameters of quantization or sparsity (0.4 to 0.20)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View(ABC):
    """How a module's tensor is made from stored ones; `spec` is what it looks like to later stages."""

    spec: TensorSpec

    @property
    def stored_bytes(self) -> int:
        """Its share of the bytes in the files."""
        return self.spec.nbytes

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The stored tensors that it needs, by full name."""

    @property
    def offset(self) -> int | None:
        """The element of its one source at which it begins, where it is a run of it; None for anything else."""
        return None

    @property
    def runs(self) -> tuple[Run, ...]:
        """What it needs of its sources."""
        if self.offset is None:
            return tuple(Run(source) for source in self.sources)
        return (Run(self.sources[0], self.offset, self.offset + self.spec.numel),)

    @abstractmethod
    def of(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The tensor; raises `PayloadError` when the stored ones contradict each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole(View):
    """A stored tensor as it is."""

    name: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.name,)

    @property
    def offset(self) -> int:
        """It is all of its source."""
        return 0

    def of(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself."""
        return stored[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlice(View):
    """The part of one expert in a tensor whose first axis is experts; `rows` cuts the second axis where it is given.

    `size` is the number of elements of each expert, `users` how many modules take the same part.
    """

    name: str
    expert: int
    size: int
    rows: tuple[int, int] | None = None
    users: int = 1

    @property
    def stored_bytes(self) -> int:
        """Bytes of the part, divided among its users."""
        return self.spec.nbytes // self.users

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensor of all experts."""
        return (self.name,)

    @property
    def offset(self) -> int:
        """Experts lie one behind the other."""
        per_row = 0 if self.rows is None else self.spec.numel // max(1, self.spec.shape[0])
        return self.expert * self.size + (self.rows[0] * per_row if self.rows else 0)

    def of(self, stored: Mapping[str, Tensor]) -> Tensor:
        """A contiguous view; nothing is copied."""
        part = stored[self.name][self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse(View):
    """A tensor whose values lie packed behind a bitmask; `spec` is that of the dense one."""

    tensor: SparseTensor
    piece_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of the pieces."""
        return self.piece_bytes

    @property
    def sources(self) -> tuple[str, ...]:
        """The pieces."""
        return tuple(self.tensor.parts.values())

    def of(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense tensor, made anew; memory: its size."""
        return restore(self.tensor, {piece: stored[name] for piece, name in self.tensor.parts.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared(View):
    """A tensor that is stored with another module, which shares it; its bytes are counted there."""

    view: View

    @classmethod
    def of_view(cls, view: View) -> Self:
        """What another module has as its own."""
        return cls(spec=view.spec, view=view)

    @property
    def stored_bytes(self) -> int:
        """None here."""
        return 0

    @property
    def sources(self) -> tuple[str, ...]:
        """Those of the other module."""
        return self.view.sources

    @property
    def offset(self) -> int | None:
        """That of the other module's tensor."""
        return self.view.offset

    def of(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The other module's tensor."""
        return self.view.of(stored)


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The tensors of one module by local name.

    `name` is the one that it is delivered under, `stored_name` the one that it has in the files, where that differs.
    `transforms` run beside it; their tensors are the local names with a dot (`R4_input.weight`). `specs` say what the
    tensors look like.
    """

    name: str
    views: Mapping[str, View]
    alias: str | None = None
    transforms: tuple[Transform, ...] = ()
    specs: Mapping[str, TensorSpec] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "specs", {local: view.spec for local, view in self.views.items()})

    @property
    def stored_name(self) -> str:
        """The name in the files, for messages and for matching targets."""
        return self.alias or self.name

    def full_name(self, local: str) -> str:
        """The name of a tensor in the files, for messages."""
        return f"{self.stored_name}.{local}" if self.stored_name else local

    def delivered_as(self, name: str) -> StoredModule:
        """The same module under the name that engines read."""
        return self if name == self.name else replace(self, name=name, alias=self.name)

    @property
    def unnamed(self) -> StoredModule:
        """A module that is stored alike and has no name, so that its tensors are called by their local ones."""
        views = {local: Whole(name=local, spec=spec) for local, spec in self.specs.items()}
        return StoredModule("", views, transforms=self.transforms)

    def delivered_name(self, local: str) -> str:
        """The full name of a delivered tensor."""
        return f"{self.name}.{local}" if self.name else local

    def sources(self, locals_: Iterable[str]) -> tuple[str, ...]:
        """The stored tensors, by full name, that some of the module's tensors are made of."""
        return tuple([source for local in locals_ for source in self.views[local].sources])

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored as codes: packed, or of a dtype that no plain weight has."""
        if not PACKED_CODES.isdisjoint(self.views):
            return True
        weight = self.views.get("weight")
        return weight is not None and not weight.spec.dtype.is_wide_float


def stored_modules(
    catalog: Catalog,
    expected_shape: Callable[[str], tuple[int, ...] | None],
    faults: FaultCollector,
    stored_shapes: StoredShapes | None = None,
) -> dict[str, StoredModule]:
    """The modules of a checkpoint by name, in the order of the catalog.

    `stored_shapes` are the shapes that sparse tensors have by their `shape` pieces; where these were not read,
    `expected_shape` gives that of a tensor by its full name, where the model says it. Contradictions between the
    pieces of a sparse tensor are added to `faults`.
    """
    specs = {name: tensor.spec for name, tensor in catalog.tensors.items()}
    sparse = find_sparse(specs, expected_shape, faults, stored_shapes or {})
    pieces = {piece for tensor in sparse.values() for piece in tensor.parts.values()}
    modules: defaultdict[str, dict[str, View]] = defaultdict(dict)
    for name, spec in specs.items():
        if name not in pieces:
            module, _, local = name.rpartition(".")
            modules[module][local] = Whole(name=name, spec=spec)
    for name, tensor in sparse.items():
        module, _, local = name.rpartition(".")
        piece_bytes = sum(specs[piece].nbytes for piece in tensor.parts.values())
        modules[module][local] = Sparse(spec=tensor.spec, tensor=tensor, piece_bytes=piece_bytes)
    return {module: StoredModule(module, views) for module, views in modules.items()}

"""The stored tensors of a checkpoint, gathered by module; a module knows whether its weight is quantized.

The tensors that exist decide whether a module is quantized; the configuration only gives the parameters. Status fields,
`ignore` and even `targets` often disagree with the files.
A module's tensors are views: of a whole stored tensor, of one expert in a tensor of all experts, or of the pieces of a
sparse tensor. So later stages see every checkpoint in the same form, which is the form that most checkpoints have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.formats import PACKED_CODES, WEIGHT_TENSORS
from trtllm_ct.formats.sparse.pieces import find_sparse, restore
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from typing_extensions import Self

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.formats.sparse.pieces import SparseTensor, StoredShapes
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = [
    "QUANTIZATION_TENSORS",
    "ExpertSlice",
    "Shared",
    "StoredModule",
    "TransposedExpert",
    "View",
    "Whole",
    "stored_modules",
]

ACTIVATION_AND_CACHE_TENSORS = frozenset(
    f"{tensor}_{parameter}" for tensor in ["input", "output", "q", "k", "v"] for parameter in ("scale", "zero_point")
)
_SPARSE_PIECES = frozenset({"compressed", "bitmask", "row_offsets"})
QUANTIZATION_TENSORS = (
    frozenset(WEIGHT_TENSORS) - {"weight"} | ACTIVATION_AND_CACHE_TENSORS | _SPARSE_PIECES | {"input_global_scale"}
)
"""Local names of all tensors that compressed-tensors 0.4 to 0.20 stores for quantization or sparsity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View(ABC):
    """How a module's tensor is made from stored tensors; `spec` is the dtype and shape that later stages see."""

    spec: TensorSpec

    @property
    def stored_bytes(self) -> int:
        """The bytes in the files that count for this view."""
        return self.spec.nbytes

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The full names of the stored tensors that the view is made from."""

    @property
    def offset(self) -> int | None:
        """The first element of the view in its source, if it is one run of one stored tensor; otherwise None."""
        return None

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of the stored tensors that have to be read."""
        if self.offset is None:
            return tuple(Run(source) for source in self.sources)
        return (Run(self.sources[0], self.offset, self.offset + self.spec.numel),)

    @abstractmethod
    def of(self, stored: StoredTensors) -> StoredArray:
        """Return the tensor, given the stored tensors by full name.

        Raises `PayloadError` when the stored tensors contradict each other.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole(View):
    """A whole stored tensor, unchanged; `name` is its full name."""

    name: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The name of the one tensor."""
        return (self.name,)

    @property
    def offset(self) -> int:
        """0: the view begins where the tensor begins."""
        return 0

    def of(self, stored: StoredTensors) -> StoredArray:
        """Return the stored tensor."""
        return stored[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlice(View):
    """The part of one expert in a tensor whose first axis are the experts.

    `rows` (begin, end) selects a range of the second axis, if it is given. `size` is the number of elements of each
    expert. `users` is the number of modules that use the same part.
    """

    name: str
    expert: int
    size: int
    rows: tuple[int, int] | None = None
    users: int = 1

    @property
    def stored_bytes(self) -> int:
        """The bytes of the part, divided by the number of modules that use it."""
        return self.spec.nbytes // self.users

    @property
    def sources(self) -> tuple[str, ...]:
        """The name of the tensor of all experts."""
        return (self.name,)

    @property
    def offset(self) -> int:
        """The first element of the part; the experts are stored one after another."""
        per_row = 0 if self.rows is None else self.spec.numel // max(1, self.spec.shape[0])
        return self.expert * self.size + (self.rows[0] * per_row if self.rows else 0)

    def of(self, stored: StoredTensors) -> StoredArray:
        """Return a contiguous view of the stored tensor; nothing is copied."""
        part = stored[self.name][self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransposedExpert(View):
    """The weight [out, in] of one expert, stored transposed in a tensor [E, in, columns] of all experts.

    `columns` (begin, end) selects the columns that are the rows of the weight.
    """

    name: str
    expert: int
    columns: tuple[int, int]

    @property
    def sources(self) -> tuple[str, ...]:
        """The name of the tensor of all experts."""
        return (self.name,)

    def of(self, stored: StoredTensors) -> StoredArray:
        """Return a contiguous copy of the weight."""
        import numpy as np

        weight = stored[self.name][self.expert, :, self.columns[0] : self.columns[1]]
        return StoredArray(np.ascontiguousarray(weight.elements.T), weight.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse(View):
    """A tensor that is stored sparse, as a bitmask and the values that it selects; `spec` describes the dense tensor.

    `piece_bytes` is the size of all pieces in the files.
    """

    tensor: SparseTensor
    piece_bytes: int

    @property
    def stored_bytes(self) -> int:
        """The bytes of the pieces."""
        return self.piece_bytes

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the pieces."""
        return tuple(self.tensor.parts.values())

    def of(self, stored: StoredTensors) -> StoredArray:
        """Return the dense tensor; memory: its size."""
        return restore(self.tensor, {piece: stored[name] for piece, name in self.tensor.parts.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared(View):
    """A tensor that is stored with another module and shared with it; its bytes are counted there.

    `view` is the other module's view of the tensor.
    """

    view: View

    @classmethod
    def of_view(cls, view: View) -> Self:
        """Return the shared view of a tensor that another module has stored."""
        return cls(spec=view.spec, view=view)

    @property
    def stored_bytes(self) -> int:
        """0: the bytes are counted with the other module."""
        return 0

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the other module's view."""
        return self.view.sources

    @property
    def offset(self) -> int | None:
        """The offset of the other module's view."""
        return self.view.offset

    def of(self, stored: StoredTensors) -> StoredArray:
        """Return the other module's tensor."""
        return self.view.of(stored)


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The tensors of one module by local name.

    The module is delivered under `name`; `alias` is its name in the files if that differs. `transforms` are the online
    transforms that are applied to the module; their tensors have local names with a dot (`R4_input.weight`). `specs`
    has dtype and shape of each tensor.
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
        """The module's name in the files; it is used in messages and to match targets."""
        return self.alias or self.name

    def full_name(self, local: str) -> str:
        """Return the name of a tensor in the files, for messages."""
        return f"{self.stored_name}.{local}" if self.stored_name else local

    def delivered_as(self, name: str) -> StoredModule:
        """Return the module under the name that it is delivered with."""
        return self if name == self.name else replace(self, name=name, alias=self.stored_name)

    @property
    def unnamed(self) -> StoredModule:
        """A module with the same tensor specs and transforms but without a name; tensors are named by local names."""
        views = {local: Whole(name=local, spec=spec) for local, spec in self.specs.items()}
        return StoredModule("", views, transforms=self.transforms)

    def delivered_name(self, local: str) -> str:
        """Return the full name of a delivered tensor."""
        return f"{self.name}.{local}" if self.name else local

    def sources(self, locals_: Iterable[str]) -> tuple[str, ...]:
        """Return the full names of the stored tensors that the given tensors of the module are made from."""
        return tuple([source for local in locals_ for source in self.views[local].sources])

    @property
    def has_weight(self) -> bool:
        """Whether a weight is stored, plain or as codes."""
        return "weight" in self.views or not PACKED_CODES.isdisjoint(self.views)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored as codes: packed, or with a dtype that no plain weight has."""
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
    """Return the modules of a checkpoint by name, in the order of the catalog.

    `stored_shapes` are the shapes that the `shape` pieces of sparse tensors give. For a sparse tensor without one,
    `expected_shape` returns the shape by the tensor's full name, or None if the model doesn't tell it. Contradictions
    between the pieces of a sparse tensor are added to `faults`.
    """
    specs = catalog.specs
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

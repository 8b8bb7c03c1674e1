"""Sparsity as the outermost layer of a file: pieces there, one dense tensor here.

`find_sparse` finds the tensors that are stored in pieces, from headers and the numbers in `shape`; to everything behind
it they are tensors like others, with a name, a dtype and a shape. `restore` makes one of them when it is read.

The pieces are called `<stem>.shape`, `<stem>.compressed`, `<stem>.bitmask` and `<stem>.row_offsets`:

| release     | stem                                                     | which tensors                          |
|-------------|----------------------------------------------------------|----------------------------------------|
| up to 0.8.1 | the name of the tensor (`model.norm.weight`)             | all of them, biases and norms included |
| 0.9 to 0.14 | the name of the module (`...q_proj`), meaning its weight | weights, of targeted modules or of all |

Source: compressed-tensors 0.6 and 0.14 `compressors/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from trtllm_ct.formats.sparse.base import SHAPE_DTYPES, SparseFormat, SparseTensor, refuse_piece
from trtllm_ct.formats.sparse.bitmask import SPARSE_BITMASK
from trtllm_ct.formats.sparse.bitmask_24 import SPARSE_24_BITMASK

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
    from trtllm_ct.formats.base import StoredSpecs

__all__ = [
    "SPARSE_FORMATS",
    "Generation",
    "SparseTensor",
    "StoredShapes",
    "find_sparse",
    "restore",
    "shape_pieces",
    "stem_of",
]

SPARSE_FORMATS: tuple[SparseFormat, ...] = (SPARSE_BITMASK, SPARSE_24_BITMASK)

Generation = Literal["0.4", "0.9"]
"""The first release of each generation of names."""

StoredShapes = Mapping[str, tuple[int, ...]]
"""The numbers in `shape` pieces, by the full names of these."""

_NONE_READ: StoredShapes = MappingProxyType({})
_REQUIRED = ("shape", "compressed", "bitmask")
_PIECES = frozenset({*_REQUIRED, "row_offsets"})
_PARAMETERS = frozenset(
    {
        "weight",
        "bias",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
        "k_scale",
        "v_scale",
    }
)
"""Last components of names by which a tensor is told from a module; those that existed before 0.9."""


def find_sparse(
    names_and_specs: Mapping[str, TensorSpec],
    expected_shape: Callable[[str], tuple[int, ...] | None],
    faults: FaultCollector,
    stored_shapes: StoredShapes = _NONE_READ,
) -> dict[str, SparseTensor]:
    """The tensors that are stored in pieces, by the name of the dense tensor, in the order of the file.

    A bitmask tells the last axis only up to eight. `stored_shapes` say it exactly; where they are silent,
    `expected_shape` is asked by the dense tensor's name. Pieces that contradict each other, or of which some are
    missing, are added to `faults` and are not in the result. `shape` and `compressed` are common words: a tensor of
    such a name is a piece only where there are others of the same stem.
    """
    stems = _stems(names_and_specs)
    # The early releases left no tensor out, so one name of theirs tells how to read all the others.
    names_tensors = any(stem.rpartition(".")[2] in _PARAMETERS for stem in stems)
    found: dict[str, SparseTensor] = {}
    for stem, pieces in stems.items():
        name = stem if names_tensors else f"{stem}.weight"
        if name in names_and_specs:
            remedy = "Files of two checkpoints may lie in one directory: keep those of one of them."
            found_twice = f"it plain and in pieces, as {stem}.compressed"
            faults.add(where=name, expected="it once", found=found_twice, remedy=remedy)
        else:
            said = stored_shapes.get(f"{stem}.shape")
            shape = said or expected_shape(name) or _full(name, pieces)
            sparse = _describe(stem, name, pieces, shape, faults)
            if sparse is not None and said in (None, sparse.spec.shape):
                found[name] = sparse
            elif sparse is not None:
                made = f"{list(sparse.spec.shape)}, which the other pieces make"
                refuse_piece(f"{stem}.shape", made, list(said or ()), faults)
    return found


def shape_pieces(names_and_specs: Mapping[str, TensorSpec]) -> list[str]:
    """The `shape` pieces that can be read: a number for each axis of the bitmask beside it."""
    return [
        name
        for name, spec in names_and_specs.items()
        if name.endswith(".shape")
        and (bitmask := names_and_specs.get(f"{name.removesuffix('.shape')}.bitmask")) is not None
        and spec.dtype in SHAPE_DTYPES
        and spec.numel == len(bitmask.shape)
    ]


def restore(sparse: SparseTensor, pieces: Mapping[str, Tensor]) -> Tensor:
    """The dense tensor of `sparse.spec`, contiguous; `pieces` by their local names (`compressed`, ...).

    Bits are moved, never values. Memory beside the result is one tile. Raises `PayloadError` when there are not as many
    values as marks, a mark lies beyond the last column, `shape` is not that of the spec, row offsets disagree with the
    marks, or a group of a 2:4 tensor does not have two of them.
    """
    return _sparse_format(sparse.kind).decode(sparse, pieces)


def _sparse_format(kind: CompressionFormat) -> SparseFormat:
    """The entry of the table of that name."""
    return next(entry for entry in SPARSE_FORMATS if entry.name is kind)


def stem_of(name: str, generation: Generation) -> str:
    """What the names of the pieces of a tensor begin with: the inverse of the rule of `find_sparse`."""
    return name.removesuffix(".weight") if generation == "0.9" else name


def _stems(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """The pieces by stem and local name, where a stem has more than one of them."""
    gathered: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        stem, _, local = name.rpartition(".")
        if stem and local in _PIECES:
            gathered.setdefault(stem, {})[local] = spec
    return {stem: pieces for stem, pieces in gathered.items() if len(pieces) > 1}


def _full(name: str, pieces: StoredSpecs) -> tuple[int, ...] | None:
    """The shape of a parameter of quantization, which no model knows: unlike weights, most of its values are not 0."""
    if name.rpartition(".")[2] in {"weight", "bias"} or not {"bitmask", "compressed"} <= pieces.keys():
        return None
    rows, values = pieces["bitmask"].shape[:-1], pieces["compressed"].numel
    return (*rows, max(1, -(-values // prod(rows)))) if prod(rows) else None


def _describe(
    stem: str, name: str, pieces: StoredSpecs, expected_shape: tuple[int, ...] | None, faults: FaultCollector
) -> SparseTensor | None:
    """The tensor that pieces make; None, with faults added, when they make none."""
    missing = [piece for piece in _REQUIRED if piece not in pieces]
    if missing:
        refuse_piece(f"{stem}.{missing[0]}", f"a tensor beside {stem}.{next(iter(pieces))}", "none", faults)
        return None
    entry = next((entry for entry in SPARSE_FORMATS if entry.accepts(pieces)), None)
    if entry is None:
        refuse_piece(f"{stem}.compressed", "values in one or two dimensions", pieces["compressed"], faults)
        return None
    spec = entry.describe(stem, pieces, expected_shape, faults)
    parts = {piece: f"{stem}.{piece}" for piece in pieces}
    return SparseTensor(name=name, spec=spec, kind=entry.name, parts=parts) if spec is not None else None

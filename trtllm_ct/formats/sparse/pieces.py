"""Sparsity as the outermost layer of a file: finds the pieces of sparse tensors, and restores the dense tensors.

`find_sparse` finds the tensors that are stored in pieces, from headers and the numbers in `shape`. All later stages see
them as ordinary tensors with a name, a dtype and a shape. `restore` makes a dense tensor from its pieces when it is
read.

The pieces are called `<stem>.shape`, `<stem>.compressed`, `<stem>.bitmask` and `<stem>.row_offsets`:

| release     | stem                                           | tensors stored in pieces                       |
|-------------|------------------------------------------------|------------------------------------------------|
| up to 0.8.1 | the name of the tensor (`model.norm.weight`)   | all, biases and norms included                 |
| 0.9 to 0.14 | the module of the weight (`...q_proj`)         | weights, of targeted modules or of all         |

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

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
    from trtllm_ct.formats.base import StoredSpecs
    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors

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
"""The generations of names of pieces, each given by the first release that used it."""

StoredShapes = Mapping[str, tuple[int, ...]]
"""The numbers in `shape` pieces, by the full name of the piece."""

_NO_SHAPES: StoredShapes = MappingProxyType({})
_REQUIRED = ("shape", "compressed", "bitmask")
_ENDINGS = tuple(f".{piece}" for piece in (*_REQUIRED, "row_offsets"))
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
"""Last components of names that show that a stem is the name of a tensor, not of a module; all existed before 0.9."""


def find_sparse(
    names_and_specs: Mapping[str, TensorSpec],
    expected_shape: Callable[[str], tuple[int, ...] | None],
    faults: FaultCollector,
    stored_shapes: StoredShapes = _NO_SHAPES,
) -> dict[str, SparseTensor]:
    """Return the tensors that are stored in pieces, by the name of the dense tensor, in the order of the file.

    A bitmask gives the number of columns only up to a multiple of eight. `stored_shapes` gives it exactly; if it has no
    entry, `expected_shape` is called with the name of the dense tensor. For pieces that are incomplete or contradict
    each other, a fault is added and the tensor is left out of the result. `shape` and `compressed` are common words: a
    tensor with such a name counts as a piece only if another piece has the same stem.
    """
    stems = _stems(names_and_specs)
    # Releases before 0.9 stored every tensor in pieces, so one tensor name among the stems shows that all are.
    stems_are_tensor_names = any(stem.rpartition(".")[2] in _PARAMETERS for stem in stems)
    sparse_tensors: dict[str, SparseTensor] = {}
    for stem, pieces in stems.items():
        name = stem if stems_are_tensor_names else f"{stem}.weight"
        if name in names_and_specs:
            remedy = (
                "One of them is left over. List only the right one in model.safetensors.index.json, which may be added "
                "to a single file; then the other one is not read."
            )
            duplicate = f"it plain and in pieces, as {stem}.compressed"
            faults.add(where=name, expected="it once", found=duplicate, remedy=remedy)
        else:
            stored_shape = stored_shapes.get(f"{stem}.shape")
            shape = stored_shape or expected_shape(name) or _quantization_parameter_shape(name, pieces)
            sparse = _describe(stem, pieces, shape, faults)
            if sparse is not None and stored_shape in (None, sparse.spec.shape):
                sparse_tensors[name] = sparse
            elif sparse is not None:
                expected = f"{list(sparse.spec.shape)}, which the other pieces make"
                refuse_piece(f"{stem}.shape", expected, list(stored_shape or ()), faults)
    return sparse_tensors


def shape_pieces(names_and_specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names of the `shape` pieces that can be read: those with one integer per axis of their bitmask."""
    return [
        name
        for name, spec in names_and_specs.items()
        if name.endswith(".shape")
        and (bitmask := names_and_specs.get(f"{name.removesuffix('.shape')}.bitmask")) is not None
        and spec.dtype in SHAPE_DTYPES
        and spec.numel == len(bitmask.shape)
    ]


def restore(sparse: SparseTensor, pieces: StoredTensors) -> StoredArray:
    """Return the contiguous dense tensor of `sparse.spec`; `pieces` are given by local name (`compressed`, ...).

    The function copies bits, so every NaN keeps its payload. Memory beside the result is one tile.

    Raises `PayloadError` if the number of values differs from the number of marks (set bits of the bitmask), a mark
    lies beyond the last column, the `shape` piece differs from the shape of the spec, row offsets disagree with the
    marks, or four columns of a 2:4 tensor do not have exactly two marks.
    """
    return _sparse_format(sparse.kind).decode(sparse, pieces)


def _sparse_format(kind: CompressionFormat) -> SparseFormat:
    """Return the entry of `SPARSE_FORMATS` of that name."""
    return next(entry for entry in SPARSE_FORMATS if entry.name is kind)


def stem_of(name: str, generation: Generation) -> str:
    """Return the stem of the pieces of a tensor: the inverse of the rule by which `find_sparse` names tensors."""
    return name.removesuffix(".weight") if generation == "0.9" else name


def _stems(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Return the pieces by stem and local name; a stem with only one piece is left out."""
    pieces_by_stem: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        if not name.endswith(_ENDINGS):
            continue
        stem, _, local = name.rpartition(".")
        if stem:
            pieces_by_stem.setdefault(stem, {})[local] = spec
    return {stem: pieces for stem, pieces in pieces_by_stem.items() if len(pieces) > 1}


def _quantization_parameter_shape(name: str, pieces: StoredSpecs) -> tuple[int, ...] | None:
    """Return the shape of a quantization parameter, such as a scale, as its number of values suggests.

    The model does not give this shape. Unlike in a weight, most values of such a parameter are not zero, so the number
    of stored values per row is a good estimate of the number of columns. Returns None for weights and biases.
    """
    if name.rpartition(".")[2] in {"weight", "bias"} or not {"bitmask", "compressed"} <= pieces.keys():
        return None
    rows, values = pieces["bitmask"].shape[:-1], pieces["compressed"].numel
    return (*rows, max(1, -(-values // prod(rows)))) if prod(rows) else None


def _describe(
    stem: str, pieces: StoredSpecs, expected_shape: tuple[int, ...] | None, faults: FaultCollector
) -> SparseTensor | None:
    """Return the sparse tensor of these pieces; None, with faults added, if they are incomplete or contradictory."""
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
    return SparseTensor(spec=spec, kind=entry.name, parts=parts) if spec is not None else None

"""Sparse files without a model: `save_compressed` and `load_compressed`.

compressed-tensors had two functions of these names up to 0.15 and dropped the sparse formats with them. Here they live
on, for tensors and files alone: no configuration is read or written. Quantized weights stay what they are, codes
beside scales; quantizing is llm-compressor's job, and dequantizing that of `convert_checkpoint`.
Source: compressed-tensors 0.4 to 0.15 `compressors/helpers.py`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector, UsageError
from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.header import METADATA_KEY, read_header
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.checkpoint.writer import ShardedWriter
from trtllm_ct.formats.sparse.pieces import SPARSE_FORMATS, Generation, SparseTensor, find_sparse, restore, stem_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from os import PathLike

    from torch import Tensor

    from trtllm_ct.formats.sparse.base import SparseFormat

__all__ = ["load_compressed", "save_compressed"]

_FORMATS = (CompressionFormat.DENSE, *(entry.name for entry in SPARSE_FORMATS))
_GENERATIONS = ("0.4", "0.9")


def save_compressed(
    tensors: Mapping[str, Tensor],
    path: str | PathLike[str],
    format: str = CompressionFormat.DENSE,  # noqa: A002 (the name that configurations give it)
    *,
    generation: Generation = "0.9",
) -> None:
    """Write tensors by name to one safetensors file, those that the format suits without their zeros.

    `format` is `dense`, `sparse-bitmask` or `sparse-24-bitmask`. `generation` is the first release whose names are
    used: since 0.9 weights are stored as `<module>.compressed` and so on, and all other tensors plain; 0.4 to 0.8
    store every tensor, as `<tensor>.compressed`. `sparse-24-bitmask` exists since 0.9.

    Every value is kept, but a minus zero becomes zero: a scalar, or with `sparse-24-bitmask` a weight with more than
    two values in four columns, is stored plain. The file appears at once when it is complete and replaces one of that
    name. Memory: the compressed tensors. Raises `UsageError` when there are no tensors, for an unknown format or
    generation, for a dtype that safetensors lacks, for names that clash or that reading would change, and when `path`
    can't be written.
    """
    path = Path(path)
    entry = _chosen(format, generation)
    if not tensors:
        raise _refusal("tensors", "at least one tensor", "none", "Give tensors by name, such as a state dict.")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        pieces = _pieces(name, tensor.detach().cpu().contiguous(), entry, generation)
        clash = min(stored.keys() & pieces.keys(), default=None)
        if clash is not None:
            raise _refusal(clash, "each name once", f"it a second time, for {name}", "Rename one of the tensors.")
        stored |= pieces
    specs = {name: _spec(name, tensor) for name, tensor in stored.items()}
    _require_names(tensors, specs)
    try:
        _write(path, specs, stored)
    except OSError as error:
        remedy = "Choose a file in a directory that exists and that you can write to."
        raise _refusal(str(path), "a place for a file", f"{error.strerror or error}".lower(), remedy) from None


def load_compressed(path: str | PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the (name, dense tensor) pairs of a safetensors file or of a checkpoint directory.

    Tensors that are stored in pieces, by either generation of names, come first, whole and under their own names; then
    the others as they are stored. Formats are told from the tensors themselves. Memory: one tensor; those that need no
    change are views of the mapped file. Raises `CatalogError` at once for files or pieces that are missing or
    damaged, `PayloadError` on the way for pieces whose values contradict each other.
    """
    catalog = _catalog(Path(path))
    reader = TensorReader(catalog)
    specs = {name: tensor.spec for name, tensor in catalog.tensors.items()}
    faults = FaultCollector()
    sparse = find_sparse(specs, _stored_shapes(reader, specs), faults)
    faults.raise_if_any(CatalogError)
    return _dense_tensors(reader, specs, sparse)


def _chosen(format: str, generation: str) -> SparseFormat | None:  # noqa: A002
    """The entry of the table; None for dense."""
    if format not in _FORMATS:
        remedy = f"Choose one of {', '.join(_FORMATS)}; quantized formats are written by llm-compressor."
        raise _refusal("format", "a format without arguments", repr(str(format)), remedy)
    if generation not in _GENERATIONS:
        remedy = "Leave it out for the names that current files have."
        raise _refusal("generation", " or ".join(_GENERATIONS), repr(generation), remedy)
    if format == CompressionFormat.SPARSE_24_BITMASK and generation == "0.4":
        raise _refusal("generation", "0.9 for sparse-24-bitmask", "0.4", "That format did not exist before 0.9.")
    return next((entry for entry in SPARSE_FORMATS if entry.name == format), None)


def _pieces(name: str, tensor: Tensor, entry: SparseFormat | None, generation: Generation) -> dict[str, Tensor]:
    """What a tensor is stored as: its pieces, or itself."""
    meant = generation == "0.4" or name.endswith(".weight")
    if entry is None or not meant or not entry.holds(tensor):
        return {name: tensor}
    stem = stem_of(name, generation)
    return {f"{stem}.{piece}": part for piece, part in entry.encode(tensor).items()}


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    if name == METADATA_KEY:
        raise _refusal(name, "a name for a tensor", "the one that safetensors reserves", "Rename the tensor.")
    try:
        return TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape))
    except KeyError:
        remedy = "Save it in another dtype."
        raise _refusal(name, "a dtype that safetensors has", str(tensor.dtype), remedy) from None


def _require_names(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Raise where names of pieces say something else than they should: early names look like late ones and back."""
    found = find_sparse(specs, lambda name: tuple(tensors[name].shape) if name in tensors else None, FaultCollector())
    for name in tensors:
        if name not in specs and name not in found:
            remedy = "Rename it, or save it with the other generation of names."
            raise _refusal(name, "a name that reading gives back", "one that early or late names can't tell", remedy)


def _write(path: Path, specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """One file under a temporary name, then the name it is meant to have."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as partial:
        with ShardedWriter(Path(partial), specs, max_shard_bytes=sys.maxsize) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            (file,) = writer.finish()
        (Path(partial) / file).replace(path)


def _catalog(path: Path) -> Catalog:
    """The catalog of a directory, or of one file as if it were alone in its directory."""
    if path.is_dir():
        return Catalog.from_directory(path)
    try:
        header = read_header(path, path.name)
    except OSError as error:
        remedy = "Give a safetensors file, or the directory of a checkpoint."
        found = f"{error.strerror or error}".lower()
        raise CatalogError(Fault(where=str(path), expected="a readable file", found=found, remedy=remedy)) from None
    return Catalog(directory=path.parent, tensors=header.tensors, files=(path.name,))


def _stored_shapes(reader: TensorReader, specs: Mapping[str, TensorSpec]) -> Callable[[str], tuple[int, ...] | None]:
    """What the `shape` piece of a tensor says: without a model's configuration nothing else knows the columns."""

    def shape_of(name: str) -> tuple[int, ...] | None:
        for stem in (name, name.removesuffix(".weight")):
            spec = specs.get(f"{stem}.shape")
            if spec is not None and spec.dtype is DType.I64:
                return tuple(reader.read(f"{stem}.shape").flatten().tolist())
        return None

    return shape_of


def _dense_tensors(
    reader: TensorReader, specs: Mapping[str, TensorSpec], sparse: Mapping[str, SparseTensor]
) -> Iterator[tuple[str, Tensor]]:
    parts = {part for tensor in sparse.values() for part in tensor.parts.values()}
    with reader:
        for name, tensor in sparse.items():
            yield name, restore(tensor, {piece: reader.read(part) for piece, part in tensor.parts.items()})
        for name in specs:
            if name not in parts:
                yield name, reader.read(name)


def _refusal(where: str, expected: str, found: str, remedy: str) -> UsageError:
    return UsageError(Fault(where=where, expected=expected, found=found, remedy=remedy))

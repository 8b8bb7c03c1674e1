"""`save_compressed` and `load_compressed`: write and read sparse safetensors files without a model.

compressed-tensors had these functions up to 0.14, with the arguments that they have here, and then dropped them
together with the sparse formats: those of 0.15 raise `NotImplementedError`. The functions in this module only deal with
tensors and files: they read and write no configuration. They leave quantized weights as codes and scales. Use
llm-compressor to quantize, and `convert_checkpoint` to dequantize.
Source: compressed-tensors 0.4 to 0.14 `compressors/helpers.py`, and `config/sparse_bitmask.py` for `BitmaskConfig`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector, UsageError
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.base.schemes import CompressionFormat
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.header import METADATA_KEY, read_header
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.checkpoint.writer import ShardedWriter
from trtllm_ct.formats.sparse.base import SHAPE_DTYPES
from trtllm_ct.formats.sparse.pieces import SPARSE_FORMATS, Generation, SparseTensor, find_sparse, restore, stem_of
from trtllm_ct.layouts.torch_tensors import array_of, is_tensor, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike

    from torch import Tensor, nn

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.formats.sparse.base import SparseFormat
    from trtllm_ct.layouts.stored_array import StoredArray

__all__ = ["BitmaskConfig", "load_compressed", "save_compressed", "save_compressed_model"]

_FORMATS = (CompressionFormat.DENSE, *(entry.name for entry in SPARSE_FORMATS))
_GENERATIONS = ("0.4", "0.9")


class _NamesFormat(Protocol):
    """A configuration that names a sparse format, such as `BitmaskConfig` or a class of the library."""

    @property
    def format(self) -> str:
        """The name of the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmaskConfig:
    """The `sparsity_config` of format `sparse-bitmask`, as compressed-tensors 0.4 to 0.14 had it.

    Only `format` matters to the functions of this module. `targets` and `ignore` are names of modules or of their
    classes, `global_sparsity` the average share of zeros, and `sparsity_structure` their pattern.
    """

    format: str = CompressionFormat.SPARSE_BITMASK.value
    targets: list[str] | None = None
    ignore: list[str] | None = None
    global_sparsity: float | None = 0.0
    sparsity_structure: str | None = "unstructured"


@missing_packages_as_errors()
def save_compressed(
    tensors: Mapping[str, Tensor],
    path: str | PathLike[str],
    compression_format: str | None = None,
    *,
    format: str | None = None,  # noqa: A002 (the name that configurations give it)
    generation: Generation = "0.9",
) -> None:
    """Write tensors, given by name, to one safetensors file in a sparse format.

    `compression_format` is `dense`, `sparse-bitmask` or `sparse-24-bitmask`, and None means `dense`; `format` is
    another name of this argument. `generation` selects the names of the stored pieces by the first release that used
    them. With "0.9", weights are stored as `<module>.compressed` and so on, and all other tensors are stored plain.
    With "0.4" (releases 0.4 to 0.8), every tensor is stored as `<tensor>.compressed` and so on. `sparse-24-bitmask`
    exists since 0.9.

    Every value is kept, except that minus zero becomes zero. A tensor that the format can't store is stored plain: a
    scalar, or with `sparse-24-bitmask` a weight that is not a matrix with at most two nonzero values in each four
    columns. The file is written under a temporary name and renamed when it is complete; it replaces an existing file.
    Memory: the compressed tensors.

    Raises `UsageError` if there are no tensors or something else among them, for an unknown format or generation, for a
    dtype that safetensors does not have, for names that clash or that `load_compressed` would not give back, and if
    `path` can't be written.
    """
    path = path_of("path", path)
    entry = _sparse_format(_one_format(compression_format, format), generation)
    _require_tensors(tensors)
    stored: dict[str, StoredArray] = {}
    for name, tensor in tensors.items():
        pieces = _pieces(name, _array(name, tensor), entry, generation)
        clash = min(stored.keys() & pieces.keys(), default=None)
        if clash is not None:
            raise _usage_error(clash, "each name once", f"it a second time, for {name}", "Rename one of the tensors.")
        stored |= pieces
    if METADATA_KEY in stored:
        found = "the one that safetensors reserves"
        raise _usage_error(METADATA_KEY, "a name for a tensor", found, "Rename the tensor.")
    specs = {name: tensor.spec for name, tensor in stored.items()}
    _require_names(tensors, specs)
    try:
        _write(path, specs, stored)
    except OSError as error:
        remedy = "Choose a file in a directory that exists and that you can write to."
        raise _usage_error(str(path), "a place for a file", f"{error.strerror or error}".lower(), remedy) from None


def save_compressed_model(model: nn.Module, path: str | PathLike[str], compression_format: str | None = None) -> None:
    """Write the state dict of a model with `save_compressed`, which see; a tensor with two names is stored twice."""
    if not hasattr(model, "state_dict"):
        remedy = "Give tensors by name to save_compressed."
        raise _usage_error("model", "a module of torch, with a state dict", type(model).__name__, remedy)
    save_compressed(model.state_dict(), path, compression_format)


@missing_packages_as_errors()
def load_compressed(
    path: str | PathLike[str], compression_config: _NamesFormat | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the (name, dense tensor) pairs of a safetensors file or a checkpoint directory.

    Tensors that are stored in pieces come first, under the names of the dense tensors; then all other tensors follow
    as they are stored. The tensors themselves show the sparse format and the generation of names, so
    `compression_config` may be left out; if it is given, the sparse tensors must have its format. Memory: one tensor;
    tensors that are stored plain are views of the memory-mapped file.

    Raises immediately `CatalogError` for files or pieces that are missing or damaged, and `UsageError` for tensors in
    another format than that of `compression_config`; `PayloadError` during the iteration for pieces whose values
    contradict each other.
    """
    catalog = _open_catalog(path_of("path", path))
    reader = TensorReader(catalog)
    specs = {name: tensor.spec for name, tensor in catalog.tensors.items()}
    faults = FaultCollector()
    sparse = find_sparse(specs, _stored_shapes(reader, specs), faults)
    faults.raise_if_any(CatalogError)
    if compression_config is not None:
        if not hasattr(compression_config, "format"):
            remedy = "Leave it out: the files show how they are stored."
            found = repr(compression_config)
            raise _usage_error("compression_config", "a configuration, such as BitmaskConfig()", found, remedy)
        _require_format(compression_config.format, sparse)
    return _dense_tensors(reader, specs, sparse)


def _one_format(compression_format: str | None, other: str | None) -> str:
    """Return the format that the two names of one argument give. Raises `UsageError` if they contradict each other."""
    if None not in (compression_format, other) and compression_format != other:
        remedy = "Give one of the two arguments."
        raise _usage_error("format", f"{compression_format!r}, as compression_format", repr(other), remedy)
    return compression_format or other or CompressionFormat.DENSE


def _require_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise `UsageError` if there are no tensors, or something else among them, as the extra state of a module is."""
    remedy = "Give tensors by name, such as a state dict."
    if not isinstance(tensors, Mapping):
        raise _usage_error("tensors", "tensors by name", type(tensors).__name__, remedy)
    if not tensors:
        raise _usage_error("tensors", "at least one tensor", "none", remedy)
    for name, tensor in tensors.items():
        if not is_tensor(tensor):
            raise _usage_error(name, "a tensor", type(tensor).__name__, remedy)


def _require_format(format: str, sparse: Mapping[str, SparseTensor]) -> None:  # noqa: A002
    """Raise `UsageError` for an unknown format, and for a tensor that is stored sparse in another one."""
    where, remedy = "compression_config", "Leave it out: the files show how they are stored."
    if format not in _FORMATS:
        raise _usage_error(where, f"format {' or '.join(_FORMATS)}", repr(str(format)), remedy)
    other = next(((name, tensor.kind) for name, tensor in sparse.items() if tensor.kind != format), None)
    if other is not None:
        name, kind = other
        raise _usage_error(where, f"format {str(kind)!r}, as which {name} is stored", repr(str(format)), remedy)


def _sparse_format(format: str, generation: str) -> SparseFormat | None:  # noqa: A002
    """Return the sparse format of that name, or None for `dense`.

    Raises `UsageError` for an unknown format or generation, and for `sparse-24-bitmask` with names of 0.4.
    """
    if format not in _FORMATS:
        remedy = f"Choose one of {', '.join(_FORMATS)}; quantized formats are written by llm-compressor."
        raise _usage_error("format", "a format without arguments", repr(str(format)), remedy)
    if generation not in _GENERATIONS:
        remedy = "Leave it out for the names that current files have."
        raise _usage_error("generation", " or ".join(_GENERATIONS), repr(generation), remedy)
    if format == CompressionFormat.SPARSE_24_BITMASK and generation == "0.4":
        raise _usage_error("generation", "0.9 for sparse-24-bitmask", "0.4", "That format did not exist before 0.9.")
    return next((entry for entry in SPARSE_FORMATS if entry.name == format), None)


def _pieces(
    name: str, tensor: StoredArray, entry: SparseFormat | None, generation: Generation
) -> dict[str, StoredArray]:
    """Return what is stored for one tensor, by full name: its pieces, or the tensor itself if it is stored plain."""
    is_candidate = generation == "0.4" or name.endswith(".weight")
    if entry is None or not is_candidate or not entry.holds(tensor):
        return {name: tensor}
    stem = stem_of(name, generation)
    return {f"{stem}.{local_name}": piece for local_name, piece in entry.encode(tensor).items()}


def _array(name: str, tensor: Tensor) -> StoredArray:
    """Return the elements. Raises `UsageError` for a dtype that a safetensors file can't have."""
    try:
        return array_of(tensor)
    except KeyError:
        remedy = "Save it in another dtype."
        raise _usage_error(name, "a dtype that safetensors has", str(tensor.dtype), remedy) from None


def _require_names(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Raise `UsageError` if reading the stored tensors would not give back the names of `tensors`.

    This can happen because names of pieces are ambiguous: some names of generation 0.4 look like those of 0.9, and vice
    versa.
    """
    sparse = find_sparse(specs, lambda name: tuple(tensors[name].shape) if name in tensors else None, FaultCollector())
    for name in tensors:
        if name not in specs and name not in sparse:
            remedy = "Rename it, or save it with the other generation of names."
            raise _usage_error(
                name, "a name that reading gives back", "one that early or late names can't tell", remedy
            )


def _write(path: Path, specs: Mapping[str, TensorSpec], tensors: Mapping[str, StoredArray]) -> None:
    """Write one file under a temporary name, then rename it to `path`."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as partial:
        with ShardedWriter(Path(partial), specs, max_shard_bytes=sys.maxsize) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            (file,) = writer.finish()
        (Path(partial) / file).replace(path)


def _open_catalog(path: Path) -> Catalog:
    """Return the catalog of a directory, or of one file. Raises `CatalogError` if the file can't be read."""
    if path.is_dir():
        return Catalog.from_directory(path)
    try:
        header = read_header(path, path.name)
    except OSError as error:
        remedy = "Give a safetensors file, or the directory of a checkpoint."
        found = f"{error.strerror or error}".lower()
        raise CatalogError(Fault(where=str(path), expected="a readable file", found=found, remedy=remedy)) from None
    return Catalog(source=Folder(path.parent), tensors=header.tensors, files=(path.name,))


def _stored_shapes(reader: TensorReader, specs: Mapping[str, TensorSpec]) -> Callable[[str], tuple[int, ...] | None]:
    """Return a function that reads the shape of a dense tensor, given by name, from its `shape` piece.

    Without a model's configuration only this piece gives the exact number of columns.
    """

    def shape_of(name: str) -> tuple[int, ...] | None:
        for stem in (name, name.removesuffix(".weight")):
            spec = specs.get(f"{stem}.shape")
            if spec is not None and spec.dtype in SHAPE_DTYPES:
                return tuple(reader.read(f"{stem}.shape").elements.ravel().tolist())
        return None

    return shape_of


def _dense_tensors(
    reader: TensorReader, specs: Mapping[str, TensorSpec], sparse: Mapping[str, SparseTensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the restored sparse tensors, then the stored tensors that are not pieces of one."""
    piece_names = {full_name for tensor in sparse.values() for full_name in tensor.parts.values()}
    with reader:
        for name, tensor in sparse.items():
            pieces = {piece: reader.read(full_name) for piece, full_name in tensor.parts.items()}
            yield name, tensor_of(restore(tensor, pieces))
        for name in specs:
            if name not in piece_names:
                yield name, tensor_of(reader.read(name))


def _usage_error(where: str, expected: str, found: str, remedy: str) -> UsageError:
    """Return a `UsageError` with one fault."""
    return UsageError(Fault(where=where, expected=expected, found=found, remedy=remedy))

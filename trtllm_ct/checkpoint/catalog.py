"""Catalog: every tensor of a checkpoint directory by name, from safetensors headers alone.

Planning works from a catalog, so a 700 GB checkpoint is planned in seconds. Readers trust the catalog. That is why
anything damaged, ambiguous or dangerous is refused here, and the faults of all files are reported together.

Which files belong to the checkpoint: the ones that `model.safetensors.index.json` names. File names alone do not
decide, because libraries add shards under names of their own, such as `model_mtp.safetensors`. Without an index, every
`*.safetensors` file of the directory belongs to the checkpoint.
The index also says which of these files a tensor is read from: tools that quantize again leave old tensors in old
shards. A copy in another file is reported. Two copies are an error only if the index does not tell them apart. Tensors
that the index does not list are cataloged, and `unlisted` names them: the planner reads those that the model lacks.
`consolidated*` files are a second copy of the weights under Mistral's own tensor names. They are read only when there
are no other safetensors files.
This module does not import torch and reads no payload.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector
from trtllm_ct.base.regular_files import INDEX_BYTES
from trtllm_ct.checkpoint.header import (
    Header,
    StoredTensor,
    format_names,
    header_of,
    parse_json_object,
    refuse_lfs_pointer,
)
from trtllm_ct.checkpoint.source import Folder, Part, Source, local_folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from trtllm_ct.base.schemes import TensorSpec

__all__ = ["INDEX_FILE", "PICKLE_SUFFIXES", "Catalog", "StoredTensor"]

INDEX_FILE = "model.safetensors.index.json"
"""The name of the index that Hugging Face libraries write and look for."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Name endings of files that hold pickled weights."""

_SECOND_COPY = "consolidated"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")

_HEADER_BYTES = 2**18
"""How long a header is expected to be if no index says how many tensors the file has."""

_ENTRY_BYTES = 100
"""What a header has of a tensor beside its name: at most that, for three axes and offsets of ten digits."""

_METADATA_BYTES = 1000

_ONLY_FILE = "model.safetensors"

_FETCH_MISSING = "The download is incomplete: fetch the missing files from where the checkpoint came from."
_NO_WEIGHTS_HERE = "Give the directory that holds the weight files; if this is it, the download is incomplete."
_NO_WEIGHTS_THERE = "Give a repository, a revision or a folder of it that holds safetensors files."
_FIX_INDEX = "Index and shards don't belong together: download all of them again from one revision."
_LIST_COPIES = "Add these tensors to {index}, each with the file that holds the right copy."
_MOVE_COPIES = (
    "The files are of two checkpoints, and only their source can tell which is meant: move those of the other one to "
    "another directory."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The tensors of a checkpoint: their dtypes and shapes, and where their bytes lie.

    `tensors` is ordered by file, then by offset in the file, which is the cheapest order to read them in.
    `files` are relative to `source`; `metadata` holds the `__metadata__` of each file that has any; `warnings`
    report files and index entries that a user may not expect. `unlisted` are the tensors that the index does not list;
    it is empty without an index. `complete` says that no file can be missing: the index names all of them, their names
    have numbers, or there is one. `specs` are dtype and shape of each tensor, in the same order.
    """

    source: Source
    tensors: Mapping[str, StoredTensor]
    files: tuple[str, ...]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    unlisted: frozenset[str] = frozenset()
    complete: bool = False
    specs: Mapping[str, TensorSpec] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Made once: several stages need all of them, and there may be a million.
        object.__setattr__(self, "specs", {name: tensor.spec for name, tensor in self.tensors.items()})

    @classmethod
    def from_directory(cls, directory: str | Path) -> Self:
        """Read the headers of all weight files of `directory`; see `from_source`."""
        return cls.from_source(Folder(path_of("directory", directory)))

    @classmethod
    def from_source(cls, source: Source) -> Self:
        """Read the headers of all weight files of a checkpoint.

        Raises `CatalogError` with every fault of every file.
        Takes about 7 microseconds per tensor. Peak memory is about 600 bytes per tensor, of which 260 stay in use.
        """
        selection = _select_files(source)
        faults = FaultCollector()
        with collector_paused():
            headers = _read_headers(source, selection, faults)
            tensors, copied = _merge(selection, headers, faults)
            warnings = selection.warnings + copied + _compare_with_index(selection, headers, tensors, faults)
        faults.raise_if_any(CatalogError, warnings)
        unlisted = frozenset(tensors.keys() - selection.weight_map.keys()) if selection.index else frozenset[str]()
        return cls(
            source=source,
            tensors=MappingProxyType(tensors),
            files=selection.files,
            metadata={file: header.metadata for file, header in headers.items() if header.metadata},
            warnings=warnings,
            unlisted=unlisted,
            complete=bool(selection.index)
            or selection.files == (_ONLY_FILE,)
            or all(map(_is_numbered, selection.files)),
        )

    @property
    def directory(self) -> Path:
        """The folder of the files; raises `UsageError` if they are not on this machine."""
        return local_folder(self.source)

    def without(self, names: Collection[str]) -> Catalog:
        """Return the catalog without the tensors of these names."""
        return replace(self, tensors={name: tensor for name, tensor in self.tensors.items() if name not in names})

    def names_by_module(self) -> dict[str, tuple[str, ...]]:
        """Return the tensor names of each module, from whichever files hold them.

        The module's name is the tensor's name without its last component.
        """
        modules: dict[str, list[str]] = {}
        for name in self.tensors:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        return {module: tuple(names) for module, names in modules.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a tensor; raises `KeyError` when no tensor has that name."""
        return self.tensors[name].spec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Selection:
    """The files to read, sorted by name, and the content of the index.

    `index` is the file name of the index, or empty when there is none. `weight_map` maps tensor names to file names, as
    the index does. `strays` are the weight files that the index does not name.
    """

    files: tuple[str, ...]
    index: str = ""
    weight_map: Mapping[str, str] = field(default_factory=dict)
    strays: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _select_files(source: Source) -> _Selection:
    """Decide which files make up the checkpoint; raises `CatalogError` when that can't be decided."""
    names = _list_files(source)
    kept = [name for name in names if not name.startswith(_SECOND_COPY)]
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in kept):
        kept = names
    shards = [name for name in kept if name.endswith(".safetensors")]
    indexes = [name for name in kept if name.endswith(".safetensors.index.json")]
    warnings = _warn_of_ignored(names, kept)
    if indexes:
        return _select_from_index(source, _choose_index(indexes), shards, warnings)
    if not shards:
        raise CatalogError(_no_weights(source, names))
    _require_printable(shards)
    _require_all_numbers(shards)
    return _Selection(files=tuple(shards), warnings=warnings)


def _list_files(source: Source) -> list[str]:
    """Return the sorted names of all entries that are not hidden; raises `CatalogError` when they can't be listed."""
    try:
        return source.names()
    except OSError as error:
        raise CatalogError(
            Fault(
                where=source.place,
                expected="a checkpoint directory",
                found=f"{error.strerror}".lower(),
                remedy="Give the directory that holds config.json and the weight files.",
            )
        ) from None


def _warn_of_ignored(names: list[str], kept: list[str]) -> tuple[str, ...]:
    """Return warnings about weight files of `names` that are not read: second copies and pickle files."""
    warnings = []
    second_copy = [name for name in names if name not in kept and name.endswith(".safetensors")]
    if second_copy:
        warnings.append(f"not read, a second copy of the weights: {format_names(second_copy)}")
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        warnings.append(f"not read, pickle files beside safetensors: {format_names(pickles)}")
    return tuple(warnings)


def _no_weights(source: Source, names: list[str]) -> Fault:
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return Fault(
            where=source.place,
            expected="safetensors files",
            found=f"pickle files only: {format_names(pickles)}",
            remedy="Pickle runs code of the file's author when it is loaded, so it is refused: where you trust the "
            "author, load the model with transformers and save it with save_pretrained, which writes safetensors.",
        )
    return Fault(
        where=source.place,
        expected="safetensors files",
        found=f"no weights among {format_names(names)}" if names else "an empty directory",
        remedy=_NO_WEIGHTS_HERE if source.folder is not None else _NO_WEIGHTS_THERE,
    )


def _choose_index(indexes: list[str]) -> str:
    if INDEX_FILE in indexes:
        return INDEX_FILE
    if len(indexes) == 1:
        return indexes[0]
    raise CatalogError(
        Fault(
            where=", ".join(indexes),
            expected=f"one index, or one called {INDEX_FILE}",
            found=f"{len(indexes)} indexes",
            remedy=f"Keep the one that describes the weights to load, under the name {INDEX_FILE}.",
        )
    )


def _select_from_index(source: Source, index: str, shards: list[str], warnings: tuple[str, ...]) -> _Selection:
    weight_map = _read_weight_map(source, index)
    files = tuple(sorted(set(weight_map.values())))
    faults = FaultCollector()
    for file in files:
        _require_inside(file, index, faults)
    faults.raise_if_any(CatalogError)
    strays = sorted(set(shards) - set(files))
    if strays:
        warnings += (f"not read, {index} does not name them: {format_names(strays)}",)
    return _Selection(files=files, index=index, weight_map=weight_map, strays=tuple(strays), warnings=warnings)


def _read_weight_map(source: Source, index: str) -> dict[str, str]:
    try:
        text = source.read(index, INDEX_BYTES)
    except OSError as error:
        raise CatalogError(_unreadable(index, error)) from None
    refuse_lfs_pointer(text, index)
    weight_map = parse_json_object(text, index, remedy=_FIX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or {type(file) for file in weight_map.values()} != {str}:
        expected = "an object weight_map from tensor names to file names, not empty"
        raise CatalogError(
            Fault(where=index, expected=expected, found=_describe_weight_map(weight_map), remedy=_FIX_INDEX)
        )
    return weight_map


def _describe_weight_map(weight_map: object) -> str:
    """Say what is wrong with the `weight_map` of an index, for a message."""
    if not isinstance(weight_map, dict):
        return "none" if weight_map is None else f"a {type(weight_map).__name__}"
    invalid = [name for name, file in weight_map.items() if not isinstance(file, str)]
    return f"no file name for {format_names(invalid)}" if invalid else "an empty one"


def _require_inside(file: str, index: str, faults: FaultCollector) -> None:
    r"""Add a fault unless `file` names a safetensors file inside the directory.

    Only the text of the name is checked, not where a link leads: in a hub cache every file links to `../../blobs`.
    Backslashes are refused because `..\x` is a plain file name here but leads out of the directory on other systems.
    """
    parts = file.split("/")
    outside = PurePosixPath(file).is_absolute() or {"", ".", ".."} & set(parts) or re.search(r"[\\:\0]", file)
    if outside or not file.isprintable():
        expected = "paths inside the checkpoint directory"
        remedy = "Take the index from where the checkpoint was published; such a path may be meant to harm you."
        faults.add(where=index, expected=expected, found=repr(file), remedy=remedy)
    elif not file.endswith(".safetensors"):
        remedy = "Pickle and other formats are refused because loading them can run code: convert to safetensors."
        faults.add(where=index, expected="names of safetensors files", found=repr(file), remedy=remedy)


def _require_printable(shards: list[str]) -> None:
    """Raise `CatalogError` for names of weight files that are not UTF-8 or have control characters."""
    faults = FaultCollector()
    for shard in shards:
        if not shard.isprintable():
            remedy = "Rename the file, or move it away if it doesn't belong to the checkpoint."
            expected = "a file name in UTF-8 without control characters"
            faults.add(where=shard, expected=expected, found=ascii(shard), remedy=remedy)
    faults.raise_if_any(CatalogError)


def _is_numbered(file: str) -> bool:
    """Whether the name of a file says how many there are; then none is missing, see `_require_all_numbers`."""
    return _NUMBERED.fullmatch(file) is not None


def _require_all_numbers(shards: list[str]) -> None:
    """Raise `CatalogError` when a shard is missing from a series of names such as `x-00001-of-00003`.

    Without an index, these numbers are the only sign of a missing shard.
    """
    present: dict[tuple[str, str], set[int]] = defaultdict(set)
    for shard in shards:
        if match := _NUMBERED.fullmatch(shard):
            present[match["stem"], match["total"]].add(int(match["number"]))
    faults = FaultCollector()
    for (stem, total), numbers in present.items():
        missing = [str(number) for number in range(1, min(int(total), 10**5) + 1) if number not in numbers]
        if missing:
            where, found = f"{stem}-*-of-{total}.safetensors", f"no number {format_names(missing)}"
            faults.add(where=where, expected=f"{int(total)} shards", found=found, remedy=_FETCH_MISSING)
    faults.raise_if_any(CatalogError)


def _read_headers(source: Source, selection: _Selection, faults: FaultCollector) -> dict[str, Header]:
    """Return the headers of all valid files; add the faults of all others to `faults`."""
    headers = {}
    source.announce(_expected_headers(selection))
    for file in selection.files:
        try:
            with source.open(file) as stored:
                headers[file] = header_of(stored, file)
        except FileNotFoundError:
            tensors = [name for name, shard in selection.weight_map.items() if shard == file]
            expected = f"the file, which {selection.index} names for {len(tensors)} tensors" if tensors else "a file"
            found = "a link that leads nowhere" if source.has(file) else "no such file"
            faults.add(where=file, expected=expected, found=found, remedy=_fetch_missing(selection))
        except OSError as error:
            faults.faults.append(_unreadable(file, error))
        except CatalogError as error:
            faults.faults.extend(error.faults)
    return headers


def _expected_headers(selection: _Selection) -> list[Part]:
    """Return where the headers of all files are, with a guess of their sizes by the names in the index."""
    if not selection.index:
        return [Part(file, 0, _HEADER_BYTES) for file in selection.files]
    # Names of one checkpoint are about equally long: their mean is computed in a fraction of the time.
    name_bytes = sum(map(len, selection.weight_map)) // len(selection.weight_map)
    counts = Counter(selection.weight_map.values())
    return [Part(file, 0, _METADATA_BYTES + counts[file] * (name_bytes + _ENTRY_BYTES)) for file in selection.files]


def _fetch_missing(selection: _Selection) -> str:
    """Return what to do about a missing file: a file that the index does not name may be the whole checkpoint."""
    if not selection.strays:
        return _FETCH_MISSING
    whole = format_names(selection.strays)
    return f"{_FETCH_MISSING} If {whole} holds the whole checkpoint, delete {selection.index}, which is out of date."


def _unreadable(file: str, error: OSError) -> Fault:
    found = f"{error.strerror or error}".lower()
    return Fault(where=file, expected="a readable file", found=found, remedy="Check its permissions and the disk.")


def _merge(
    selection: _Selection, headers: Mapping[str, Header], faults: FaultCollector
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return all tensors by name, and warnings about names that occur in several files.

    The index says which copy is read. Adds a fault for copies that it does not tell apart.
    """
    tensors: dict[str, StoredTensor] = {}
    homes: dict[str, list[str]] = {}
    for file, header in headers.items():
        if not tensors.keys().isdisjoint(header.tensors):
            for name in header.tensors.keys() & tensors.keys():
                homes.setdefault(name, [tensors[name].file]).append(file)
        tensors.update(header.tensors)
    if not homes:
        return tensors, ()
    chosen = _choose_copies(homes, selection, faults)
    merged = {
        name: tensor
        for file, header in headers.items()
        for name, tensor in header.tensors.items()
        if chosen.get(name, file) == file
    }
    return merged, _warning(f"in several files, read from the one that {selection.index} says", sorted(homes))


def _choose_copies(homes: Mapping[str, list[str]], selection: _Selection, faults: FaultCollector) -> dict[str, str]:
    """Return the file to read each tensor from, given all files that hold it; add a fault if the index doesn't say."""
    chosen = {}
    unclear: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, files in homes.items():
        chosen[name] = selection.weight_map.get(name, "")
        if chosen[name] not in files:
            chosen[name] = files[0]
            unclear[tuple(files)].append(name)
    for copies, names in sorted(unclear.items()):
        faults.add(
            where=" and ".join(copies),
            expected="each tensor in one file" + ", or in the index the file to read it from" * bool(selection.index),
            found=f"{len(names)} in {'both' if len(copies) == 2 else 'all'}: {format_names(sorted(names))}",
            remedy=_LIST_COPIES.format(index=selection.index) if selection.index else _MOVE_COPIES,
        )
    return chosen


def _compare_with_index(
    selection: _Selection, headers: Mapping[str, Header], tensors: Mapping[str, StoredTensor], faults: FaultCollector
) -> tuple[str, ...]:
    """Add a fault for index entries whose tensor is in no file, and return warnings about those in another file.

    Entries of files without a valid header are skipped, because those files have faults already.
    """
    missing: dict[str, list[str]] = defaultdict(list)
    misplaced = []
    for name, file in selection.weight_map.items():
        if file in headers and name not in headers[file].tensors:
            misplaced.append(name) if name in tensors else missing[file].append(name)
    for file, names in sorted(missing.items()):
        found = f"{len(names)} of them in no file: {format_names(names)}"
        faults.add(where=file, expected=f"the tensors that {selection.index} lists", found=found, remedy=_FIX_INDEX)
    return _warning("in another file than the index says, read from there", misplaced)


def _warning(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return one warning that lists `names`, or no warning when there are no names."""
    named = format_names(names)
    return (f"{what}: {named}",) if named else ()

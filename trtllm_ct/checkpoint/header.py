"""One safetensors header, read and proved: which tensors a file holds and where their bytes lie.

A file is an 8-byte little-endian length, that many bytes of JSON, then the payload. Everything later trusts the
header blindly (tensors are views of mapped memory), so every promise of the format is checked here, before any
payload is touched: the ranges cover the payload once without holes, and each is as long as its dtype and shape say.
Source: the format description and `safetensors/src/tensor.rs` of safetensors 0.8. Where that library stops at
the first fault, all faults of the file are gathered.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector
from trtllm_ct.base.schemes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = [
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "METADATA_KEY",
    "Header",
    "StoredTensor",
    "list_some",
    "parse_json_object",
    "read_header",
    "refuse_lfs_pointer",
]

LENGTH_BYTES = 8
"""Bytes of the length in front of the JSON."""

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library accepts; more is damage or an attack."""

METADATA_KEY = "__metadata__"
"""The one key of a header that names no tensor."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_NUMEL = 2**63

_FETCH_AGAIN = "The file is incomplete or damaged: download it again and compare its checksum."
_SAVE_AGAIN = (
    "The program that wrote the file broke the format: save the checkpoint again with the safetensors library."
)


class StoredTensor(NamedTuple):
    """A tensor in a file: what it is and where its bytes are.

    `file` is relative to the checkpoint directory; `offset` counts bytes from the start of the file.
    """

    name: str
    spec: TensorSpec
    file: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What one file holds: tensors by name in the order of their bytes, and the free text of `__metadata__`."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


_Span = tuple[int, int, str]
"""Where the payload of the named tensor begins and ends, counted from the start of all payload."""


def read_header(path: Path, file: str) -> Header:
    """Read and prove the header of the safetensors file at `path`, which messages and tensors call `file`.

    Reads the header only. Raises `CatalogError` with every fault of the file.
    """
    text, size = _read_text(path, file)
    try:
        return _parse(text, size, file)
    except RecursionError:  # what the parser could just nest, a message about it may not be able to
        _refuse(file, "a header of three levels", "JSON nested without end", _FETCH_AGAIN)


def _parse(text: bytes, size: int, file: str) -> Header:
    faults = FaultCollector()
    entries = _entries(text, file)
    metadata = _metadata(entries.pop(METADATA_KEY, {}), file, faults)
    specs, spans = _parse_entries(entries, file, faults)
    payload_bytes = size - LENGTH_BYTES - len(text)
    _check_layout(spans, payload_bytes, file, faults, complete=len(spans) == len(entries))
    faults.raise_if_any(CatalogError)
    start = LENGTH_BYTES + len(text)
    tensors = {name: StoredTensor(name, specs[name], file, start + begin) for begin, _, name in spans}
    return Header(tensors=tensors, metadata=metadata)


def _read_text(path: Path, file: str) -> tuple[bytes, int]:
    """The JSON bytes of the header and the size of the file."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(len(_LFS_POINTER))
        refuse_lfs_pointer(start, file)
        if len(start) < LENGTH_BYTES:
            _refuse(file, f"at least {LENGTH_BYTES} bytes", f"{size} bytes", _FETCH_AGAIN)
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        if length > MAX_HEADER_BYTES:
            expected = f"a safetensors header of at most {MAX_HEADER_BYTES} bytes"
            _refuse(
                file, expected, f"a header length of {length} bytes", f"This is no safetensors file. {_FETCH_AGAIN}"
            )
        if length > size - LENGTH_BYTES:
            found = f"{size} bytes in the whole file"
            _refuse(file, f"a header of {length} bytes after its length", found, _FETCH_AGAIN)
        stream.seek(LENGTH_BYTES)
        return stream.read(length), size


def refuse_lfs_pointer(start: bytes, file: str) -> None:
    """Raise `CatalogError` when a file's first bytes are those of a Git LFS pointer."""
    if start.startswith(_LFS_POINTER):
        remedy = "The file was never downloaded: this is an LFS pointer, run git lfs pull."
        _refuse(file, "the content of the file", "a Git LFS pointer to it", remedy)


def parse_json_object(text: bytes, where: str, *, remedy: str) -> dict[str, Any]:
    """The JSON object that `text` holds in UTF-8; a key may stand only once in each object.

    Raises `CatalogError` naming `where` and closing with `remedy`.
    """
    document = _parse_json(text, where, remedy)
    if not _may_repeat(text, _count_strings(document)):
        return document
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) != len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return entry

    document = _parse_json(text, where, remedy, unique)
    if repeated:
        _refuse(where, "each name once", f"more than once: {list_some(repeated)}", _SAVE_AGAIN)
    return document


def _parse_json(
    text: bytes, where: str, remedy: str, unique: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The JSON object that `text` holds in UTF-8; `unique`, if given, makes each object of its pairs."""
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in text:  # an escape can smuggle in half a surrogate pair, which no message could print
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # ValueError covers broken UTF-8 and integers of absurd length
        _refuse(where, "a JSON object in UTF-8", f"text that can't be parsed ({error})", remedy)
    if not isinstance(document, dict):
        _refuse(where, "a JSON object", f"a JSON {type(document).__name__}", remedy)
    return document


def _may_repeat(text: bytes, strings: int) -> bool:
    """Whether some key can stand twice in a document that came out with so many strings, keys included.

    Watching every key takes as long as all the rest of parsing. A key that stood twice has left two quotes more.
    """
    return b"\\" in text or text.count(b'"') != 2 * strings


def _count_strings(document: object) -> int:
    """Keys and texts in a document."""
    count, waiting = 0, [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            count += 1
        elif isinstance(value, dict):
            count += len(value)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return count


def _entries(text: bytes, file: str) -> dict[str, Any]:
    """The entries of a header; each key stands once in its object.

    A sound header has a name, three keys and a dtype for each tensor.
    """
    entries = _parse_json(text, file, _FETCH_AGAIN)
    metadata = entries.get(METADATA_KEY)
    strings = 5 * len(entries)
    if isinstance(metadata, dict):
        strings += 2 * len(metadata) - 4
    if _may_repeat(text, strings):
        return parse_json_object(text, file, remedy=_FETCH_AGAIN)
    return entries


def _metadata(found: object, file: str, faults: FaultCollector) -> dict[str, str]:
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    faults.add(where=f"{file}: {METADATA_KEY}", expected="an object of texts", found=_show(found), remedy=_SAVE_AGAIN)
    return {}


def _parse_entries(
    entries: Mapping[str, Any], file: str, faults: FaultCollector
) -> tuple[dict[str, TensorSpec], list[_Span]]:
    """Specs by name, and the spans in the order of the payload; entries without a usable span have neither."""
    specs: dict[str, TensorSpec] = {}
    spans: list[_Span] = []
    # A large checkpoint has 10^5 tensors but few kinds of them: equal dtype and shape share one proved spec.
    known: dict[str, tuple[TensorSpec, int]] = {}
    for name, entry in entries.items():
        try:
            begin, end = _offsets(entry)
            spans.append((begin, end, name))
            # The text is the key because [True], [1] and [1.0] are equal and only [1] is a shape.
            kind = repr((entry["dtype"], entry["shape"]))
            if kind not in known:
                spec = _spec(entry["dtype"], entry["shape"])
                known[kind] = spec, spec.nbytes
            specs[name], nbytes = known[kind]
        except _EntryError as error:
            faults.add(where=f"{file}: {name}", expected=error.expected, found=error.found, remedy=error.remedy)
            continue
        if end - begin != nbytes:
            expected, found = f"{nbytes} bytes for {specs[name]}", f"{end - begin} bytes in data_offsets"
            faults.add(where=f"{file}: {name}", expected=expected, found=found, remedy=_SAVE_AGAIN)
    spans.sort()
    return specs, spans


class _EntryError(Exception):
    """What is wrong with one entry; the caller knows its name."""

    def __init__(self, expected: str, found: str, remedy: str = _SAVE_AGAIN) -> None:
        super().__init__(expected, found, remedy)
        self.expected, self.found, self.remedy = expected, found, remedy


def _offsets(entry: Any) -> tuple[int, int]:
    if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
        raise _EntryError("an object of dtype, shape and data_offsets", _show(entry))
    try:
        begin, end = entry["data_offsets"]
    except (TypeError, ValueError):
        begin = end = None
    # Not isinstance: true and false are no offsets.
    if type(begin) is int and type(end) is int and 0 <= begin <= end:
        return begin, end
    raise _EntryError("data_offsets [begin, end] with 0 <= begin <= end", _show(entry["data_offsets"]))


def _spec(dtype_name: Any, shape: Any) -> TensorSpec:
    dtype = DType.from_header(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        remedy = "Save the tensor in one of the expected dtypes; this package can't interpret any other."
        raise _EntryError(f"one of the dtypes {', '.join(DType.__members__)}", _show(dtype_name), remedy)
    sizes_are_counts = type(shape) is list and all(type(size) is int and size >= 0 for size in shape)
    # Zeros don't shrink the product: torch would overflow on the strides of [0, 2^40, 2^40].
    if not sizes_are_counts or prod(size or 1 for size in shape) >= _MAX_NUMEL:
        raise _EntryError("a shape of whole numbers, none negative, fewer than 2^63 elements", _show(shape))
    return _one_for_all(TensorSpec(dtype, tuple(shape)))


@lru_cache(maxsize=4096)
def _one_for_all(spec: TensorSpec) -> TensorSpec:
    """Equal specs of all files as one object, so that comparing the modules of a checkpoint is comparing pointers."""
    return spec


def _check_layout(spans: list[_Span], payload_bytes: int, file: str, faults: FaultCollector, *, complete: bool) -> None:
    """Prove that spans, sorted, cover the payload from its first to its last byte, each byte once.

    Without `complete` (some entry had no usable span) bytes that nobody claims mean nothing.
    """
    covered, previous = 0, "the header"
    for begin, end, name in spans:
        if begin < covered:
            found = f"byte {begin} of the payload, inside {previous}, which ends at {covered}"
            faults.add(
                where=f"{file}: {name}", expected=f"its data to begin at {covered}", found=found, remedy=_SAVE_AGAIN
            )
        elif begin > covered and complete:
            found = f"byte {begin} of the payload, a hole of {begin - covered} bytes after {previous}"
            faults.add(
                where=f"{file}: {name}", expected=f"its data to begin at {covered}", found=found, remedy=_SAVE_AGAIN
            )
        if end >= covered:
            covered, previous = end, name
    if covered > payload_bytes:
        expected = f"{covered} bytes of payload, to the end of {previous}"
        faults.add(where=file, expected=expected, found=f"{payload_bytes} bytes, a truncated file", remedy=_FETCH_AGAIN)
    elif covered < payload_bytes and complete:
        found = f"{payload_bytes - covered} bytes more that belong to no tensor"
        faults.add(where=file, expected=f"{covered} bytes of payload", found=found, remedy=_FETCH_AGAIN)


def list_some(names: Iterable[str], limit: int = 5) -> str:
    """The first names and how many more there are, for a message: `a, b, c and 12 more`."""
    remaining = iter(names)
    text = ", ".join(islice(remaining, limit))
    more = sum(1 for _ in remaining)
    return f"{text} and {more} more" if more else text


def _show(value: object, limit: int = 80) -> str:
    """A value from JSON, as JSON, cut to a length that a message can bear."""
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _refuse(where: str, expected: str, found: str, remedy: str) -> NoReturn:
    raise CatalogError(Fault(where=where, expected=expected, found=found, remedy=remedy))

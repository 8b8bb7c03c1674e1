"""Read and validate one safetensors header: which tensors a file holds and where their bytes lie.

A file is an 8-byte little-endian length, that many bytes of JSON, then the payload. Later stages trust the header
without further checks (tensors are views of mapped memory). So every rule of the format is checked here, before any
payload is read: the byte ranges of the tensors cover the payload exactly once, without holes, and each range is as long
as its dtype and shape require.
Source: the format description and `safetensors/src/tensor.rs` of safetensors 0.8. That library stops at the first
fault; this module collects all faults of a file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector
from trtllm_ct.base.json_values import INDEX_VALUES, require_few_values
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.base.texts import printable, shortened
from trtllm_ct.checkpoint.source import open_local

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from trtllm_ct.checkpoint.source import StoredFile

__all__ = [
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "METADATA_KEY",
    "Header",
    "StoredTensor",
    "format_names",
    "header_of",
    "parse_json_object",
    "read_header",
    "refuse_lfs_pointer",
]

LENGTH_BYTES = 8
"""Size of the length field in front of the JSON."""

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library accepts; a longer one means damage or an attack."""

METADATA_KEY = "__metadata__"
"""The one key of a header that does not name a tensor."""

_NEGATIVE_ZERO = re.compile(rb"-0[^-\w.]")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_NUMEL = 2**63
_MAX_NAME = 200  # characters of a name in a list of names
_OTHER_BRACKETS = 100_000  # in names, metadata, and in an index that lists more than names
_MAX_AXES = 64  # as many as numpy and torch can have

_FETCH_AGAIN = "The file is incomplete or damaged: download it again and compare its checksum."
_SAVE_AGAIN = (
    "The program that wrote the file broke the format: save the checkpoint again with the safetensors library."
)


class StoredTensor(NamedTuple):
    """A tensor in a file: its name, its dtype and shape, and where its bytes are.

    `file` is relative to the checkpoint directory; `offset` counts bytes from the start of the file.
    """

    name: str
    spec: TensorSpec
    file: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The content of one header: tensors by name, in the order of their bytes, and the strings of `__metadata__`."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


_Span = tuple[int, int, str]
"""Where a tensor's payload begins and ends, counted from the start of all payload, and the tensor's name."""


def read_header(path: Path, file: str) -> Header:
    """Read and validate the header of the safetensors file at `path`; see `header_of`."""
    with open_local(path) as stored:
        return header_of(stored, file)


def header_of(stored: StoredFile, file: str) -> Header:
    """Read and validate the header of an open safetensors file; the payload is not read.

    `file` is the name of the file in messages and in the returned tensors. Raises `CatalogError` with every fault of
    the file.
    """
    text, size = _read_text(stored, file)
    try:
        return _parse(text, size, file)
    except RecursionError:  # JSON that the parser could just handle may be nested too deeply to be shown in a message
        _refuse(file, "a header of three levels", "JSON nested without end", _FETCH_AGAIN)


def _parse(text: bytes, size: int, file: str) -> Header:
    """Parse and validate the JSON `text` of a header; `size` is the size of the whole file in bytes."""
    faults = FaultCollector()
    entries = _load_entries(text, file)
    metadata = _metadata(entries.pop(METADATA_KEY, None), file, faults)
    specs, spans = _parse_entries(entries, file, faults)
    payload_bytes = size - LENGTH_BYTES - len(text)
    _check_layout(spans, payload_bytes, file, faults, complete=len(spans) == len(entries))
    faults.raise_if_any(CatalogError)
    start = LENGTH_BYTES + len(text)
    tensors = {name: StoredTensor(name, specs[name], file, start + begin) for begin, _, name in spans}
    return Header(tensors=tensors, metadata=metadata)


def _read_text(stored: StoredFile, file: str) -> tuple[bytes, int]:
    """Return the JSON bytes of the header and the size of the file in bytes."""
    size = stored.size
    start = stored.read(len(_LFS_POINTER), 0)
    refuse_lfs_pointer(start, file)
    if len(start) < LENGTH_BYTES:
        _refuse(file, f"at least {LENGTH_BYTES} bytes", f"{size} bytes", _FETCH_AGAIN)
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        expected = f"a safetensors header of at most {MAX_HEADER_BYTES} bytes"
        _refuse(file, expected, f"a header length of {length} bytes", f"This is no safetensors file. {_FETCH_AGAIN}")
    if length > size - LENGTH_BYTES:
        found = f"{size} bytes in the whole file"
        _refuse(file, f"a header of {length} bytes after its length", found, _FETCH_AGAIN)
    text = stored.read(length, LENGTH_BYTES)
    if len(text) < length:
        _refuse(file, f"a header of {length} bytes", f"a file that ends after {len(text)} of them", _FETCH_AGAIN)
    return text, size


def refuse_lfs_pointer(start: bytes, file: str) -> None:
    """Raise `CatalogError` when `start`, the first bytes of a file, are those of a Git LFS pointer."""
    if start.startswith(_LFS_POINTER):
        remedy = (
            "The file was never downloaded: this is an LFS pointer, run git lfs pull. A repository that has no more "
            "than the pointer was uploaded without its files."
        )
        _refuse(file, "the content of the file", "a Git LFS pointer to it", remedy)


def parse_json_object(text: bytes, where: str, *, remedy: str) -> dict[str, Any]:
    """Parse `text`, a JSON object in UTF-8, and refuse objects that contain a key more than once.

    Raises `CatalogError` that names `where`. Its remedy is `remedy`, except for repeated keys, which have a remedy of
    their own.
    """
    document = _parse_json(text, where, remedy)
    if not _may_repeat_keys(text, _count_strings(document)):
        return document
    repeated: list[str] = []

    def note_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) != len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return entry

    document = _parse_json(text, where, remedy, note_repeated_keys)
    if repeated:
        _refuse(where, "each name once", f"more than once: {format_names(repeated)}", _SAVE_AGAIN)
    return document


def _parse_json(
    text: bytes,
    where: str,
    remedy: str,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Parse `text`, a JSON object in UTF-8; `object_pairs_hook` is passed on to `json.loads`."""
    try:
        _require_few_values(text)
    except ValueError as error:
        _refuse(where, "names, dtypes, shapes and offsets", str(error), remedy)
    # The safetensors library takes -0 for no integer; Python's parser, for 0.
    parse_int = _integer if _NEGATIVE_ZERO.search(text) else None
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=object_pairs_hook, parse_int=parse_int)
        if b"\\u" in text:  # an escape may be half of a surrogate pair, which can't be printed in a message
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # ValueError: also for invalid UTF-8 and overlong integers
        _refuse(where, "a JSON object in UTF-8", f"text that can't be parsed ({error})", remedy)
    if not isinstance(document, dict):
        _refuse(where, "a JSON object", f"a JSON {type(document).__name__}", remedy)
    return document


def _require_few_values(text: bytes) -> None:
    """Raise `ValueError` for a text with more values than an index or a header of its size has.

    The entry of a tensor in a header has a key "dtype", one brace, two brackets and at most a comma for each axis and
    five more.
    """
    opened = text.count(b"[") + text.count(b"{")
    if opened <= _OTHER_BRACKETS and len(text) <= INDEX_VALUES:  # few, however many tensors there are
        return
    tensors = text.count(b'"dtype"')
    require_few_values(text, INDEX_VALUES + (8 + _MAX_AXES) * tensors)
    most = 3 * tensors + _OTHER_BRACKETS
    if opened > most:
        raise ValueError(f"{opened} lists and objects, where {tensors} tensors have at most {most}")


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 where a size is due")
    return int(text)


def _may_repeat_keys(text: bytes, string_count: int) -> bool:
    """Whether `text`, which parsed to `string_count` strings (keys included), may repeat a key within an object.

    Checking every key with a hook takes as long as all the rest of parsing. A repeated key is dropped in parsing, so
    the text then has two quotes more than the parsed strings account for. Backslashes may escape quotes, so a text with
    backslashes always counts as one that may repeat keys.
    """
    return b"\\" in text or text.count(b'"') != 2 * string_count


def _count_strings(document: object) -> int:
    """Count the strings of a parsed document, keys included."""
    count, pending = 0, [document]
    while pending:
        value = pending.pop()
        values: Collection[object] = ()
        if isinstance(value, dict):
            count += len(value)
            values = value.values()
        elif isinstance(value, list):
            values = value
        # Nearly all values of an index are texts: they are counted together.
        others = [one for one in values if not isinstance(one, str)]
        count += len(values) - len(others)
        pending += others
    return count


def _load_entries(text: bytes, file: str) -> dict[str, Any]:
    """Parse the JSON of a header; raises `CatalogError` when an object repeats a key.

    The number of strings is computed, not counted: a valid header has five strings per tensor, which are its name,
    three keys and a dtype. Where the text does not fit that number, it is parsed again with a check of every key.
    """
    entries = _parse_json(text, file, _FETCH_AGAIN)
    metadata = entries.get(METADATA_KEY)
    string_count = 5 * len(entries)
    if isinstance(metadata, dict):
        string_count += 2 * len(metadata) - 4
    if _may_repeat_keys(text, string_count):
        return parse_json_object(text, file, remedy=_FETCH_AGAIN)
    return entries


def _metadata(value: object, file: str, faults: FaultCollector) -> dict[str, str]:
    """Return `__metadata__` when it maps strings to strings; otherwise add a fault and return an empty dictionary.

    Null counts as absent, as for the safetensors library.
    """
    if value is None:
        return {}
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    faults.add(where=f"{file}: {METADATA_KEY}", expected="an object of texts", found=_show(value), remedy=_SAVE_AGAIN)
    return {}


def _parse_entries(
    entries: Mapping[str, Any], file: str, faults: FaultCollector
) -> tuple[dict[str, TensorSpec], list[_Span]]:
    """Return the specs by name, and the spans sorted by their place in the payload.

    An entry without valid `data_offsets` has neither a spec nor a span.
    """
    specs: dict[str, TensorSpec] = {}
    spans: list[_Span] = []
    # A large checkpoint has 10^5 tensors but few distinct dtypes and shapes: equal ones share one validated spec.
    specs_by_key: dict[str, tuple[TensorSpec, int]] = {}
    for name, entry in entries.items():
        try:
            begin, end = _offsets(entry)
            spans.append((begin, end, name))
            # The key is a string because [True], [1] and [1.0] are equal, and only [1] is a valid shape.
            dtype, shape = entry["dtype"], entry["shape"]
            key = repr((dtype, shape))
            known = specs_by_key.get(key)
            if known is None:
                spec = _spec(dtype, shape)
                known = specs_by_key[key] = spec, spec.nbytes
            specs[name], nbytes = known
        except _EntryError as error:
            faults.add(where=f"{file}: {name}", expected=error.expected, found=error.found, remedy=error.remedy)
            continue
        if end - begin != nbytes:
            expected, found = f"{nbytes} bytes for {specs[name]}", f"{end - begin} bytes in data_offsets"
            faults.add(where=f"{file}: {name}", expected=expected, found=found, remedy=_SAVE_AGAIN)
    spans.sort()
    return specs, spans


class _EntryError(Exception):
    """The fault of one header entry; the caller adds the entry's name."""

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
    # type() and not isinstance(): true and false are not offsets.
    if type(begin) is int and type(end) is int and 0 <= begin <= end:
        return begin, end
    raise _EntryError("data_offsets [begin, end] with 0 <= begin <= end", _show(entry["data_offsets"]))


def _spec(dtype_name: Any, shape: Any) -> TensorSpec:
    dtype = DType.from_header(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        remedy = "Save the tensor in one of the expected dtypes; this package can't interpret any other."
        raise _EntryError(f"one of the dtypes {', '.join(DType.__members__)}", _show(dtype_name), remedy)
    if not _is_shape(shape):
        expected = f"a shape of at most {_MAX_AXES} whole numbers, none negative, fewer than 2^63 elements"
        raise _EntryError(expected, _show(shape))
    return _interned(TensorSpec(dtype, tuple(shape)))


def _is_shape(shape: Any) -> bool:
    if type(shape) is not list or len(shape) > _MAX_AXES:
        return False
    numel = 1
    for size in shape:
        if type(size) is not int or size < 0:
            return False
        # Zeros count as 1 in the product: torch would overflow on the strides of [0, 2^40, 2^40].
        numel *= size or 1
        if numel >= _MAX_NUMEL:
            return False
    return True


@lru_cache(maxsize=4096)
def _interned(spec: TensorSpec) -> TensorSpec:
    """Return the same object for all equal specs, in whatever file they are.

    Comparing the modules of a checkpoint then means comparing pointers.
    """
    return spec


def _check_layout(spans: list[_Span], payload_bytes: int, file: str, faults: FaultCollector, *, complete: bool) -> None:
    """Check that `spans`, which are sorted, cover the payload from its first to its last byte, each byte once.

    `complete` is False when some entry had no usable span. Bytes that no span covers are then not reported.
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


def format_names(names: Iterable[str]) -> str:
    """Format the first five names and the number of all others for a message: `a, b, c and 12 more`."""
    remaining = iter(names)
    text = ", ".join(printable(shortened(name, _MAX_NAME)) for name in islice(remaining, 5))
    more = sum(1 for _ in remaining)
    return f"{text} and {more} more" if more else text


def _show(value: object) -> str:
    """Return a JSON value as JSON text for a message, cut to 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refuse(where: str, expected: str, found: str, remedy: str) -> NoReturn:
    raise CatalogError(Fault(where=where, expected=expected, found=found, remedy=remedy))

"""Plan the position of every byte of an output before any byte of the input is read.

Names, dtypes and shapes of all output tensors are known in advance, so the files, their headers and the position of
every tensor are known too. Tensors can then be written in any order, by any thread or process, and the result is the
same.
The layout follows the safetensors format description and the naming that Hugging Face libraries expect.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import INDEX_FILE
from trtllm_ct.checkpoint.header import LENGTH_BYTES, METADATA_KEY, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from typing_extensions import Self

__all__ = [
    "PlannedFile",
    "Segment",
    "Shard",
    "StackPart",
    "WritePlan",
    "encode_header",
    "merged_ranges",
    "plan_shards",
    "rank_shards",
]

_PAYLOAD_ALIGNMENT = 64
"""The payload begins at a multiple of this, so that even wide vector loads from a memory map are aligned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file to write: its name and its tensors, in the order in which they were planned."""

    file: str
    specs: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """The size of the payload in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A file without its payload: `header` holds its first bytes, `nbytes` is the size of the whole file."""

    name: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPart:
    """The place of a matrix [N, K] or vector [N] in the tensor `stack` of several entries.

    An entry has `lines` lines: its columns if matrices are `transposed` into it, its rows otherwise. Row i is line
    `line` + `step` * i. All lines of an entry belong to tensors that one writer writes.
    With `flat` the tensor has a single entry, and no axis for it.
    """

    stack: str
    entry: int = 0
    entries: int = 1
    line: int
    lines: int
    step: int = 1
    transposed: bool = True
    flat: bool = False

    def stack_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return dtype and shape of the stacked tensor, given those of one that it is made from."""
        inner = spec.shape[1:]
        entry = (*inner, self.lines) if self.transposed else (self.lines, *inner)
        return TensorSpec(spec.dtype, entry if self.flat else (self.entries, *entry))

    def entry_bytes(self, spec: TensorSpec) -> int:
        """Return the size of an entry, given dtype and shape of a tensor that it is made from."""
        return self.lines * prod(spec.shape[1:]) * spec.dtype.itemsize

    def begin(self, spec: TensorSpec) -> int:
        """Return the first byte of the entry in the stacked tensor."""
        return self.entry * self.entry_bytes(spec)

    def lines_of(self, first: int, count: int) -> slice:
        """Return the lines of `count` rows from row `first` on."""
        begin = self.line + first * self.step
        return slice(begin, begin + count * self.step, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The place of a tensor whose elements are consecutive elements of the tensor `stack`, in the same order.

    `shape` is the shape of `stack`, and `first` the first of the elements in it.
    """

    stack: str
    shape: tuple[int, ...]
    first: int = 0

    def stack_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return dtype and shape of the tensor in the file, given those of the part."""
        return TensorSpec(spec.dtype, self.shape)

    def begin(self, spec: TensorSpec) -> int:
        """Return the first byte of the part in the tensor."""
        return self.first * spec.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePlan:
    """The files of an output and the place of each tensor in them.

    `places` are those of the tensors that are given to a writer, in the order in which they were planned; a matrix in
    `stacks` begins where its entry of the stacked tensor begins. `tensors` are those that the files hold. With `ranks`
    there is one file for each rank of an engine, and no index.
    """

    files: tuple[PlannedFile, ...]
    places: Mapping[str, StoredTensor]
    tensors: Mapping[str, StoredTensor]
    stacks: Mapping[str, StackPart]
    ranks: bool = False

    @classmethod
    def of(
        cls,
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int,
        stacks: Mapping[str, StackPart | Segment] | None = None,
        *,
        ranks: bool = False,
    ) -> Self:
        """Plan the files for tensors in the given order; see `plan_shards`, `rank_shards` and `encode_header`.

        `stacks` says which of them are written into larger tensors.
        """
        stacks = stacks or {}
        in_files = {
            (stacks[name].stack if name in stacks else name): (
                stacks[name].stack_spec(spec) if name in stacks else spec
            )
            for name, spec in specs.items()
        }
        files, tensors = [], {}
        for shard in rank_shards(in_files) if ranks else plan_shards(in_files, max_shard_bytes):
            header, begins = encode_header(shard.specs)
            files.append(PlannedFile(name=shard.file, header=header, nbytes=len(header) + shard.nbytes))
            folder = f"{shard.file.removesuffix('.safetensors')}/" if ranks else ""
            for name, spec in shard.specs.items():
                tensors[folder + name] = StoredTensor(name=name, spec=spec, file=shard.file, offset=begins[name])
        places = tensors
        if stacks:
            places = {
                name: _place_in(tensors[stacks[name].stack], stacks[name], name, spec)
                if name in stacks
                else tensors[name]
                for name, spec in specs.items()
            }
        return cls(
            files=tuple(files),
            places=MappingProxyType(places),
            tensors=MappingProxyType(tensors),
            stacks=MappingProxyType({name: part for name, part in stacks.items() if isinstance(part, StackPart)}),
            ranks=ranks,
        )

    @property
    def file_names(self) -> tuple[str, ...]:
        """The names of all files, the index included."""
        names = tuple(file.name for file in self.files)
        return names if self.index is None else (*names, INDEX_FILE)

    @property
    def payload_bytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """The size of all files in bytes, without the index."""
        return sum(file.nbytes for file in self.files)

    @property
    def index(self) -> str | None:
        """The text of the index; None for a single file and for files of ranks, which need no index."""
        if len(self.files) == 1 or self.ranks:
            return None
        index = {
            "metadata": {"total_size": self.payload_bytes},
            "weight_map": {name: tensor.file for name, tensor in sorted(self.tensors.items())},
        }
        return json.dumps(index, indent=2, ensure_ascii=False) + "\n"

    def ranges(self, names: Iterable[str]) -> list[Range]:
        """Return where tensors lie, or the entries that they are written into; ranges that touch are made one."""
        ranges = set()
        for name in names:
            place, part = self.places[name], self.stacks.get(name)
            nbytes = place.spec.nbytes if part is None else part.entry_bytes(place.spec)
            ranges.add((place.file, place.offset, place.offset + nbytes))
        return merged_ranges(ranges)

    def digest(self) -> bytes:
        """Return a hash of the plan; plans differ in it when they write anything to another place."""
        sha256 = hashlib.sha256()
        for file in self.files:
            sha256.update(f"{file.name}\n{file.nbytes}\n".encode() + file.header)
        return sha256.digest()


Range = tuple[str, int, int]
"""A file, and the first byte of a range in it and the one after the last."""


def merged_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in order, without empty ones, those that touch or overlap made one."""
    merged: list[Range] = []
    for file, begin, end in sorted(ranges):
        if merged and merged[-1][0] == file and begin <= merged[-1][2]:
            merged[-1] = (file, merged[-1][1], max(end, merged[-1][2]))
        elif begin < end:
            merged.append((file, begin, end))
    return merged


def _place_in(stack: StoredTensor, part: StackPart | Segment, name: str, spec: TensorSpec) -> StoredTensor:
    """Return the place of a part: where it, or its entry of the stacked tensor, begins."""
    return StoredTensor(name=name, spec=spec, file=stack.file, offset=stack.offset + part.begin(spec))


def rank_shards(specs: Mapping[str, TensorSpec]) -> tuple[Shard, ...]:
    """Distribute tensors over the files of ranks: `rank0/NAME` is the tensor NAME of rank0.safetensors."""
    shards: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        rank, _, tensor = name.partition("/")
        shards.setdefault(rank, {})[tensor] = spec
    return tuple(Shard(file=f"{rank}.safetensors", specs=tensors) for rank, tensors in shards.items())


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors, in the given order, over files of at most `max_shard_bytes` of payload each.

    The number of files is the smallest possible, and the largest file is as small as possible: files of equal size can
    be written and read in parallel to the end. A tensor larger than the limit gets a file of its own. One shard is
    called `model.safetensors`; several are numbered. Without tensors there is one empty shard. Raises `ValueError` for
    a limit below one byte.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    ends = list(accumulate(spec.nbytes for spec in specs.values()))
    stops = _even_stops(ends, max_shard_bytes)
    if len(stops) <= 1:
        return (Shard(file="model.safetensors", specs=specs),)
    items, count = list(specs.items()), len(stops)
    return tuple(
        Shard(file=f"model-{number:05d}-of-{count:05d}.safetensors", specs=dict(items[start:stop]))
        for number, (start, stop) in enumerate(pairwise([0, *stops]), start=1)
    )


def _even_stops(ends: Sequence[int], limit: int) -> list[int]:
    """Return the index after the last tensor of each run: the fewest runs of at most `limit` bytes.

    The largest run is as small as possible. `ends` are the cumulative sizes of the tensors in bytes.
    """
    fewest = len(_greedy_stops(ends, limit))
    low, high = 1, limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy_stops(ends, middle)) <= fewest else (middle + 1, high)
    return _greedy_stops(ends, high)


def _greedy_stops(ends: Sequence[int], limit: int) -> list[int]:
    """Return the index after the last tensor of each run, where each run is filled before the next one starts.

    Every run has at least one tensor, so a run exceeds `limit` when a single tensor does.
    """
    stops: list[int] = []
    start = done = 0
    while start < len(ends):
        start = max(bisect_right(ends, done + limit, start), start + 1)
        # A tensor over the limit gets a run of its own, together with empty tensors directly after it.
        start = bisect_right(ends, ends[start - 1], start)
        done = ends[start - 1]
        stops.append(start)
    return stops


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the payload, and the offset of each tensor in the file.

    Payloads are sorted by item size, largest first, and otherwise keep the given order, so that each begins at a
    multiple of its item size. Raises `ValueError` for a tensor named `__metadata__`.
    """
    if METADATA_KEY in specs:
        raise ValueError(f"{METADATA_KEY} is no name for a tensor in a safetensors file")
    header: dict[str, object] = {METADATA_KEY: {"format": "pt"}}
    begins, begin = {}, 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        begins[name], end = begin, begin + spec.nbytes
        header[name] = {"dtype": spec.dtype.header_name, "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % _PAYLOAD_ALIGNMENT)
    start = LENGTH_BYTES + len(text)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, {name: start + begin for name, begin in begins.items()}

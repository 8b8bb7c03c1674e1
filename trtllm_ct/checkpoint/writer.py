"""Sharded safetensors, written as tensors come: headers first, payload in any order, memory bounded.

What will be written is known from a plan, so every file gets its header and its final size before the first tensor
exists. A payload then goes straight to its place, without waiting for its neighbours in the file.
Layout follows the safetensors format description and the naming that Hugging Face libraries expect.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from trtllm_ct.checkpoint.catalog import INDEX_FILE
from trtllm_ct.checkpoint.header import LENGTH_BYTES, METADATA_KEY, list_some
from trtllm_ct.errors import Fault, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from trtllm_ct.schemes import TensorSpec

__all__ = ["Shard", "ShardedWriter", "encode_header", "plan_shards"]

_CHUNK_BYTES = 16 * 2**20
_MAX_OPEN_FILES = 16
_PAYLOAD_ALIGNMENT = 64
"""Payload begins at a multiple of this, so that in a memory map even wide vector loads are aligned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file to be: its name and the tensors in it, in the order they were planned."""

    file: str
    specs: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of payload."""
        return sum(spec.nbytes for spec in self.specs.values())


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors, in the given order, over files of at most `max_shard_bytes` of payload each.

    A tensor larger than that gets a file of its own. One shard is `model.safetensors`, several are numbered.
    Without tensors there is one empty shard. Raises `ValueError` for a limit below one byte.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    parts: list[dict[str, TensorSpec]] = [{}]
    room = max_shard_bytes
    for name, spec in specs.items():
        if parts[-1] and spec.nbytes > room:
            parts.append({})
            room = max_shard_bytes
        parts[-1][name] = spec
        room -= spec.nbytes
    if len(parts) == 1:
        return (Shard(file="model.safetensors", specs=parts[0]),)
    count = len(parts)
    return tuple(
        Shard(file=f"model-{number:05d}-of-{count:05d}.safetensors", specs=part)
        for number, part in enumerate(parts, start=1)
    )


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the payload, and where in the file each tensor begins.

    Payloads lie widest items first, otherwise in the given order: so each begins at a multiple of its item size.
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


class ShardedWriter:
    """Writes the tensors of `specs` into safetensors files in `directory`, which must exist.

    The constructor makes all files at their final size, each with its header. `write` streams one tensor to its
    place and copies nothing; `finish` proves that none is missing and writes the index. Peak memory beside the
    tensor given is the headers. At most 16 files are open at a time. Leaving the context closes them.
    Raises `UsageError` when the disk has no room for all of it.
    """

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], *, max_shard_bytes: int) -> None:
        self._directory = directory
        self._specs = dict(specs)
        self._shards = plan_shards(self._specs, max_shard_bytes)
        self._places: dict[str, tuple[str, int]] = {}
        self._missing = set(self._specs)
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        _require_room(directory, sum(shard.nbytes for shard in self._shards))
        for shard in self._shards:
            header, begins = encode_header(shard.specs)
            with (directory / shard.file).open("xb") as stream:
                stream.write(header)
                stream.truncate(len(header) + shard.nbytes)
            self._places |= {name: (shard.file, begin) for name, begin in begins.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put the tensor `name` in its place.

        Raises `ValueError` for a tensor that is not as planned: unknown, written before, of other dtype or shape,
        not contiguous, not in CPU memory. Each of these is a mistake of the caller, never of a checkpoint.
        """
        self._require_planned(name, tensor)
        file, offset = self._places[name]
        descriptor = self._descriptor(file)
        octets = _octets(tensor)
        while octets:
            written = os.pwrite(descriptor, octets[:_CHUNK_BYTES], offset)
            octets, offset = octets[written:], offset + written
        self._missing.discard(name)

    def finish(self) -> tuple[str, ...]:
        """Close the files, write the index when there are several, and return the names of all files written.

        Raises `ValueError` when a planned tensor was not written.
        """
        if self._missing:
            raise ValueError(
                f"{len(self._missing)} planned tensors were not written: {list_some(sorted(self._missing))}"
            )
        self.close()
        files = tuple(shard.file for shard in self._shards)
        if len(files) == 1:
            return files
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in self._shards)},
            "weight_map": {name: file for name, (file, _) in sorted(self._places.items())},
        }
        (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return (*files, INDEX_FILE)

    def _require_planned(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._specs:
            raise ValueError(f"{name} is not among the planned tensors")
        if name not in self._missing:
            raise ValueError(f"{name} was written before")
        spec = self._specs[name]
        if tensor.dtype != spec.dtype.torch_dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} was planned as {spec}, not {tensor.dtype} {list(tensor.shape)}")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous in CPU memory, not on {tensor.device}, strides {tensor.stride()}"
            )

    def _descriptor(self, file: str) -> int:
        """The open file; the one used least recently makes room."""
        if file not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[file] = os.open(self._directory / file, os.O_WRONLY)
        self._descriptors.move_to_end(file)
        return self._descriptors[file]


def _octets(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied; valid only while the tensor lives.

    By address, because NumPy has no name for bfloat16 and float8.
    """
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def _require_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UsageError(
            Fault(
                where=str(directory),
                expected=f"room for {needed} bytes of tensors",
                found=f"{free} bytes free",
                remedy="Free some space, or choose an output directory on another disk.",
            )
        )

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_tensors import TensorReader

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError
from trtllm_ct.checkpoint import reader as reader_module
from trtllm_ct.checkpoint import windows
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.reader import Run


def write_file(path: Path, *tensors: tuple[str, str, list[int], bytes], padding: int = 0) -> None:
    """A safetensors file of (name, dtype, shape, payload), its header made `padding` bytes longer."""
    header, at = {}, 0
    for name, dtype, shape, payload in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(payload)]}
        at += len(payload)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(payload for *_, payload in tensors))


@pytest.fixture
def shards(tmp_path: Path) -> Catalog:
    """Five shards of one int32 each, whose value is the number of its shard."""
    for number in range(5):
        payload = number.to_bytes(4, "little")
        write_file(tmp_path / f"{number}.safetensors", (f"t{number}", "I32", [1], payload))
    return Catalog.from_directory(tmp_path)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("padding", [0, 1], ids=["aligned", "misaligned"])
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, dtype: DType, padding: int) -> None:
    """The payload consists of bytes 0 and 1, which are valid for bool too."""
    payload = bytes([1, 0, 1] * 2 * dtype.itemsize)
    write_file(tmp_path / "model.safetensors", ("x", dtype.header_name, [2, 3], payload), padding=padding)

    with TensorReader(Catalog.from_directory(tmp_path)) as reader:
        tensor = reader.read("x")

    assert tensor.dtype == dtype.torch_dtype
    assert tensor.shape == (2, 3)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % dtype.itemsize == 0
    assert bytes(tensor.flatten().view(torch.uint8).tolist()) == payload


def test_scalar_and_empty_tensors(tmp_path: Path) -> None:
    write_file(
        tmp_path / "model.safetensors",
        ("empty", "BF16", [0, 4], b""),
        ("scalar", "I32", [], (7).to_bytes(4, "little")),
        ("last", "F64", [3, 0], b""),
    )

    with TensorReader(Catalog.from_directory(tmp_path)) as reader:
        assert reader.read("empty").shape == (0, 4)
        assert torch.equal(reader.read("scalar"), torch.tensor(7, dtype=torch.int32))
        assert reader.read("last").dtype == torch.float64
        assert reader.read("last").shape == (3, 0)


def test_a_tensor_is_a_view_of_the_file_unless_it_is_misaligned(tmp_path: Path) -> None:
    write_file(
        tmp_path / "model.safetensors", ("a", "I32", [1], bytes(4)), ("b", "U8", [1], b"."), ("c", "I16", [1], b"..")
    )
    size = (tmp_path / "model.safetensors").stat().st_size

    reader = TensorReader(Catalog.from_directory(tmp_path))
    first, third = super(TensorReader, reader).read("a"), super(TensorReader, reader).read("c")

    (whole,) = reader._maps.values()
    assert len(whole) == size
    assert np.shares_memory(first.elements, whole)
    assert not np.shares_memory(third.elements, whole)
    assert third.elements.nbytes == 2


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, ("a", "U8", [4], b"same"))
    before = path.read_bytes()

    with TensorReader(Catalog.from_directory(tmp_path)) as reader:
        reader.read("a").zero_()

    assert path.read_bytes() == before


def test_maps_are_capped_and_hold_no_descriptor(shards: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN_MAPS", 2)
    before = open_descriptors()

    with TensorReader(shards) as reader:
        tensors = [reader.read(f"t{number}") for number in (0, 1, 0, 2, 3, 4)]
        assert len(reader._maps) == 2
        assert open_descriptors() == before

    assert [int(tensor) for tensor in tensors] == [0, 1, 0, 2, 3, 4]


def test_the_least_recently_used_map_is_dropped_first(shards: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN_MAPS", 2)
    with TensorReader(shards) as reader:
        for number in (0, 1, 0, 2):
            reader.read(f"t{number}")

        assert [file for file, *_ in reader._maps] == ["0.safetensors", "2.safetensors"]


class TestLimitedAddresses:
    """Where a process may not use all addresses, windows of files are mapped and not whole files."""

    @pytest.fixture(autouse=True)
    def limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reader_module, "address_limit", lambda: 1 << 31)
        monkeypatch.setattr(windows, "WINDOW_BYTES", mmap.ALLOCATIONGRANULARITY)

    @pytest.mark.parametrize("most", [0, 10**9])
    def test_tensors_in_and_across_windows_are_read_bit_for_bit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
    ) -> None:
        monkeypatch.setattr(reader_module, "_MAX_WINDOW_BYTES", most)
        sizes = [0, 2, 4, mmap.ALLOCATIONGRANULARITY - 2, 3 * mmap.ALLOCATIONGRANULARITY, 6, 0]
        payloads = [np.random.default_rng(size).bytes(size) for size in sizes]
        tensors = [(f"t{number}", "I16", [len(data) // 2], data) for number, data in enumerate(payloads)]
        write_file(tmp_path / "model.safetensors", *tensors)
        before = open_descriptors()

        with TensorReader(Catalog.from_directory(tmp_path)) as reader:
            read = [reader.read(name) for name, *_ in tensors]
            assert open_descriptors() == before

        assert [tensor.numpy().tobytes() for tensor in read] == payloads
        for tensor in read:
            tensor.zero_()
        assert (tmp_path / "model.safetensors").read_bytes().endswith(b"".join(payloads))

    @pytest.mark.parametrize("change", ["shorter", "gone"])
    def test_a_file_that_changed_is_refused(self, tmp_path: Path, change: str) -> None:
        write_file(tmp_path / "model.safetensors", ("a", "U8", [99_999], bytes(99_999)))
        catalog = Catalog.from_directory(tmp_path)
        if change == "gone":
            (tmp_path / "model.safetensors").unlink()
        else:
            os.truncate(tmp_path / "model.safetensors", 50_000)

        with pytest.raises(CatalogError, match="as when the header was read"):
            TensorReader(catalog).read("a")

    def test_a_window_is_unmapped_with_its_last_tensor(self, tmp_path: Path) -> None:
        write_file(tmp_path / "model.safetensors", ("a", "U8", [4], b"same"))
        reader = TensorReader(Catalog.from_directory(tmp_path))
        tensor = reader.read("a")[1:]
        reader.close()
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        assert bytes(tensor.tolist()) == b"ame"

        del tensor

        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_shard_larger_than_the_address_space_is_read(tmp_path: Path) -> None:
    """8 GB that take no room on the disk, in a process with 1 GB more than it has when it begins."""
    size = 8 << 30
    entries = {"a": (0, size - 8, "U8", [size - 8]), "b": (size - 8, size, "F64", [1])}
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for name, (begin, end, dtype, shape) in entries.items()
    }
    text = json.dumps(header).encode().ljust(256)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + size)
    code = f"""
import resource
from pathlib import Path
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.reader import TensorReader
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)
print(float(TensorReader(Catalog.from_directory(Path({str(tmp_path)!r}))).read("b")))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == ("0.0\n", "")


def test_tensors_stay_valid_after_close_and_the_reader_can_read_again(shards: Catalog) -> None:
    with TensorReader(shards) as reader:
        tensor = reader.read("t3")

    assert int(tensor) == 3
    assert int(reader.read("t4")) == 4


def test_bytes_read_counts_the_requested_bytes(shards: Catalog) -> None:
    with TensorReader(shards) as reader:
        reader.read("t0")
        reader.read("t0")

        assert reader.bytes_read == 8


def test_an_unknown_name_is_a_key_error(shards: Catalog) -> None:
    with TensorReader(shards) as reader, pytest.raises(KeyError):
        reader.read("t9")


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 40)], ids=["vanished", "cut"])
def test_a_file_that_changed_since_the_header_was_read_is_refused(shards: Catalog, change: Any) -> None:
    change(shards.directory / "1.safetensors")

    with TensorReader(shards) as reader, pytest.raises(CatalogError, match="changed or vanished") as caught:
        reader.read("t1")

    assert "1.safetensors: t1" in str(caught.value)


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collects (offset, length) of every read-ahead."""
    calls: list[tuple[int, int]] = []

    def advise(_descriptor: int, offset: int, length: int, _advice: int) -> None:
        calls.append((offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    return calls


@pytest.fixture
def one_file(tmp_path: Path) -> Catalog:
    write_file(
        tmp_path / "model.safetensors", *((name, "U8", [10], bytes(10)) for name in "abcde"), ("f", "U8", [0], b"")
    )
    return Catalog.from_directory(tmp_path)


def allow(monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    monkeypatch.setattr(reader_module, "available_memory", lambda: available)


def test_read_ahead_merges_neighbouring_ranges(
    one_file: Catalog, advised: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, 10**6)
    start = one_file.tensors["a"].offset

    with TensorReader(one_file) as reader:
        assert reader.prefetch(map(Run, ["e", "b", "f", "a"])) == 30
        assert reader.bytes_read == 0

    assert advised == [(start, 20), (start + 40, 10)]


@pytest.mark.parametrize(("available", "count"), [(0, 0), (19, 0), (20, 1), (59, 2), (60, 3), (None, 0)])
def test_read_ahead_stays_inside_half_of_the_available_memory(
    one_file: Catalog,
    advised: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    available: int | None,
    count: int,
) -> None:
    allow(monkeypatch, available)

    with TensorReader(one_file) as reader:
        assert reader.prefetch(map(Run, "ecbda")) == 10 * count

    assert sum(length for _, length in advised) == 10 * count


def test_no_read_ahead_on_platforms_without_it(one_file: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 10**6)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)

    with TensorReader(one_file) as reader:
        assert reader.prefetch(map(Run, "abc")) == 0


def test_read_ahead_of_a_vanished_file_is_not_an_error(shards: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 10**6)
    (shards.directory / "1.safetensors").unlink()

    with TensorReader(shards) as reader:
        reader.prefetch(map(Run, ["t0", "t1"]))


def test_read_ahead_works_with_the_real_kernel(one_file: Catalog) -> None:
    with TensorReader(one_file) as reader:
        reader.prefetch(map(Run, "abcdef"))

        assert torch.equal(reader.read("c"), torch.zeros(10, dtype=torch.uint8))

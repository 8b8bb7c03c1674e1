"""read_runs returns the bytes of the requested runs, in the order of the files, and reads no others."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.checkpoint.runs import read_runs

if TYPE_CHECKING:
    from collections.abc import Mapping


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_files(directory: Path, files: Mapping[str, Mapping[str, torch.Tensor]]) -> Catalog:
    """Files as the safetensors library writes them."""
    for file, tensors in files.items():
        save_file(dict(tensors), directory / file, metadata={"format": "pt"})
    return Catalog.from_directory(directory)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Two files, with tensors of several widths, a scalar and an empty one."""
    return write_files(
        tmp_path,
        {
            "b.safetensors": {
                "late.words": torch.arange(12, dtype=torch.int32).view(3, 4),
                "late.scale": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
            },
            "a.safetensors": {
                "early.scalar": torch.tensor(2.5),
                "early.empty": torch.zeros(0, 4, dtype=torch.float16),
                "early.bytes": torch.arange(7, dtype=torch.uint8),
            },
        },
    )


def test_a_whole_tensor_is_the_bytes_in_the_file(catalog: Catalog) -> None:
    found = {run.name: data for run, data in read_runs(catalog, [Run(name) for name in catalog.tensors])}

    stored = {name: tensor for file in catalog.files for name, tensor in load_file(catalog.directory / file).items()}
    assert found == {name: raw_bytes(tensor) for name, tensor in stored.items()}
    assert struct.unpack("<f", found["early.scalar"]) == (2.5,)
    assert found["early.empty"] == b""


@pytest.mark.parametrize(
    ("run", "elements"),
    [
        (Run("late.words", 5, 8), [5, 6, 7]),
        (Run("late.words", 5), [5, 6, 7, 8, 9, 10, 11]),
        (Run("late.words", 11, 12), [11]),
        (Run("late.words", 3, 3), []),
        (Run("late.words", 12), []),
    ],
    ids=str,
)
def test_begin_and_end_of_a_run_count_elements(catalog: Catalog, run: Run, elements: list[int]) -> None:
    """Elements count in storage order, whatever the shape; without an end the run goes up to the last element."""
    ((same, data),) = read_runs(catalog, [run])

    assert same is run
    assert list(struct.unpack(f"<{len(elements)}i", data)) == elements


def test_runs_come_in_the_order_of_files_and_offsets(catalog: Catalog) -> None:
    """In whatever order they are requested: this order is the cheapest to read."""
    runs = [Run("late.words", 8), Run("late.scale"), Run("early.bytes"), Run("late.words", 0, 2), Run("early.scalar")]

    order = [run for run, _ in read_runs(catalog, runs)]

    places = [(catalog.tensors[run.name].file, catalog.tensors[run.name].offset, run.begin) for run in order]
    assert places == sorted(places)
    assert [file for file, *_ in places] == ["a.safetensors"] * 2 + ["b.safetensors"] * 3
    assert sorted(order, key=str) == sorted(runs, key=str)


def test_a_run_requested_twice_is_returned_twice(catalog: Catalog) -> None:
    first, second = read_runs(catalog, [Run("late.words", 1, 3), Run("late.words", 1, 3)])

    assert first == second


def test_without_runs_no_file_is_opened(catalog: Catalog) -> None:
    for file in catalog.files:
        (catalog.directory / file).unlink()

    assert list(read_runs(catalog, [])) == []


def test_an_unknown_name_is_a_key_error(catalog: Catalog) -> None:
    with pytest.raises(KeyError, match=r"missing\.scale"):
        list(read_runs(catalog, [Run("early.bytes"), Run("missing.scale")]))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_run_of_any_tensor_is_a_slice_of_what_the_safetensors_library_reads(data: st.DataObject) -> None:
    dtypes = [DType.U8, DType.I8, DType.BF16, DType.F8_E4M3, DType.I32, DType.F32, DType.I64]
    sizes = data.draw(st.lists(st.tuples(st.sampled_from(dtypes), st.integers(0, 9)), min_size=1, max_size=6))
    tensors = {
        f"t{number}": torch.arange(size * dtype.itemsize, dtype=torch.uint8).add(number).view(dtype.torch_dtype)
        for number, (dtype, size) in enumerate(sizes)
    }
    runs = []
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=6)):
        begin = data.draw(st.integers(0, tensors[name].numel()))
        end = data.draw(st.one_of(st.none(), st.integers(begin, tensors[name].numel())))
        runs.append(Run(name, begin, end))
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{place}.safetensors": {} for place in range(2)}
        for number, name in enumerate(tensors):
            files[f"{number % 2}.safetensors"][name] = tensors[name]
        catalog = write_files(Path(folder), files)
        found = list(read_runs(catalog, runs))
        stored = {name: tensor for file in files for name, tensor in load_file(Path(folder) / file).items()}

    assert sorted(str(run) for run, _ in found) == sorted(map(str, runs))
    for run, data_ in found:
        assert data_ == raw_bytes(stored[run.name][run.begin : run.end])


# Files that changed since their headers were read.


def test_a_shorter_file_is_named_with_the_tensor(catalog: Catalog) -> None:
    """Runs before the end of the file are still returned: the error is raised at the run that passes it."""
    path = catalog.directory / "b.safetensors"
    words = catalog.tensors["late.words"]
    os.truncate(path, words.offset + 20)
    reads = read_runs(catalog, [Run("late.words", 0, 5), Run("late.words", 4)])

    assert next(reads)[1] == struct.pack("<5i", *range(5))
    with pytest.raises(CatalogError) as raised:
        next(reads)

    (fault,) = raised.value.faults
    assert fault.where == "b.safetensors: late.words"
    assert fault.expected == f"48 bytes at byte {words.offset}, as when the header was read"
    assert fault.found == f"a file that ends before byte {words.offset + 48}"
    assert "changed or vanished while it was in use" in fault.remedy


def test_a_file_that_is_gone_is_named_with_its_first_tensor(catalog: Catalog) -> None:
    (catalog.directory / "b.safetensors").unlink()

    with pytest.raises(CatalogError) as raised:
        list(read_runs(catalog, [Run("late.scale"), Run("late.words"), Run("early.bytes")]))

    (fault,) = raised.value.faults
    first = min(("late.scale", "late.words"), key=lambda name: catalog.tensors[name].offset)
    assert fault.where == f"b.safetensors: {first}"
    assert "No such file" in fault.found
    assert "wait until it is complete and start again" in fault.remedy


def test_a_directory_in_place_of_a_file_is_an_error_of_the_catalog(catalog: Catalog) -> None:
    (catalog.directory / "a.safetensors").unlink()
    (catalog.directory / "a.safetensors").mkdir()

    with pytest.raises(CatalogError, match="a directory"):
        list(read_runs(catalog, [Run("early.bytes")]))


# What it costs.


def test_only_the_bytes_of_the_runs_are_read(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffered file would read 128 KiB for a scalar."""
    sizes = []
    plain = os.pread

    def noted(descriptor: int, nbytes: int, offset: int) -> bytes:
        sizes.append(nbytes)
        return plain(descriptor, nbytes, offset)

    monkeypatch.setattr(os, "pread", noted)

    runs = [Run("early.scalar"), Run("late.words", 0, 1), Run("late.words", 2, 3)]
    read = [len(data) for _, data in read_runs(catalog, runs)]

    assert sizes == read


def test_all_reads_of_a_file_are_announced_before_the_first(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, nbytes, advice: announced.append((offset, nbytes)))
    words = catalog.tensors["late.words"].offset

    reads = read_runs(catalog, [Run("late.words", 2, 4), Run("late.words", 0, 1)])

    assert next(reads)[1] == struct.pack("<i", 0)
    assert announced == [(words, 4), (words + 8, 8)]


@pytest.mark.parametrize("missing", [True, False], ids=["no such call", "a call that fails"])
def test_read_ahead_that_is_not_available_changes_nothing(
    catalog: Catalog, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(29, "Illegal seek")

    if missing:
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, "posix_fadvise", refuse)

    ((_, data),) = read_runs(catalog, [Run("early.bytes", 3, 5)])

    assert data == bytes([3, 4])


def test_files_are_closed_one_after_the_other_and_at_the_end(catalog: Catalog) -> None:
    """Also when the caller does not read the remaining runs."""
    weight_files = {(catalog.directory / file).resolve() for file in catalog.files}

    def still_open() -> int:
        return sum(Path(os.path.realpath(entry)) in weight_files for entry in Path("/proc/self/fd").iterdir())

    reads = read_runs(catalog, [Run(name) for name in catalog.tensors])
    assert max(still_open() for _ in reads) == 1
    assert still_open() == 0
    reads = read_runs(catalog, [Run(name) for name in catalog.tensors])
    next(reads)
    reads.close()
    assert still_open() == 0


def test_no_heavy_package_is_imported(catalog: Catalog) -> None:
    done = run_python(
        """
        import sys
        from pathlib import Path
        from trtllm_ct.checkpoint.catalog import Catalog
        from trtllm_ct.checkpoint.reader import Run
        from trtllm_ct.checkpoint.runs import read_runs

        catalog = Catalog.from_directory(Path(sys.argv[1]))
        print([data for _, data in read_runs(catalog, [Run("early.bytes", 0, 2)])])
        print(sorted({"torch", "numpy", "numba"} & set(sys.modules)))
        """,
        catalog.directory,
    )

    assert done.stdout.splitlines() == [r"[b'\x00\x01']", "[]"]

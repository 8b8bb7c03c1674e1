from __future__ import annotations

import json
import os
import resource
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_tensors import ShardedWriter, TensorReader, TensorWriter
from safetensors import safe_open
from safetensors.torch import load_file

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import UsageError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint import file_calls, transfer
from trtllm_ct.checkpoint.catalog import INDEX_FILE, Catalog
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.write_plan import WritePlan, encode_header, plan_shards
from trtllm_ct.checkpoint.writer import create_files

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE_BYTE = TensorSpec(DType.U8, (1,))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def random_tensor(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaN and infinity included; zeros and ones for bool."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if spec.dtype is DType.BOOL else 256
    raw = torch.randint(0, top, (spec.nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(spec.dtype.torch_dtype).view(spec.shape)


def write_all(directory: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> tuple[str, ...]:
    specs = {name: TensorSpec(DType.from_torch(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    with ShardedWriter(directory, specs, max_shard_bytes=max_shard_bytes) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        return writer.finish()


def shard_names(sizes: list[int], limit: int) -> list[list[str]]:
    specs = {f"t{number}": TensorSpec(DType.U8, (size,)) for number, size in enumerate(sizes)}
    return [list(shard.specs) for shard in plan_shards(specs, limit)]


def test_tensors_fill_shards_in_the_order_given() -> None:
    assert shard_names([4, 4, 4, 2, 3], 8) == [["t0", "t1"], ["t2", "t3"], ["t4"]]


def test_a_tensor_over_the_limit_gets_a_shard_of_its_own() -> None:
    assert shard_names([1, 9, 1], 4) == [["t0"], ["t1"], ["t2"]]


def test_an_empty_tensor_never_begins_a_shard() -> None:
    assert shard_names([4, 0, 0, 4], 4) == [["t0", "t1", "t2"], ["t3"]]


def test_a_single_shard_is_called_model_and_several_are_numbered() -> None:
    specs = {"a": ONE_BYTE, "b": ONE_BYTE}

    assert [shard.file for shard in plan_shards(specs, 2)] == ["model.safetensors"]
    assert [shard.file for shard in plan_shards(specs, 1)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_no_tensors_make_one_empty_shard() -> None:
    (shard,) = plan_shards({}, 1)

    assert shard.file == "model.safetensors"
    assert shard.nbytes == 0


def test_a_limit_below_one_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_shards({}, 0)


@given(
    sizes=st.lists(st.integers(0, 20), max_size=30),
    limit=st.integers(1, 40),
)
def test_shards_keep_all_tensors_in_order_and_the_limit(sizes: list[int], limit: int) -> None:
    specs = {f"t{number}": TensorSpec(DType.U8, (size,)) for number, size in enumerate(sizes)}

    shards = plan_shards(specs, limit)

    assert [name for shard in shards for name in shard.specs] == list(specs)
    assert all(shard.nbytes <= limit or sum(spec.nbytes > 0 for spec in shard.specs.values()) == 1 for shard in shards)


def test_every_tensor_is_aligned_and_payload_begins_at_64() -> None:
    specs = {dtype.name: TensorSpec(dtype, (3,)) for dtype in DType}

    header, begins = encode_header(specs)

    assert len(header) % 64 == 0
    assert min(begins.values()) == len(header)
    assert all(begins[name] % spec.dtype.itemsize == 0 for name, spec in specs.items())
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}


def test_tensors_of_equal_width_keep_their_order() -> None:
    _, begins = encode_header(dict.fromkeys("cab", ONE_BYTE))

    assert list(begins) == ["c", "a", "b"]


def test_the_metadata_key_is_refused_as_a_tensor_name() -> None:
    with pytest.raises(ValueError, match="__metadata__"):
        encode_header({"__metadata__": ONE_BYTE})


SPECS = st.builds(TensorSpec, st.sampled_from(list(DType)), st.lists(st.integers(0, 5), max_size=3).map(tuple))


@settings(max_examples=60, deadline=None)
@given(specs=st.dictionaries(st.text('abcé."\\\n', max_size=6), SPECS, max_size=6), limit=st.integers(1, 200))
def test_what_is_written_reads_back_bit_for_bit_here_and_in_the_safetensors_library(
    specs: dict[str, TensorSpec], limit: int
) -> None:
    tensors = {name: random_tensor(spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        files = write_all(directory, tensors, limit)
        catalog = Catalog.from_directory(directory)
        with TensorReader(catalog) as reader:
            ours = {name: reader.read(name) for name in catalog.tensors}
        theirs = {name: t for file in catalog.files for name, t in load_file(directory / file).items()}

    assert catalog.warnings == ()
    assert set(files) - {INDEX_FILE} == set(catalog.files)
    for found in (ours, theirs):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert torch.equal(raw_bytes(found[name]), raw_bytes(tensor))


def test_the_safetensors_library_opens_a_shard(tmp_path: Path) -> None:
    write_all(tmp_path, {"a": torch.arange(6, dtype=torch.float32).view(2, 3)})

    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert torch.equal(opened.get_slice("a")[1:], torch.tensor([[3.0, 4.0, 5.0]]))


def test_several_shards_come_with_an_index(tmp_path: Path) -> None:
    files = write_all(tmp_path, {"b": torch.zeros(4), "a": torch.zeros(2)}, 16)

    assert files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX_FILE)
    assert json.loads((tmp_path / INDEX_FILE).read_text()) == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    assert write_all(tmp_path, {"a": torch.zeros(2)}) == ("model.safetensors",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(4), "a": torch.ones(3, dtype=torch.bool)}
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_all(tmp_path / name, tensors)

    assert (tmp_path / "x/model.safetensors").read_bytes() == (tmp_path / "y/model.safetensors").read_bytes()


def test_a_payload_is_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the system accepts fewer bytes than were passed."""
    sizes = []
    pwrite = os.pwrite

    def stingy(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", stingy)
    monkeypatch.setattr(transfer, "WRITE_BYTES", 10)
    tensor = random_tensor(TensorSpec(DType.BF16, (3, 7)))

    write_all(tmp_path, {"a": tensor})

    assert max(sizes) == 10
    assert torch.equal(raw_bytes(load_file(tmp_path / "model.safetensors")["a"]), raw_bytes(tensor))


def test_open_files_are_capped(tmp_path: Path) -> None:
    """80 shards, visited in turn twice, by a process that may open few files."""
    specs = {f"t{number}": TensorSpec(DType.U8, (1,)) for number in range(80)}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 30, hard))
    try:
        with ShardedWriter(tmp_path, specs, max_shard_bytes=1) as writer:
            for number in (*range(0, 80, 2), *range(1, 80, 2)):
                writer.write(f"t{number}", torch.tensor([number], dtype=torch.uint8))
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with TensorReader(Catalog.from_directory(tmp_path)) as reader:
        assert [int(reader.read(name)) for name in specs] == list(range(80))


PLANNED = TensorSpec(DType.BF16, (2, 3))
WRONG_TENSORS = {
    "other dtype": (torch.zeros(2, 3), r"planned as bfloat16 \[2, 3\], not float32 \[2, 3\]"),
    "other shape": (torch.zeros(3, 2, dtype=torch.bfloat16), r"not bfloat16 \[3, 2\]"),
    "strided view": (torch.zeros(3, 2, dtype=torch.bfloat16).T, "must be contiguous"),
}


@pytest.mark.parametrize(("tensor", "said"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_tensor_that_differs_from_the_plan_is_a_value_error(tmp_path: Path, tensor: torch.Tensor, said: str) -> None:
    with ShardedWriter(tmp_path, {"a": PLANNED}, max_shard_bytes=99) as writer, pytest.raises(ValueError, match=said):
        writer.write("a", tensor)


def test_an_unplanned_name_is_a_value_error(tmp_path: Path) -> None:
    tensor = torch.zeros(1, dtype=torch.uint8)

    with (
        ShardedWriter(tmp_path, {"a": ONE_BYTE}, max_shard_bytes=9) as writer,
        pytest.raises(ValueError, match="b is not among the planned tensors"),
    ):
        writer.write("b", tensor)


def test_writing_a_tensor_twice_is_a_value_error(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, {"a": ONE_BYTE}, max_shard_bytes=9) as writer:
        writer.write("a", torch.zeros(1, dtype=torch.uint8))
        with pytest.raises(ValueError, match="a was written before"):
            writer.write("a", torch.zeros(1, dtype=torch.uint8))


def test_a_missing_tensor_is_a_value_error(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, {"a": ONE_BYTE, "b": ONE_BYTE}, max_shard_bytes=9) as writer:
        writer.write("a", torch.zeros(1, dtype=torch.uint8))
        with pytest.raises(ValueError, match="1 planned tensors were not written: b"):
            writer.finish()


def test_leaving_the_context_closes_every_file(tmp_path: Path) -> None:
    """Also when the context is left by an error."""
    before = open_descriptors()

    def fail() -> None:
        with ShardedWriter(tmp_path, {"a": ONE_BYTE}, max_shard_bytes=9) as writer:
            writer.write("a", torch.zeros(1, dtype=torch.uint8))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert open_descriptors() == before


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_calls, "free_bytes", lambda _: 99)

    with pytest.raises(UsageError, match="room for 228 bytes, found 99 bytes free"):
        ShardedWriter(tmp_path, {"a": TensorSpec(DType.U8, (100,))}, max_shard_bytes=10**9)

    assert list(tmp_path.iterdir()) == []


def test_memory_stays_bounded_by_the_tensor(tmp_path: Path) -> None:
    """Writing 64 MiB from a mapped file to another adds no copy of it to the process's own memory."""
    spec = TensorSpec(DType.BF16, (2**25,))
    source, out = tmp_path / "source", tmp_path / "out"
    for directory in (source, out):
        directory.mkdir()
    ShardedWriter(source, {"a": spec}, max_shard_bytes=10**9).close()

    with (
        TensorReader(Catalog.from_directory(source)) as reader,
        ShardedWriter(out, {"a": spec}, max_shard_bytes=10**9) as writer,
    ):
        tensor = reader.read("a")
        before = _anonymous_bytes()
        writer.write("a", tensor)
        after = _anonymous_bytes()

    assert after - before < 2**23


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


FOUR_ROWS = {"first": TensorSpec(DType.U8, (4, 8)), "second": TensorSpec(DType.U8, (4, 8))}


@pytest.fixture
def rows_writer(tmp_path: Path) -> Iterator[TensorWriter]:
    """A writer of two tensors of four rows, one behind the other in a file."""
    plan = WritePlan.of(FOUR_ROWS, 10**9)
    create_files(Folder(tmp_path), plan)
    with TensorWriter(Folder(tmp_path), plan) as writer:
        yield writer


@pytest.mark.parametrize(("row", "count"), [(4, 1), (5, 2), (3, 2), (-1, 1)])
def test_rows_outside_a_tensor_are_refused(rows_writer: TensorWriter, tmp_path: Path, row: int, count: int) -> None:
    """They would land in the neighbour."""
    with pytest.raises(ValueError, match=r"first has 32 bytes, and .* lie outside"):
        rows_writer.write("first", torch.ones(count, 8, dtype=torch.uint8), row)

    assert rows_writer.pieces == []
    assert not (load_file(tmp_path / "model.safetensors")["second"]).any()


@pytest.mark.parametrize(("rows", "again"), [((0, 2), (1, 2)), ((1, 2), (0, 2)), ((0, 4), (3, 1)), ((2, 1), (2, 1))])
def test_rows_that_were_written_are_refused(
    rows_writer: TensorWriter, rows: tuple[int, int], again: tuple[int, int]
) -> None:
    rows_writer.write("second", torch.ones(rows[1], 8, dtype=torch.uint8), rows[0])

    with pytest.raises(ValueError, match="second was written before"):
        rows_writer.write("second", torch.ones(again[1], 8, dtype=torch.uint8), again[0])


@given(order=st.permutations(range(4)))
@settings(max_examples=24)
def test_a_tensor_is_complete_when_each_row_was_written_once(order: list[int]) -> None:
    with tempfile.TemporaryDirectory() as place:
        plan = WritePlan.of(FOUR_ROWS, 10**9)
        create_files(Folder(Path(place)), plan)
        with TensorWriter(Folder(Path(place)), plan) as writer:
            for row in order:
                assert not writer.is_complete("first")
                writer.write("first", torch.full((1, 8), row + 1, dtype=torch.uint8), row)
            assert writer.is_complete("first")
        assert load_file(Path(place) / "model.safetensors")["first"][:, 0].tolist() == [1, 2, 3, 4]

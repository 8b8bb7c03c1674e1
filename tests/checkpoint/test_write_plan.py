"""Where every byte of an output goes: exactly where the safetensors library, which did not plan it, reads it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import FrozenInstanceError, replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import safetensors
import torch
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import INDEX_FILE, Catalog
from trtllm_ct.checkpoint.write_plan import Shard, WritePlan, encode_header

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SPECS = st.dictionaries(
    st.text('abcé."\\\n😀', max_size=6), st.builds(TensorSpec, st.sampled_from(list(DType)), SHAPES), max_size=8
)
MIXED = {
    "weight": TensorSpec(DType.U8, (3, 7)),
    "scale": TensorSpec(DType.F32, (3,)),
    "zero": TensorSpec(DType.I8, (5,)),
    "norm": TensorSpec(DType.BF16, (9,)),
    "shape": TensorSpec(DType.I64, (2,)),
    "none": TensorSpec(DType.F64, (0, 4)),
    "scalar": TensorSpec(DType.F16, ()),
}


def payload(place: int, spec: TensorSpec) -> bytes:
    """Bytes that tell one tensor from another, and are a sound bool too."""
    top = 2 if spec.dtype is DType.BOOL else 251
    return bytes((place * 7 + octet) % top for octet in range(spec.nbytes))


def fill(directory: Path, plan: WritePlan) -> dict[str, bytes]:
    """Files as a plan has them, written with nothing but their headers, sizes and places."""
    for file in plan.files:
        content = bytearray(file.nbytes)
        content[: len(file.header)] = file.header
        (directory / file.name).write_bytes(content)
    written = {}
    for number, (name, place) in enumerate(plan.places.items()):
        written[name] = payload(number, place.spec)
        with (directory / place.file).open("r+b") as stream:
            stream.seek(place.offset)
            stream.write(written[name])
    if plan.index is not None:
        (directory / INDEX_FILE).write_text(plan.index, encoding="utf-8")
    return written


# An outsider reads it.


@settings(max_examples=60, deadline=None)
@given(specs=SPECS, limit=st.integers(1, 150))
def test_the_safetensors_library_finds_every_tensor_in_its_place(specs: dict[str, TensorSpec], limit: int) -> None:
    """It also refuses holes, overlaps, surplus bytes and headers that don't add up."""
    plan = WritePlan.of(specs, limit)
    with tempfile.TemporaryDirectory() as folder:
        written = fill(Path(folder), plan)
        found = {name: entry for file in plan.files for name, entry in deserialized(Path(folder) / file.name)}

    assert found.keys() == specs.keys()
    for name, spec in specs.items():
        assert (found[name]["dtype"], tuple(found[name]["shape"])) == (spec.dtype.header_name, spec.shape)
        assert bytes(found[name]["data"]) == written[name]


def deserialized(path: Path) -> list[tuple[str, dict[str, object]]]:
    """Name and entry of each tensor, without torch in between."""
    return safetensors.deserialize(path.read_bytes())


def test_the_dtypes_in_the_header_are_those_of_torch(tmp_path: Path) -> None:
    specs = {dtype.name: TensorSpec(dtype, (3,)) for dtype in DType}
    fill(tmp_path, WritePlan.of(specs, 10**6))

    loaded = load_file(tmp_path / "model.safetensors")

    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: spec.dtype.torch_dtype for name, spec in specs.items()
    }


def test_a_catalog_agrees_with_the_plan(tmp_path: Path) -> None:
    """On files, offsets, dtypes and shapes; the index causes no warnings."""
    plan = WritePlan.of(MIXED, 25)
    fill(tmp_path, plan)

    catalog = Catalog.from_directory(tmp_path)

    assert len(plan.files) > 2
    assert dict(catalog.tensors) == dict(plan.places)
    assert catalog.files == tuple(file.name for file in plan.files)
    assert catalog.warnings == ()
    assert sum(tensor.spec.nbytes for tensor in catalog.tensors.values()) == plan.payload_bytes


# Places.


@settings(max_examples=80, deadline=None)
@given(specs=SPECS, limit=st.integers(1, 150))
def test_places_fill_each_file_from_its_header_to_its_end(specs: dict[str, TensorSpec], limit: int) -> None:
    """Without holes or overlaps, each at a multiple of its item size, the first at a multiple of 64."""
    plan = WritePlan.of(specs, limit)

    assert list(plan.places) == list(specs)
    for file in plan.files:
        extents = sorted((place.offset, place.spec.nbytes) for place in plan.places.values() if place.file == file.name)
        end = len(file.header)
        assert end % 64 == 0
        for offset, nbytes in extents:
            assert offset == end
            end += nbytes
        assert file.nbytes == end
    for name, place in plan.places.items():
        assert place.name == name
        assert place.spec == specs[name]
        assert place.offset % place.spec.dtype.itemsize == 0


def test_the_widest_items_lie_first_and_equal_ones_as_given() -> None:
    places = WritePlan.of(MIXED, 10**6).places

    order = sorted(places, key=lambda name: (places[name].offset, places[name].spec.nbytes > 0))
    assert [name for name in order if MIXED[name].nbytes] == ["shape", "scale", "norm", "scalar", "weight", "zero"]


@pytest.mark.parametrize("length", range(1, 70))
def test_however_long_the_names_are_payload_begins_at_64(length: int) -> None:
    header, begins = encode_header({"n" * length: TensorSpec(DType.F64, (1,))})

    assert begins == {"n" * length: len(header)}
    assert len(header) % 64 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert len(header) - 8 - len(header[8:].rstrip(b" ")) < 64


def test_a_header_is_utf8_json_that_names_the_framework() -> None:
    """Libraries refuse a file without `format`; offsets count from the end of the header."""
    header, _ = encode_header({"é😀": TensorSpec(DType.BF16, (2, 3)), "b": TensorSpec(DType.F32, ())})

    assert json.loads(header[8:].decode("utf-8")) == {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "é😀": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
    }
    assert "é😀".encode() in header


# Files.


def fewest_runs(sizes: tuple[int, ...], limit: int) -> int:
    """By trying every first run: at most `limit` bytes, or one tensor beyond it and empty ones behind."""
    if not sizes:
        return 0
    firsts = [sizes[:stop] for stop in range(1, len(sizes) + 1)]
    allowed = [first for first in firsts if sum(first) in {*range(limit + 1), first[0]}]
    return 1 + min(fewest_runs(sizes[len(first) :], limit) for first in allowed)


def smallest_largest_run(sizes: tuple[int, ...], runs: int) -> int:
    """By trying every split into at most so many runs."""
    splits = combinations(range(1, len(sizes)), min(runs, max(len(sizes), 1)) - 1)
    return min(max(sum(sizes[i:j]) for i, j in pairwise([0, *stops, len(sizes)])) for stops in splits)


@given(specs=SPECS, limit=st.integers(1, 150))
@settings(max_examples=80, deadline=None)
def test_files_are_as_few_as_the_limit_allows_and_as_even_as_possible(specs: dict[str, TensorSpec], limit: int) -> None:
    """No file is over the limit, except for a tensor that is over the limit itself.

    No other split into as many runs has a smaller largest run.
    """
    plan = WritePlan.of(specs, limit)
    held = {file.name: file.nbytes - len(file.header) for file in plan.files}
    by_file: dict[str, list[str]] = {file.name: [] for file in plan.files}
    for name, place in plan.places.items():
        by_file[place.file].append(name)

    groups = list(by_file.items())
    for file, names in groups:
        assert held[file] <= limit or sum(specs[name].nbytes > 0 for name in names) == 1
    sizes = tuple(spec.nbytes for spec in specs.values())
    assert len(groups) == max(1, fewest_runs(sizes, limit))
    assert max(held.values()) == smallest_largest_run(sizes, len(groups))
    assert [name for _, names in groups for name in names] == list(specs)


@pytest.mark.parametrize(("limit", "sizes"), [(12, [12, 12, 12]), (11, [9, 9, 9, 9]), (35, [18, 18]), (36, [36])])
def test_a_limit_is_reached_exactly_and_never_passed(limit: int, sizes: list[int]) -> None:
    """Twelve tensors of 3 bytes; the header doesn't count."""
    plan = WritePlan.of({f"t{number}": TensorSpec(DType.U8, (3,)) for number in range(12)}, limit)

    assert [file.nbytes - len(file.header) for file in plan.files] == sizes


def test_one_file_needs_no_index() -> None:
    plan = WritePlan.of(MIXED, 10**6)

    assert plan.index is None
    assert plan.file_names == ("model.safetensors",)


def test_several_files_have_an_index_of_every_name() -> None:
    plan = WritePlan.of(MIXED, 30)
    total = sum(spec.nbytes for spec in MIXED.values())

    assert plan.index is not None
    index = json.loads(plan.index)
    assert index == {
        "metadata": {"total_size": total},
        "weight_map": {name: place.file for name, place in plan.places.items()},
    }
    assert list(index["weight_map"]) == sorted(MIXED)
    assert plan.payload_bytes == total
    assert plan.file_names == (*(file.name for file in plan.files), INDEX_FILE)


def test_without_tensors_there_is_one_empty_file(tmp_path: Path) -> None:
    plan = WritePlan.of({}, 1)
    fill(tmp_path, plan)

    assert (plan.file_names, plan.payload_bytes, dict(plan.places)) == (("model.safetensors",), 0, {})
    assert load_file(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_byte_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_shard_bytes must be at least 1, not {limit}"):
        WritePlan.of(MIXED, limit)


def test_the_metadata_key_is_refused_as_a_tensor_name_in_any_position() -> None:
    """A reader would take the tensor for the metadata."""
    with pytest.raises(ValueError, match="__metadata__ is no name for a tensor"):
        WritePlan.of(MIXED | {"__metadata__": TensorSpec(DType.U8, (1,))}, 5)


def test_a_plan_is_frozen() -> None:
    plan = WritePlan.of(MIXED, 30)

    with pytest.raises(FrozenInstanceError):
        plan.files = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.places["more"] = plan.places["norm"]  # type: ignore[index]
    assert Shard(file="x", specs=MIXED).nbytes == plan.payload_bytes


# The digest.

PLAIN = {"a": TensorSpec(DType.U8, (2, 3)), "b": TensorSpec(DType.U8, (6,)), "c": TensorSpec(DType.U8, (1,))}
OTHERS = {
    "another name": (PLAIN | {"d": PLAIN["c"]}, 12),
    "a name less": ({name: PLAIN[name] for name in "ab"}, 12),
    "a name that is spelled otherwise": ({"A" if name == "a" else name: spec for name, spec in PLAIN.items()}, 12),
    "another dtype of one width": (PLAIN | {"b": TensorSpec(DType.I8, (6,))}, 12),
    "another shape of one size": (PLAIN | {"b": TensorSpec(DType.U8, (3, 2))}, 12),
    "another order": (dict(reversed(PLAIN.items())), 12),
    "names that changed places": ({"b": PLAIN["b"], "a": PLAIN["a"], "c": PLAIN["c"]}, 12),
    "files of another size": (PLAIN, 6),
    "one file": (PLAIN, 13),
    "nothing": ({}, 12),
}


@pytest.mark.parametrize(("specs", "limit"), OTHERS.values(), ids=OTHERS.keys())
def test_a_plan_that_writes_anything_to_another_place_has_another_digest(
    specs: dict[str, TensorSpec], limit: int
) -> None:
    assert WritePlan.of(specs, limit).digest() != WritePlan.of(PLAIN, 12).digest()


def test_all_plans_that_differ_have_different_digests() -> None:
    assert len({WritePlan.of(specs, limit).digest() for specs, limit in OTHERS.values()}) == len(OTHERS)


@settings(max_examples=60, deadline=None)
@given(one=SPECS, other=SPECS, limits=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_digests_are_equal_exactly_where_all_bytes_go_to_the_same_places(
    one: dict[str, TensorSpec], other: dict[str, TensorSpec], limits: tuple[int, int]
) -> None:
    first, second, third = WritePlan.of(one, limits[0]), WritePlan.of(one, limits[1]), WritePlan.of(other, limits[0])
    for another in (second, third):
        same = (first.files, dict(first.places)) == (another.files, dict(another.places))
        assert (first.digest() == another.digest()) is same


def test_a_limit_that_changes_no_file_changes_no_digest() -> None:
    """A conversion may be resumed with another limit when it writes the same files."""
    assert WritePlan.of(PLAIN, 12).digest() == WritePlan.of(PLAIN, 12).digest()
    assert WritePlan.of(PLAIN, 100).digest() == WritePlan.of(PLAIN, 13).digest()


def test_a_changed_file_changes_the_digest() -> None:
    plan = WritePlan.of(PLAIN, 12)
    first, *rest = plan.files
    for file in (
        replace(first, name="other.safetensors"),
        replace(first, nbytes=first.nbytes + 1),
        replace(first, header=first.header.replace(b"U8", b"I8", 1)),
    ):
        assert replace(plan, files=(file, *rest)).digest() != plan.digest()


def test_the_digest_is_the_same_in_every_process() -> None:
    """Conversions are resumed by other processes, whose string hashes differ."""
    done = run_python(
        """
        import sys
        from trtllm_ct.checkpoint.write_plan import WritePlan
        from trtllm_ct.base.dtypes import DType
        from trtllm_ct.base.schemes import TensorSpec

        specs = {"a": TensorSpec(DType.U8, (2, 3)), "b": TensorSpec(DType.U8, (6,)), "c": TensorSpec(DType.U8, (1,))}
        print(WritePlan.of(specs, 12).digest().hex(), "torch" in sys.modules)
        """
    )

    assert done.stdout.split() == [WritePlan.of(PLAIN, 12).digest().hex(), "False"]


def test_a_tensor_of_many_gigabytes_is_planned_in_no_memory() -> None:
    plan = WritePlan.of({"a": TensorSpec(DType.BF16, (2**20, 2**16)), "b": TensorSpec(DType.U8, (1,))}, 5 * 2**30)

    first, second = plan.files
    assert first.nbytes == len(first.header) + 2**37
    assert plan.places["b"].offset == len(second.header)
    assert torch.Size((2**20, 2**16)).numel() * 2 + 1 == plan.payload_bytes

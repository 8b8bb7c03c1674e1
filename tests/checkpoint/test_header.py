from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.header import MAX_HEADER_BYTES, StoredTensor, format_names, parse_json_object, read_header

if TYPE_CHECKING:
    from pathlib import Path

FILE = "model.safetensors"


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def encode(header: Any, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def read(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / FILE
    path.write_bytes(content)
    return read_header(path, FILE)


def refusal(tmp_path: Path, content: bytes) -> CatalogError:
    with pytest.raises(CatalogError) as caught:
        read(tmp_path, content)
    return caught.value


def test_tensors_come_in_the_order_of_their_bytes_with_absolute_offsets(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "late": entry("I32", [2, 1], 3, 11),
        "early": entry("BOOL", [3], 0, 3),
    }
    content = encode(header, bytes(11))

    found = read(tmp_path, content)

    assert list(found.tensors) == ["early", "late"]
    start = len(content) - 11
    assert found.tensors["late"] == StoredTensor(
        name="late", spec=TensorSpec(DType.I32, (2, 1)), file=FILE, offset=start + 3
    )
    assert found.metadata == {"format": "pt"}


def test_scalar_and_empty_tensors_are_valid(tmp_path: Path) -> None:
    header = {"none": entry("F32", [0, 5], 0, 0), "scalar": entry("F32", [], 0, 4), "end": entry("U8", [0], 4, 4)}

    found = read(tmp_path, encode(header, bytes(4)))

    assert [tensor.spec.shape for tensor in found.tensors.values()] == [(0, 5), (), (0,)]


def test_equal_specs_of_all_files_are_the_same_object(tmp_path: Path) -> None:
    first, second, other = (
        read(tmp_path, encode({name: entry(dtype, [2], 0, 8)}, bytes(8))).tensors[name].spec
        for name, dtype in (("a", "F32"), ("b", "F32"), ("c", "I32"))
    )

    assert first is second
    assert (first.nbytes, other) == (8, TensorSpec(DType.I32, (2,)))


@pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.name)
def test_every_dtype_of_the_table_is_read(tmp_path: Path, dtype: DType) -> None:
    header = {"x": entry(dtype.header_name, [3], 0, 3 * dtype.itemsize)}

    assert read(tmp_path, encode(header, bytes(3 * dtype.itemsize))).tensors["x"].spec == TensorSpec(dtype, (3,))


def test_a_header_without_tensors_is_valid(tmp_path: Path) -> None:
    assert read(tmp_path, encode({})).tensors == {}


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4968\n"

DAMAGED_FILES = {
    "empty file": (b"", "at least 8 bytes, found 0 bytes", "download it again"),
    "seven bytes": (bytes(7), "at least 8 bytes, found 7 bytes", "download it again"),
    "LFS pointer": (LFS_POINTER, "a Git LFS pointer", "this is an LFS pointer, run git lfs pull"),
    "absurd length": (b"<!DOCTYPE html>", f"at most {MAX_HEADER_BYTES} bytes", "This is no safetensors file"),
    "length over the limit": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        f"at most {MAX_HEADER_BYTES} bytes",
        "This is no safetensors file",
    ),
    "truncated header": (encode({"x": entry("U8", [1], 0, 1)})[:-3], "in the whole file", "download it again"),
    "no JSON": (encode(b"{]"), "can't be parsed", "download it again"),
    "nothing": (encode(b""), "can't be parsed", "download it again"),
    "no UTF-8": (encode(b'{"\xff": 1}'), "can't be parsed", "download it again"),
    "UTF-16": (encode('{"x": 1}'.encode("utf-16")), "can't be parsed", "download it again"),
    "half a surrogate pair": (encode(rb'{"\ud800": 1}'), "can't be parsed", "download it again"),
    "endless nesting": (encode(b"[" * 100_000), "can't be parsed", "download it again"),
    "endless integer": (encode(b'{"x": ' + b"9" * 5000 + b"}"), "can't be parsed", "download it again"),
    "an array": (encode([]), "a JSON object, found a JSON list", "download it again"),
    "truncated payload": (encode({"x": entry("U8", [4], 0, 4)}, bytes(3)), "3 bytes, a truncated", "download it again"),
    "trailing bytes": (
        encode({"x": entry("U8", [4], 0, 4)}, bytes(6)),
        "2 bytes more that belong",
        "download it again",
    ),
    "payload of nobody": (encode({}, bytes(6)), "6 bytes more that belong to no tensor", "download it again"),
    "out of range": (encode({"x": entry("U8", [9], 0, 9)}, bytes(4)), "9 bytes of payload", "download it again"),
    "name twice": (
        encode(b'{"x": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "x": 1}'),
        "each name once, found more than once: x",
        "save the checkpoint again",
    ),
    "metadata of numbers": (encode({"__metadata__": {"a": 1}}), "__metadata__: expected an object of texts", "save"),
    "metadata no object": (encode({"__metadata__": "pt"}), 'an object of texts, found "pt"', "save"),
}


@pytest.mark.parametrize(("content", "said", "remedy"), DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_a_damaged_file_is_refused_by_name_with_a_remedy(
    tmp_path: Path, content: bytes, said: str, remedy: str
) -> None:
    error = refusal(tmp_path, content)

    assert str(error).startswith(FILE)
    assert said in str(error)
    assert remedy in str(error)


BAD_ENTRIES = {
    "unknown dtype": (entry("F4", [2], 0, 1), 'found "F4"'),
    "dtype of another case": (entry("f32", [2], 0, 8), 'found "f32"'),
    "dtype no text": (entry(["F32"], [2], 0, 8), 'found ["F32"]'),
    "negative size": (entry("U8", [-2, -2], 0, 4), "found [-2, -2]"),
    "boolean size": (entry("U8", [True], 0, 1), "found [true]"),
    "fractional size": (entry("U8", [1.0], 0, 1), "found [1.0]"),
    "size as text": (entry("U8", "[1]", 0, 1), 'found "[1]"'),
    "size null": (entry("U8", [None], 0, 1), "found [null]"),
    "shape null": (entry("U8", None, 0, 1), "found null"),
    "size past int64": (entry("U8", [0, 2**64], 0, 0), "fewer than 2^63 elements"),
    "begin after end": (entry("U8", [1], 5, 4), "found [5, 4]"),
    "negative begin": (entry("U8", [1], -1, 0), "found [-1, 0]"),
    "boolean offsets": (entry("U8", [1], False, True), "found [false, true]"),
    "fractional offsets": (entry("U8", [1], 0.0, 1.0), "found [0.0, 1.0]"),
    "one offset": ({"dtype": "U8", "shape": [1], "data_offsets": [1]}, "found [1]"),
    "offsets null": ({"dtype": "U8", "shape": [1], "data_offsets": None}, "found null"),
    "no offsets": ({"dtype": "U8", "shape": [1]}, "an object of dtype, shape and data_offsets"),
    "something extra": (entry("U8", [1], 0, 1) | {"strides": [1]}, "an object of dtype, shape and data_offsets"),
    "no object": (7, "an object of dtype, shape and data_offsets, found 7"),
    "too few bytes": (entry("BF16", [4, 3], 0, 23), "24 bytes for bfloat16 [4, 3], found 23 bytes"),
    "too many bytes": (entry("F8_E4M3", [2], 0, 8), "2 bytes for float8_e4m3fn [2], found 8 bytes"),
}


@pytest.mark.parametrize(("bad", "said"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_refused_by_the_name_of_its_tensor(tmp_path: Path, bad: Any, said: str) -> None:
    header = {"good": entry("U8", [1], 0, 1), "layers.0.weight": bad}

    error = refusal(tmp_path, encode(header, bytes(8)))

    fault = next(fault for fault in error.faults if "layers.0.weight" in fault.where)
    assert said in str(fault)
    assert fault.where == f"{FILE}: layers.0.weight"


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {"first": entry("U8", [4], 0, 4), "second": entry("U8", [4], 2, 6)}

    error = refusal(tmp_path, encode(header, bytes(6)))

    assert f"{FILE}: second: expected its data to begin at 4" in str(error)
    assert "inside first, which ends at 4" in str(error)


def test_two_tensors_on_the_same_bytes_overlap(tmp_path: Path) -> None:
    header = {"first": entry("U8", [4], 0, 4), "second": entry("I8", [4], 0, 4)}

    assert "inside first" in str(refusal(tmp_path, encode(header, bytes(4))))


def test_a_hole_is_refused(tmp_path: Path) -> None:
    header = {"first": entry("U8", [4], 0, 4), "second": entry("U8", [4], 6, 10)}

    assert "a hole of 2 bytes after first" in str(refusal(tmp_path, encode(header, bytes(10))))


def test_an_unusable_entry_is_not_reported_as_a_hole_too(tmp_path: Path) -> None:
    header = {"bad": entry("U8", [4], 4, 0), "second": entry("U8", [4], 4, 8)}

    assert len(refusal(tmp_path, encode(header, bytes(8))).faults) == 1


def test_all_faults_of_a_file_are_raised_together(tmp_path: Path) -> None:
    header = {
        "__metadata__": [],
        "a": entry("F4", [4], 0, 4),
        "b": entry("U8", [5], 4, 8),
        "c": entry("U8", [4], 6, 10),
    }

    error = refusal(tmp_path, encode(header, bytes(9)))

    assert [fault.where for fault in error.faults] == [
        f"{FILE}: __metadata__",
        f"{FILE}: a",
        f"{FILE}: b",
        f"{FILE}: c",
        FILE,
    ]


@pytest.mark.parametrize("place", ['{"x": %s}', '{"__metadata__": %s}', '{"\\u0041": %s}'])
def test_no_depth_of_nesting_breaks_the_message_about_it(tmp_path: Path, place: str) -> None:
    """Depths around the interpreter's limit, where parsing succeeds and printing may not."""
    for depth in range(850, 1001):
        refusal(tmp_path, encode((place % ("[" * depth + "]" * depth)).encode()))


def test_a_long_list_of_names_is_cut_and_counted_in_a_message() -> None:
    assert format_names(["a", "b"]) == "a, b"
    assert format_names(map(str, range(17))) == "0, 1, 2, 3, 4 and 12 more"
    assert format_names([]) == ""


def test_a_repeated_key_is_found_at_any_depth() -> None:
    with pytest.raises(CatalogError, match="more than once: x"):
        parse_json_object(b'{"weight_map": {"x": "a", "x": "b"}}', "index", remedy="")


ODD_VALUES = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, -1, True, None, 1.5, "1", [], 2**64])
OFFSETS = st.lists(st.integers(-1, 12) | ODD_VALUES, min_size=1, max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "I16", "F32", "F4", "F8_E4M3"]),
        "shape": st.lists(st.integers(0, 4) | ODD_VALUES, max_size=3),
        "data_offsets": OFFSETS | st.sampled_from([[0, 4], [4, 8], [8, 12], [0, 2], [2, 4]]),
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from("abc"), ENTRIES, max_size=3), payload=st.integers(0, 12))
def test_what_we_accept_the_safetensors_library_accepts(tmp_path: Path, header: Any, payload: int) -> None:
    """Nothing but `CatalogError` is raised, and no file that passes here is refused by the library."""
    from safetensors import deserialize

    content = encode(header, bytes(payload))
    try:
        found = read(tmp_path, content)
    except CatalogError:
        return

    theirs = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in deserialize(content)}
    ours = {name: (tensor.spec.dtype.header_name, list(tensor.spec.shape)) for name, tensor in found.tensors.items()}
    assert ours == theirs


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_to_any_bytes_never_raises_anything_but_a_catalog_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(encode({"a": entry("I16", [2], 0, 4), "b": entry("F32", [], 4, 8)}, bytes(8)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    try:
        found = read(tmp_path, bytes(content[: data.draw(st.integers(0, len(content)))]))
    except CatalogError:
        return

    assert sum(tensor.spec.nbytes for tensor in found.tensors.values()) == 8


# What could take long, and where the safetensors library is the measure.


@pytest.mark.parametrize("size", [1, 0, 2**31])
def test_a_very_long_shape_is_refused_at_once(tmp_path: Path, size: int) -> None:
    """Multiplying 800,000 sizes took seconds, and ten times as many a hundred times as long."""
    entry = {"a": {"dtype": "U8", "shape": [size] * 800_000, "data_offsets": [0, 1]}}
    text = json.dumps(entry).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    started = time.process_time()

    with pytest.raises(CatalogError, match="a shape of at most 64 whole numbers"):
        read_header(tmp_path / "a.safetensors", "a.safetensors")

    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        ('{"__metadata__": null, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', True),
        ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-0, 1]}}', False),
        ('{"a": {"dtype": "U8", "shape": [1, -0], "data_offsets": [0, 1]}}', False),
        ('{"__metadata__": {"a": "-0,"}, "model-0 ": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', True),
    ],
)
def test_what_the_safetensors_library_reads_is_read(tmp_path: Path, text: str, is_read: bool) -> None:
    content = len(text).to_bytes(8, "little") + text.encode() + b"\0"
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)

    if is_read:
        assert read_header(path, path.name).tensors
        assert safetensors.deserialize(content)
        return
    with pytest.raises(CatalogError):
        read_header(path, path.name)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)

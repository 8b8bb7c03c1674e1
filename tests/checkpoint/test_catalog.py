from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import INDEX_FILE, Catalog

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4968\n"


def write_shard(path: Path, *names: str, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with one byte for each name."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    header |= {name: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for at, name in enumerate(names)}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(names)))


def write_index(directory: Path, weight_map: Any, name: str = INDEX_FILE) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(directory: Path) -> CatalogError:
    with pytest.raises(CatalogError) as caught:
        Catalog.from_directory(directory)
    return caught.value


def test_a_single_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "b", "a", metadata={"format": "pt"})

    catalog = Catalog.from_directory(tmp_path)

    assert catalog.directory == tmp_path
    assert list(catalog.tensors) == ["b", "a"]
    assert catalog.files == ("model.safetensors",)
    assert catalog.metadata == {"model.safetensors": {"format": "pt"}}
    assert catalog.warnings == ()
    assert catalog.spec("a") == TensorSpec(DType.U8, (1,))
    assert "a" in catalog
    assert "c" not in catalog


def test_a_catalog_can_not_be_changed(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")

    with pytest.raises(TypeError):
        Catalog.from_directory(tmp_path).tensors["b"] = None  # type: ignore[index]


def test_shards_are_read_in_order_whatever_the_index_begins_with(tmp_path: Path) -> None:
    write_shard(tmp_path / "model-00001-of-00002.safetensors", "z", "a")
    write_shard(tmp_path / "model-00002-of-00002.safetensors", "m")
    write_index(
        tmp_path,
        {
            "m": "model-00002-of-00002.safetensors",
            "a": "model-00001-of-00002.safetensors",
            "z": "model-00001-of-00002.safetensors",
        },
    )

    catalog = Catalog.from_directory(tmp_path)

    assert list(catalog.tensors) == ["z", "a", "m"]
    assert catalog.tensors["m"].file == "model-00002-of-00002.safetensors"


def test_the_index_finds_shards_of_any_name(tmp_path: Path) -> None:
    """compressed-tensors 0.15 keeps multi-token-prediction weights in a shard of their own."""
    write_shard(tmp_path / "model_backbone.safetensors", "a")
    write_shard(tmp_path / "mtp/model_mtp.safetensors", "mtp.a")
    write_index(tmp_path, {"a": "model_backbone.safetensors", "mtp.a": "mtp/model_mtp.safetensors"})

    catalog = Catalog.from_directory(tmp_path)

    assert catalog.files == ("model_backbone.safetensors", "mtp/model_mtp.safetensors")
    assert list(catalog.tensors) == ["a", "mtp.a"]


def test_without_an_index_every_file_at_the_top_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_shard(tmp_path / "y.safetensors", "b")
    write_shard(tmp_path / "deeper/z.safetensors", "c")
    (tmp_path / "._x.safetensors").write_bytes(b"what macOS leaves behind")

    assert list(Catalog.from_directory(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "no index"])
def test_consolidated_files_are_a_second_copy_and_not_read(tmp_path: Path, indexed: bool) -> None:
    write_shard(tmp_path / "consolidated-00001-of-00002.safetensors", "a", "layers.0.attention.wq.weight")
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}")
    write_shard(tmp_path / "model.safetensors", "a")
    if indexed:
        write_index(tmp_path, {"a": "model.safetensors"})

    catalog = Catalog.from_directory(tmp_path)

    assert catalog.files == ("model.safetensors",)
    assert len(catalog.warnings) == 1
    assert "consolidated-00001-of-00002.safetensors" in catalog.warnings[0]


def test_consolidated_files_alone_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "consolidated.safetensors", "a")

    assert Catalog.from_directory(tmp_path).files == ("consolidated.safetensors",)


def test_an_index_of_another_name_counts_when_it_is_the_only_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "backbone.safetensors", "a")
    write_shard(tmp_path / "stray.safetensors", "a")
    write_index(tmp_path, {"a": "backbone.safetensors"}, "backbone.safetensors.index.json")

    catalog = Catalog.from_directory(tmp_path)

    assert catalog.files == ("backbone.safetensors",)
    assert "backbone.safetensors.index.json does not name them: stray.safetensors" in catalog.warnings[0]


def test_the_index_of_the_usual_name_has_priority(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")
    write_index(tmp_path, {"a": "model.safetensors"})
    write_index(tmp_path, {"b": "gone.safetensors"}, "adapter.safetensors.index.json")

    assert Catalog.from_directory(tmp_path).files == ("model.safetensors",)


def test_two_indexes_of_other_names_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")
    for name in "xy":
        write_index(tmp_path, {"a": "model.safetensors"}, f"{name}.safetensors.index.json")

    error = refusal(tmp_path)

    assert "x.safetensors.index.json, y.safetensors.index.json" in str(error)
    assert f"under the name {INDEX_FILE}" in str(error)


def test_tensors_that_the_index_does_not_list_are_cataloged_and_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a", "forgotten")
    write_index(tmp_path, {"a": "model.safetensors"})

    catalog = Catalog.from_directory(tmp_path)

    assert list(catalog.tensors) == ["a", "forgotten"]
    assert catalog.unlisted == {"forgotten"}
    assert list(catalog.without(catalog.unlisted).tensors) == ["a"]


def test_without_an_index_no_tensor_is_unlisted(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")

    assert Catalog.from_directory(tmp_path).unlisted == frozenset()


@pytest.mark.parametrize("home", ["x.safetensors", "y.safetensors"])
def test_the_index_says_which_of_two_copies_is_read(tmp_path: Path, home: str) -> None:
    write_shard(tmp_path / "x.safetensors", "a", "twice")
    write_shard(tmp_path / "y.safetensors", "twice", "b")
    write_index(tmp_path, {"a": "x.safetensors", "twice": home, "b": "y.safetensors"})

    catalog = Catalog.from_directory(tmp_path)

    assert catalog.tensors["twice"].file == home
    assert [tensor.file for tensor in catalog.tensors.values()] == sorted(
        tensor.file for tensor in catalog.tensors.values()
    )
    assert catalog.warnings == (f"in several files, read from the one that {INDEX_FILE} says: twice",)


def copies_without_an_entry(directory: Path) -> None:
    write_shard(directory / "x.safetensors", "a", "twice")
    write_shard(directory / "y.safetensors", "twice", "b")
    write_index(directory, {"a": "x.safetensors", "b": "y.safetensors"})


def copies_with_an_entry_of_a_third_file(directory: Path) -> None:
    copies_without_an_entry(directory)
    write_shard(directory / "z.safetensors", "c")
    write_index(
        directory,
        {"a": "x.safetensors", "b": "y.safetensors", "c": "z.safetensors", "twice": "z.safetensors"},
    )


def test_a_tensor_in_another_shard_than_the_index_says_is_found_with_a_warning(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_shard(tmp_path / "y.safetensors", "b", "moved")
    write_index(tmp_path, {"a": "x.safetensors", "moved": "x.safetensors", "b": "y.safetensors"})

    catalog = Catalog.from_directory(tmp_path)

    assert catalog.tensors["moved"].file == "y.safetensors"
    assert catalog.warnings == ("in another file than the index says, read from there: moved",)


def test_pickle_beside_safetensors_is_not_read_but_gives_a_warning(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")
    (tmp_path / "training_args.bin").write_bytes(b"\x80")

    assert "training_args.bin" in Catalog.from_directory(tmp_path).warnings[0]


def test_a_hub_cache_of_links_is_read(tmp_path: Path) -> None:
    """Snapshots link to ../../blobs: the path in the index is checked, not where its link leads."""
    write_shard(tmp_path / "blobs/0123", "a")
    snapshot = tmp_path / "snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/0123")
    write_index(snapshot, {"a": "model-00001-of-00001.safetensors"})

    assert list(Catalog.from_directory(snapshot).tensors) == ["a"]


def missing_directory(directory: Path) -> None:
    directory.rmdir()


def a_file(directory: Path) -> None:
    directory.rmdir()
    directory.write_bytes(b"")


def nothing(directory: Path) -> None:
    pass


def config_only(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def pickle_only(directory: Path) -> None:
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
    (directory / "consolidated.00.pth").write_bytes(b"\x80")


def shard_missing(directory: Path) -> None:
    write_shard(directory / "model-00001-of-00002.safetensors", "a")
    write_index(
        directory,
        {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    )


def index_of_files_that_were_merged(directory: Path) -> None:
    shard_missing(directory)
    (directory / "model-00001-of-00002.safetensors").rename(directory / "model.safetensors")


def numbered_shard_missing(directory: Path) -> None:
    write_shard(directory / "model-00001-of-00003.safetensors", "a")
    write_shard(directory / "model-00003-of-00003.safetensors", "c")


def dangling_link(directory: Path) -> None:
    (directory / "model.safetensors").symlink_to("../../blobs/gone")


def directory_for_a_shard(directory: Path) -> None:
    (directory / "model.safetensors").mkdir()


def shard_is_pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text(LFS_POINTER)


def index_is_pointer(directory: Path) -> None:
    (directory / INDEX_FILE).write_text(LFS_POINTER)


def index_is_directory(directory: Path) -> None:
    (directory / INDEX_FILE).mkdir()


def index_is_no_json(directory: Path) -> None:
    (directory / INDEX_FILE).write_text("<html>")


def index_without_map(directory: Path) -> None:
    (directory / INDEX_FILE).write_text('{"metadata": {}}')


def index_with_empty_map(directory: Path) -> None:
    write_index(directory, {})


def index_with_list(directory: Path) -> None:
    write_index(directory, ["a"])


def index_with_number(directory: Path) -> None:
    write_index(directory, {"a": 1})


def index_with_entry_twice(directory: Path) -> None:
    (directory / INDEX_FILE).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')


def index_to_pickle(directory: Path) -> None:
    write_index(directory, {"a": "pytorch_model.bin"})


def entry_without_tensor(directory: Path) -> None:
    write_shard(directory / "model.safetensors", "a")
    write_index(directory, {"a": "model.safetensors", "lost": "model.safetensors"})


def tensor_in_two_files(directory: Path) -> None:
    write_shard(directory / "x.safetensors", "a", "b")
    write_shard(directory / "y.safetensors", "b", "c")


REFUSED = [
    (missing_directory, "a checkpoint directory, found no such file", "Give the directory"),
    (a_file, "a checkpoint directory, found not a directory", "Give the directory"),
    (nothing, "safetensors files, found an empty directory", "download is incomplete"),
    (config_only, "no weights among config.json", "download is incomplete"),
    (pickle_only, "pickle files only: consolidated.00.pth, pytorch_model", "Pickle runs code"),
    (shard_missing, "model-00002-of-00002.safetensors: expected the file, which", "fetch the missing files"),
    (shard_missing, "for 2 tensors, found no such file", "fetch the missing files"),
    (index_of_files_that_were_merged, "model-00001-of-00002.safetensors: expected the file", f"delete {INDEX_FILE}"),
    (numbered_shard_missing, "expected 3 shards, found no number 2", "fetch the missing files"),
    (dangling_link, "a link that leads nowhere", "fetch the missing files"),
    (directory_for_a_shard, "a readable file, found is a directory", "Check its permissions"),
    (shard_is_pointer, "a Git LFS pointer", "this is an LFS pointer, run git lfs pull"),
    (index_is_pointer, "a Git LFS pointer", "this is an LFS pointer, run git lfs pull"),
    (index_is_directory, "a readable file, found is a directory", "Check its permissions"),
    (index_is_no_json, f"{INDEX_FILE}: expected a JSON object", "download all of them again"),
    (index_without_map, "not empty, found none", "download all of them again"),
    (index_with_empty_map, "not empty, found an empty one", "download all of them again"),
    (index_with_list, "not empty, found a list", "download all of them again"),
    (index_with_number, "found no file name for a", "download all of them again"),
    (index_with_entry_twice, "more than once: a", "save the checkpoint again"),
    (index_to_pickle, "'pytorch_model.bin'", "loading them can run code"),
    (entry_without_tensor, "1 of them in no file: lost", "download all of them again"),
    (
        tensor_in_two_files,
        "x.safetensors and y.safetensors: expected each tensor in one file",
        "only their source can tell",
    ),
    (
        copies_without_an_entry,
        "or in the index the file to read it from, found 1 in both: twice",
        "Add these tensors to",
    ),
    (copies_with_an_entry_of_a_third_file, "found 1 in both: twice", f"Add these tensors to {INDEX_FILE}"),
]


@pytest.mark.parametrize(("make", "said", "remedy"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_a_malformed_directory_is_refused_with_a_remedy(tmp_path: Path, make: Any, said: str, remedy: str) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    make(directory)

    error = refusal(directory)

    assert said in str(error)
    assert remedy in str(error)


ESCAPES = [
    "../model.safetensors",
    "/etc/model.safetensors",
    "a/../../model.safetensors",
    "..\\model.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "./model.safetensors",
    "a//model.safetensors",
    "model.safetensors/",
    "model\0.safetensors",
    "",
]


@pytest.mark.parametrize("path", ESCAPES, ids=ascii)
def test_index_paths_that_leave_the_directory_are_refused(tmp_path: Path, path: str) -> None:
    """Even when the file exists: nothing outside is opened."""
    write_shard(tmp_path / "model.safetensors", "a")
    directory = tmp_path / "checkpoint"
    write_shard(directory / "model.safetensors", "a")
    write_index(directory, {"a": path})

    error = refusal(directory)

    assert "paths inside the checkpoint directory" in str(error)
    assert repr(path) in str(error)


def test_faults_of_all_files_are_raised_together(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    with (tmp_path / "x.safetensors").open("ab") as stream:
        stream.write(b"!")
    (tmp_path / "y.safetensors").write_text(LFS_POINTER)
    write_shard(tmp_path / "good.safetensors", "c")
    write_index(
        tmp_path,
        {
            "a": "x.safetensors",
            "b": "y.safetensors",
            "c": "good.safetensors",
            "d": "z.safetensors",
            "e": "good.safetensors",
        },
    )

    error = refusal(tmp_path)

    assert {fault.where for fault in error.faults} == {f"{name}.safetensors" for name in ("x", "y", "z", "good")}


def test_no_payload_is_read_and_no_torch_is_imported(tmp_path: Path) -> None:
    """A file of 64 GiB, all of it a hole, is cataloged by a process that never imports torch."""
    size = 2**36
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + size)
    program = (
        "import sys; from pathlib import Path; from trtllm_ct.checkpoint.catalog import Catalog\n"
        "print(Catalog.from_directory(Path(sys.argv[1])).spec('a').nbytes, 'torch' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )

    assert done.stdout.split() == [str(size), "False"]


def test_the_garbage_collector_is_left_as_it_was(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")

    Catalog.from_directory(tmp_path)
    assert gc.isenabled()

    gc.disable()
    try:
        Catalog.from_directory(tmp_path)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.shared
def test_real_checkpoints_are_cataloged_as_the_safetensors_library_sees_them(shared: Path) -> None:
    from safetensors import safe_open

    directories = sorted(path.parent for path in shared.glob("checkpoints/*/config.json"))
    assert directories
    for directory in directories:
        catalog = Catalog.from_directory(directory)
        theirs: dict[str, tuple[str, list[int]]] = {}
        for file in directory.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                theirs |= {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        ours = {name: (item.spec.dtype.header_name, list(item.spec.shape)) for name, item in catalog.tensors.items()}
        assert ours == theirs

"""Folders in stores that fsspec opens; its own store in memory stands for all of them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING
from uuid import uuid4

import fsspec
import pytest
from builders import write_checkpoint

import trtllm_ct
from trtllm_ct.base.errors import HubError, MissingDependencyError
from trtllm_ct.checkpoint import object_store
from trtllm_ct.checkpoint.remote import RemoteFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def put(directory: Path) -> str:
    """The URL of a directory, copied to the store in memory."""
    store, url = fsspec.filesystem("memory"), f"memory://{uuid4().hex}/model"
    for path in directory.iterdir():
        store.pipe_file(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.mark.parametrize("scheme", ["int4-g32", "nvfp4"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda place: trtllm_ct.inspect_checkpoint(place).to_dict(), id="inspect"),
        pytest.param(lambda place: trtllm_ct.plan_checkpoint(place).to_dict(), id="plan"),
        pytest.param(lambda place: trtllm_ct.diagnose(place).to_dict(), id="doctor"),
    ],
)
def test_a_store_is_answered_as_a_directory(
    tmp_path: Path, scheme: str, shards: int, answer: Callable[[str | Path], object]
) -> None:
    directory = write_checkpoint(tmp_path, scheme=scheme, shards=shards).directory
    url = put(directory)

    there, here = (json.dumps(answer(place)) for place in (url, directory))

    assert there.replace(url, "PLACE") == here.replace(str(directory), "PLACE")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("memory://nothing-here/model", "none"),
        ("nothing://bucket/model", "Protocol not known"),
    ],
)
def test_a_url_that_can_not_be_read_is_named(url: str, found: str) -> None:
    with pytest.raises(HubError) as raised:
        trtllm_ct.inspect_checkpoint(url)

    (fault,) = raised.value.faults
    assert fault.where == url
    assert found in fault.found


def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(write_checkpoint(tmp_path).directory)
    store = fsspec.filesystem("memory")
    listed = store.find(url.removeprefix("memory:/"), detail=True)
    store.rm(f"{url}/model.safetensors")
    monkeypatch.setattr(type(store), "find", lambda *_, **__: listed)

    (fault,) = trtllm_ct.inspect_checkpoint(url).problems

    assert fault.where == f"{url}/model.safetensors"
    assert "FileNotFoundError" in fault.found


def test_a_file_that_got_shorter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(write_checkpoint(tmp_path).directory)
    store = fsspec.filesystem("memory")
    listed = store.find(url.removeprefix("memory:/"), detail=True)
    store.pipe_file(f"{url}/config.json", b"{}")
    monkeypatch.setattr(type(store), "find", lambda *_, **__: listed)

    with pytest.raises(HubError, match="ValueError: 2 of them"):
        trtllm_ct.inspect_checkpoint(url)


@pytest.mark.parametrize("package", ["fsspec", "s3fs"])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(MissingDependencyError, match=package):
        trtllm_ct.inspect_checkpoint("s3://bucket/model")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_is_converted_as_a_directory(tmp_path: Path, workers: int) -> None:
    directory = write_checkpoint(tmp_path / "made", scheme="int4-g32", shards=3, tokenizer=True).directory
    url = put(directory)

    here = trtllm_ct.convert_checkpoint(directory, tmp_path / "here")
    there = trtllm_ct.convert_checkpoint(url, tmp_path / "there", workers=workers)

    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert there.carried_files == here.carried_files
    assert there.source == url


def test_a_stopped_conversion_of_a_store_goes_on_but_no_part_of_a_file_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store states no hash by which a power cut's zeros could be told from what was fetched."""
    directory = write_checkpoint(tmp_path / "made", scheme="int4-g32", shards=3).directory
    url = put(directory)
    trtllm_ct.convert_checkpoint(directory, tmp_path / "here")
    monkeypatch.setattr(object_store, "_PIECE_BYTES", 1000)
    monkeypatch.setattr("trtllm_ct.convert.units.UNIT_BYTES", 1)
    store = fsspec.filesystem("memory")
    cat_file, left = type(store).cat_file, [20]

    def cut(self: object, path: str, start: int | None = None, end: int | None = None) -> bytes:
        left[0] -= bool(start)
        if left[0] < 0:
            raise ConnectionError("cut off")
        data: bytes = cat_file(self, path, start=start, end=end)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "cat_file", cut)
        with pytest.raises(HubError, match="cut off"):
            trtllm_ct.convert_checkpoint(url, tmp_path / "there", workers=1)
    for path in (tmp_path / ".there.partial" / ".download").glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)

    trtllm_ct.convert_checkpoint(url, tmp_path / "there")

    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_of_a_store_that_says_only_sizes_no_file_is_known_to_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped conversion would go on with another file of that size."""
    url = put(write_checkpoint(tmp_path, scheme="int4-g32").directory)
    store = fsspec.filesystem("memory")
    find = store.find

    def sizes_only(_: object, *args: str, **options: bool) -> dict[str, dict[str, object]]:
        found = find(*args, **options)
        return {path: {key: entry[key] for key in ("name", "size", "type")} for path, entry in found.items()}

    versions = []
    for says_more in (True, True, False, False):
        if not says_more:
            monkeypatch.setattr(type(store), "find", sizes_only)
        source = object_store.open_url(url)
        assert isinstance(source, RemoteFolder)
        assert source.transport.version("config.json") == source.transport.version("config.json")
        versions.append(source.transport.version("config.json"))

    assert len(set(versions)) == 3


def test_a_file_that_was_written_anew_is_another_version(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "made", scheme="int4-g32", shards=2).directory
    url = put(directory)

    versions = []
    for _ in range(2):
        source = object_store.open_url(url)
        assert isinstance(source, RemoteFolder)
        versions.append(source.transport.version("model-00001-of-00002.safetensors"))
        file = f"{url}/model-00001-of-00002.safetensors"
        fsspec.filesystem("memory").pipe_file(file, (directory / "model-00001-of-00002.safetensors").read_bytes())

    assert versions[0] != versions[1]


@pytest.mark.parametrize("name", ["../LICENSE", "../../LICENSE", "./LICENSE", "a//LICENSE", "a/../../../LICENSE"])
def test_an_object_whose_key_leads_out_of_the_folder_is_no_file_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A store takes any text as a key; whoever fills a bucket could name files of this machine."""
    directory = write_checkpoint(tmp_path / "made", scheme="int4-g32").directory
    url = put(directory)
    store = fsspec.filesystem("memory")
    find, cat_file, folder = store.find, store.cat_file, url.removeprefix("memory:/")
    evil = f"{folder}/{name}"
    monkeypatch.setattr(
        type(store), "find", lambda _, *args, **options: {**find(*args, **options), evil: {"name": evil, "size": 4}}
    )
    monkeypatch.setattr(
        type(store), "cat_file", lambda _, path, **part: b"evil" if path == evil else cat_file(path, **part)
    )

    trtllm_ct.convert_checkpoint(url, tmp_path / "there", carry=["*"])

    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "there"]
    assert not list(tmp_path.rglob("LICENSE"))

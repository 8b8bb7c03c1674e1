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

"""Conversions of repositories believe no server and no cache, and say what is wrong with them."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import pytest
from hub_server import COMMIT, TOKEN, HubServer, hub_at
from served_repository import (
    NAME,
    PLACE,
    SHARDS,
    HighWater,
    made,
    sizes_of,
    threading_left,
    tree,
)

from trtllm_ct import convert_checkpoint
from trtllm_ct.base.errors import CatalogError, HubError

if TYPE_CHECKING:
    from pathlib import Path


class TestBadServers:
    def test_connections_that_break_off_are_opened_again(self, hub: HubServer, tmp_path: Path) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        convert_checkpoint(NAME, tmp_path / "first")
        sent, hub.cuts = hub.weights_sent, 4

        convert_checkpoint(NAME, tmp_path / "there")

        assert hub.cuts == 0
        assert hub.weights_sent - sent == sum(sizes_of(directory).values())
        assert tree(tmp_path / "there") == tree(tmp_path / "here")

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_busy_hub_is_asked_again(self, hub: HubServer, tmp_path: Path, status: int) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")

        def busy(_total: int) -> Any:
            hub.statuses += [status] * 4
            return int

        convert_checkpoint(NAME, tmp_path / "there", on_download=busy)

        assert tree(tmp_path / "there") == tree(tmp_path / "here")

    @pytest.mark.parametrize(
        ("behaviour", "found"),
        [
            ({"lie": lambda stated: stated.replace("bytes 0-", "bytes 1-")}, "Content-Range"),
            ({"lie": lambda stated: stated.rpartition("/")[0] + "/7"}, "Content-Range"),
            ({"surplus": b"more"}, "an answer that goes on"),
            ({"encoding": "gzip"}, "an answer in 'gzip'"),
            ({"statuses": [404] * 60}, "no such repository"),
            ({"statuses": [503] * 60}, "status 503, 5 times"),
            ({"latency": 0, "weights_left": 0}, "0 of .* bytes of model"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_an_answer_that_is_none_is_an_error(
        self, hub: HubServer, tmp_path: Path, behaviour: dict[str, Any], found: str
    ) -> None:
        made(tmp_path, hub)

        def misbehave(_total: int) -> Any:
            for name, value in behaviour.items():
                setattr(hub, name, value)
            return int

        with pytest.raises(HubError, match=found) as raised:
            convert_checkpoint(NAME, tmp_path / "there", on_download=misbehave)

        assert NAME in raised.value.faults[0].where
        assert not (tmp_path / "there").exists()
        assert not threading_left()

    def test_a_shard_with_other_bytes_than_the_list_says_is_refused(self, hub: HubServer, tmp_path: Path) -> None:
        directory = made(tmp_path, hub)
        (shard, *_) = sorted(sizes_of(directory))

        def change(_total: int) -> Any:
            data = bytearray((directory / shard).read_bytes())
            data[-1] ^= 1
            (directory / shard).write_bytes(data)
            return int

        with pytest.raises(HubError, match="SHA-256") as raised:
            convert_checkpoint(NAME, tmp_path / "there", on_download=change)

        assert raised.value.faults[0].where == f"{PLACE}/{shard}"

    def test_a_shard_that_is_shorter_than_listed_is_refused(self, hub: HubServer, tmp_path: Path) -> None:
        directory = made(tmp_path, hub)
        (shard, *_) = sorted(sizes_of(directory))

        def cut(_total: int) -> Any:
            (directory / shard).write_bytes((directory / shard).read_bytes()[:-1])
            return int

        with pytest.raises(HubError, match=shard):
            convert_checkpoint(NAME, tmp_path / "there", on_download=cut)

    def test_a_pointer_in_place_of_a_shard_is_refused(self, hub: HubServer, tmp_path: Path) -> None:
        directory = made(tmp_path, hub)
        (shard, *_) = sorted(sizes_of(directory))
        (directory / shard).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2685800\n")

        with pytest.raises(CatalogError, match="LFS"):
            convert_checkpoint(NAME, tmp_path / "there")

        assert not list(tmp_path.glob(".*.partial"))

    @pytest.mark.parametrize(("access", "token"), [("gated", None), ("closed", TOKEN), ("private", None)])
    def test_a_closed_repository_leaves_nothing(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str, token: str | None
    ) -> None:
        hub_at(hub, tmp_path, monkeypatch, token=token)
        hub.add(NAME, made(tmp_path, hub), access=access)

        with pytest.raises(HubError, match="hf auth login"):
            convert_checkpoint(NAME, tmp_path / "there")

        assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]

    def test_the_token_opens_a_gated_repository_and_goes_to_the_hub_alone(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub_at(hub, tmp_path, monkeypatch, token=TOKEN)
        hub.add(NAME, made(tmp_path, hub), access="gated")

        convert_checkpoint(NAME, tmp_path / "there")

        assert {(request.host, request.token) for request in hub.requests} == {
            ("hub", f"Bearer {TOKEN}"),
            ("store", ""),
        }


class TestCaches:
    @staticmethod
    def cached(tmp_path: Path, directory: Path, names: list[str]) -> Path:
        """Put files into the cache of huggingface_hub."""
        home = tmp_path / "hf" / f"models--{NAME.replace('/', '--')}"
        (home / "blobs").mkdir(parents=True)
        snapshot = home / "snapshots" / COMMIT
        for name in names:
            blob = home / "blobs" / hashlib.sha256(name.encode()).hexdigest()
            blob.write_bytes((directory / name).read_bytes())
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)
        return home

    def test_shards_that_were_downloaded_are_read_there_and_stay(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        first, second, *others = sorted(sizes_of(directory))
        home = self.cached(tmp_path, directory, [first, second, "tokenizer.json"])
        before = tree(home)
        water = HighWater(tmp_path / "there", monkeypatch)

        report = convert_checkpoint(NAME, tmp_path / "there")

        assert tree(home) == before
        assert report.downloaded_bytes == sum(sizes_of(directory)[name] for name in others)
        assert {first, second} & {request.path.rpartition("/")[2] for request in hub.requests} == set()
        assert not hub.asked("tokenizer.json")
        assert water.most <= report.downloaded_bytes
        assert tree(tmp_path / "there") == tree(tmp_path / "here")

    def test_a_cached_file_of_another_size_is_not_used(self, hub: HubServer, tmp_path: Path) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        home = self.cached(tmp_path, directory, sorted(sizes_of(directory)))
        for blob in (home / "blobs").iterdir():
            blob.write_bytes(blob.read_bytes()[:-1])

        report = convert_checkpoint(NAME, tmp_path / "there")

        assert report.downloaded_bytes == sum(sizes_of(directory).values())
        assert tree(tmp_path / "there") == tree(tmp_path / "here")

    @pytest.mark.parametrize("looked_at_before", [True, False])
    def test_offline_a_whole_cache_is_enough(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, looked_at_before: bool
    ) -> None:
        directory = made(tmp_path, hub)
        here = convert_checkpoint(directory, tmp_path / "here")
        self.cached(tmp_path, directory, [path for path in tree(directory) if not path.startswith(".")])
        if looked_at_before:
            convert_checkpoint(NAME, tmp_path / "first")
        asked = len(hub.requests)
        offline(monkeypatch)

        there = convert_checkpoint(NAME, tmp_path / "there")

        assert len(hub.requests) == asked
        assert tree(tmp_path / "there") == tree(tmp_path / "here")
        assert there.left_out_files == here.left_out_files

    def test_offline_without_weights_is_refused_before_anything_is_written(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(NAME, tmp_path / "first")
        last = f"model-{SHARDS:05}-of-{SHARDS:05}.safetensors"
        self.cached(tmp_path, directory, [name for name in tree(directory) if name != last])
        offline(monkeypatch)

        with pytest.raises(HubError, match=f"{last} .*HF_HUB_OFFLINE is set"):
            convert_checkpoint(NAME, tmp_path / "there")

        assert not list(tmp_path.glob(".*.partial"))

    def test_offline_without_anything_is_refused(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made(tmp_path, hub)
        offline(monkeypatch)

        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            convert_checkpoint(NAME, tmp_path / "there")

        assert not hub.requests
        assert not list(tmp_path.glob(".*.partial"))


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

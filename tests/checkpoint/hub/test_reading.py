"""What is read of a repository is what is read of its directory, and no more than that is fetched."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from builders import SCHEMES, rewrite, rewrite_config, write_checkpoint
from hub_server import COMMIT, TOKEN, HubServer, hub_at, serving
from tiny_models import tiny_config

import trtllm_ct
from trtllm_ct.base.errors import HubError
from trtllm_ct.checkpoint import remote
from trtllm_ct.checkpoint.hub import ranges
from trtllm_ct.checkpoint.hub.listing import Listing
from trtllm_ct.checkpoint.opening import open_source
from trtllm_ct.pipeline import head_probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

NAME = "some-org/Some-Model.W4A16"
PLACE = f"{NAME}@{COMMIT}"

CHECKPOINTS: dict[str, dict[str, Any]] = {
    **{scheme: {"scheme": scheme} for scheme in SCHEMES if not {"g128", "g256"} & set(scheme.split("-"))},
    "sharded": {"scheme": "int4-g32", "shards": 4},
    "kv cache": {"scheme": "fp8-tensor-static", "kv": True, "shards": 2},
    "mixed": {"scheme": {"q_proj": "int4-g64", "down_proj": "fp8-tensor-static"}},
    "experts": {"scheme": "nvfp4", "config": tiny_config("Qwen3MoeForCausalLM"), "shards": 3},
    "nothing quantized": {"scheme": "dense"},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving() as server:
        hub_at(server, tmp_path, monkeypatch)
        yield server


def answers(place: str | Path, shown: str) -> dict[str, Any]:
    """What inspect, plan and doctor say, without the name of the place."""
    documents = {
        "inspect": trtllm_ct.inspect_checkpoint(place).to_dict(),
        "doctor": trtllm_ct.diagnose(place).to_dict(),
    }
    try:
        documents["plan"] = trtllm_ct.plan_checkpoint(place).to_dict()
    except trtllm_ct.base.errors.CheckpointError as error:
        documents["plan"] = [fault.to_dict() for fault in error.faults]
    decoded: dict[str, Any] = json.loads(json.dumps(documents).replace(shown, "PLACE"))
    return decoded


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_repository_is_answered_as_its_directory(hub: HubServer, tmp_path: Path, case: str) -> None:
    directory = write_checkpoint(tmp_path / "made", **CHECKPOINTS[case]).directory
    hub.add(NAME, directory)

    assert answers(NAME, PLACE) == answers(directory, str(directory))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda directory: (directory / "model.safetensors").write_bytes(
        (directory / "model.safetensors").read_bytes()[:-9]
    ),
    "pointer": lambda directory: (directory / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2685800\n"
    ),
    "empty": lambda directory: (directory / "model.safetensors").write_bytes(b""),
    "no tensor": lambda directory: rewrite(directory, lambda tensors: tensors.pop("model.norm.weight")),
    "other method": lambda directory: rewrite_config(
        directory, lambda entry: entry.update(quantization_config={"quant_method": "gptq"})
    ),
    "no JSON": lambda directory: (directory / "config.json").write_text("{"),
    "index without shards": lambda directory: (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "missing.safetensors"}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_faulty_repository_has_the_faults_of_its_directory(hub: HubServer, tmp_path: Path, damage: str) -> None:
    directory = write_checkpoint(tmp_path / "made").directory
    DAMAGES[damage](directory)
    hub.add(NAME, directory)

    def faults(place: str | Path, shown: str) -> list[dict[str, str]]:
        try:
            found = trtllm_ct.inspect_checkpoint(place).problems
        except trtllm_ct.base.errors.CheckpointError as error:
            found = error.faults
        assert found
        decoded: list[dict[str, str]] = json.loads(json.dumps([fault.to_dict() for fault in found]).replace(shown, "X"))
        return decoded

    assert faults(NAME, PLACE) == faults(directory, str(directory))


def test_weights_are_not_fetched(hub: HubServer, tmp_path: Path) -> None:
    """One request per shard, as long as its header is expected to be, and nothing twice."""
    directory = write_checkpoint(tmp_path / "made", shards=3).directory
    hub.add(NAME, directory)

    trtllm_ct.inspect_checkpoint(NAME)

    weights = [request for request in hub.asked(".safetensors") if not request.path.endswith(".json")]
    assert [request.host for request in weights].count("store") == 3
    assert all(request.range.startswith("bytes=0-") for request in weights)
    assert len(hub.requests) == len(set(hub.requests))


def test_a_long_header_takes_a_second_request(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "made").directory
    hub.add(NAME, directory)
    monkeypatch.setattr("trtllm_ct.checkpoint.catalog._HEADER_BYTES", 100)

    assert answers(NAME, PLACE) == answers(directory, str(directory))
    assert [request.range.partition("-")[0] for request in hub.requests if request.host == "store"] == [
        "bytes=0",
        "bytes=100",
    ]


def test_a_commit_that_was_read_is_not_asked_for_again(hub: HubServer, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "made", scheme="nvfp4", shards=2).directory
    hub.add(NAME, directory)
    first = trtllm_ct.inspect_checkpoint(NAME).to_dict()
    asked = len(hub.requests)

    assert trtllm_ct.inspect_checkpoint(NAME).to_dict() == first
    assert [request.path for request in hub.requests[asked:]] == [f"/api/models/{NAME}/revision/main"]

    asked = len(hub.requests)
    assert trtllm_ct.inspect_checkpoint(PLACE).to_dict() == first
    assert len(hub.requests) == asked


def test_another_commit_is_read_anew(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, write_checkpoint(tmp_path / "first", scheme="int4-g32").directory)
    first = trtllm_ct.inspect_checkpoint(NAME)
    hub.add(NAME, write_checkpoint(tmp_path / "second", scheme="nvfp4").directory, commit="f" * 40)

    second = trtllm_ct.inspect_checkpoint(NAME)

    assert second.directory == f"{NAME}@{'f' * 40}"
    assert list(second.rows()) != list(first.rows())


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, None])
def test_a_damaged_cache_is_read_anew(hub: HubServer, tmp_path: Path, damage: bytes | None) -> None:
    hub.add(NAME, write_checkpoint(tmp_path / "made").directory)
    first = trtllm_ct.inspect_checkpoint(NAME).to_dict()
    kept = [path for path in (tmp_path / "cache" / "trtllm_ct" / "hub" / "commits").rglob("*") if path.is_file()]
    assert len(kept) == 3
    for path in kept:
        path.unlink() if damage is None else path.write_bytes(damage)

    assert trtllm_ct.inspect_checkpoint(NAME).to_dict() == first


def test_a_cache_that_others_can_write_to_is_not_used(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, write_checkpoint(tmp_path / "made").directory)
    folder = tmp_path / "cache" / "trtllm_ct"
    folder.mkdir(parents=True)
    folder.chmod(0o777)

    trtllm_ct.inspect_checkpoint(NAME)

    assert not list(folder.iterdir())


def test_parts_of_private_repositories_are_kept_for_this_user_alone(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, write_checkpoint(tmp_path / "made").directory)
    trtllm_ct.inspect_checkpoint(NAME)

    kept = list((tmp_path / "cache" / "trtllm_ct").rglob("*"))

    assert kept
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept)


def test_files_that_were_downloaded_are_not_asked_for(hub: HubServer, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "made").directory
    hub.add(NAME, directory)
    home = tmp_path / "hf" / f"models--{NAME.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in directory.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())

    assert answers(NAME, PLACE) == answers(directory, str(directory))
    assert not hub.asked("/resolve/")


def test_requests_are_sent_at_once_but_not_too_many(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CONCURRENT", 4)
    hub.latency = 0.05
    hub.add(NAME, write_checkpoint(tmp_path / "made", shards=8).directory)

    trtllm_ct.inspect_checkpoint(NAME)

    assert 2 <= hub.most_at_once <= 4


def test_the_token_goes_to_the_hub_alone(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_at(hub, tmp_path, monkeypatch, token=TOKEN)
    hub.add(NAME, write_checkpoint(tmp_path / "made", shards=2).directory, access="gated")

    trtllm_ct.inspect_checkpoint(NAME)

    asked = [*hub.asked(NAME), *hub.asked(str(tmp_path))]
    assert {(request.host, request.token) for request in asked} == {("hub", f"Bearer {TOKEN}"), ("store", "")}


def tied(directory: Path, *, equal: bool) -> Path:
    """A checkpoint whose config.json ties a head that is stored, and equals the embeddings or doesn't."""

    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not equal:
            tensors["lm_head.weight"] += 1

    write_checkpoint(directory, config=tiny_config(tie_word_embeddings=True))
    rewrite(directory, store_head)
    return directory


@pytest.mark.parametrize("equal", [True, False])
def test_small_heads_are_compared_as_a_whole(hub: HubServer, tmp_path: Path, *, equal: bool) -> None:
    directory = tied(tmp_path / "made", equal=equal)
    hub.add(NAME, directory)

    assert answers(NAME, PLACE) == answers(directory, str(directory))


@pytest.mark.parametrize("equal", [True, False])
def test_of_large_heads_samples_are_compared_and_that_is_said(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, equal: bool
) -> None:
    monkeypatch.setattr(head_probe, "_SAMPLE_BYTES", 64)
    directory = tied(tmp_path / "made", equal=equal)
    hub.add(NAME, directory)

    there, here = trtllm_ct.inspect_checkpoint(NAME), trtllm_ct.inspect_checkpoint(directory)

    said = [text for text in there.warnings if "samples" in text]
    assert bool(said) == equal
    assert [text for text in there.warnings if text not in said] == list(here.warnings)
    assert there.to_dict()["modules"] == here.to_dict()["modules"]


def test_too_many_values_are_refused_before_they_are_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, write_checkpoint(tmp_path / "made").directory)
    monkeypatch.setattr(remote, "MOST_ANNOUNCED", 100)

    (fault,) = trtllm_ct.inspect_checkpoint(NAME).problems

    assert "at most 100 bytes" in fault.expected
    assert not [request for request in hub.requests if request.host == "store"]


def test_parts_that_are_near_are_fetched_together() -> None:
    parts = [remote.Part("b", 0, 4), remote.Part("a", 100, 4), remote.Part("a", 0, 8), remote.Part("a", 2**20, 1)]

    assert list(remote._merged(parts)) == [
        remote.Part("a", 0, 104),
        remote.Part("a", 2**20, 1),
        remote.Part("b", 0, 4),
    ]


class TestLongFiles:
    """A file may break off more often than a request is repeated, as long as a good part came in between."""

    @staticmethod
    def read(hub: HubServer, tmp_path: Path, *, cuts: int, nbytes: int = 64_000) -> bytes:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "model.safetensors").write_bytes(b"0123456789" * (nbytes // 10))
        hub.add(NAME, tmp_path / "made")
        source = open_source(NAME)
        assert isinstance(source, remote.RemoteFolder)
        hub.cuts = cuts
        pieces: list[bytes] = []
        source.transport.copy(remote.Part("model.safetensors", 0, nbytes), pieces.append, lambda _: None)
        return b"".join(pieces)

    def test_each_half_of_what_is_missing_counts(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nine answers break off: each brings half of the rest, and the last of them more than ten bytes."""
        monkeypatch.setattr(ranges, "_GOOD_PART", 10)

        assert self.read(hub, tmp_path, cuts=9) == b"0123456789" * 6400

    def test_little_parts_do_not_count(self, hub: HubServer, tmp_path: Path) -> None:
        with pytest.raises(HubError, match=r"62000 of 64000 bytes of model.safetensors, then .*, 5 times"):
            self.read(hub, tmp_path, cuts=9)

    def test_nothing_of_it_is_kept(self, hub: HubServer, tmp_path: Path) -> None:
        self.read(hub, tmp_path, cuts=0)

        kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert all(path.stat().st_size < 1000 for path in kept)


@pytest.mark.parametrize("stored", [None, {}, {"sha256": 7}, {"sha256": "a" * 63}, {"sha256": "G" * 64}, "text"])
def test_a_hash_that_is_none_is_left_out_of_the_list(stored: object) -> None:
    document = {
        "sha": COMMIT,
        "siblings": [{"rfilename": "a", "size": 1, "lfs": stored}, {"rfilename": "b", "size": 2}],
    }

    assert Listing.parse(json.dumps(document).encode()) == Listing(COMMIT, {"a": 1, "b": 2})


def test_hashes_are_kept_with_the_list() -> None:
    listing = Listing(COMMIT, {"x/a": 1, "x/b": 2}, {"x/a": "a" * 64})

    assert Listing.parse(listing.dump()) == listing
    assert listing.inside("x") == Listing(COMMIT, {"a": 1, "b": 2}, {"a": "a" * 64})
    assert listing.inside("") == listing

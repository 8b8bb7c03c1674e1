"""What goes wrong with a repository is said with what to do, and nothing that a server does fills the memory."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint
from hub_server import COMMIT, TOKEN, HubServer, hub_at, serving

import trtllm_ct
from trtllm_ct.base.errors import ConfigError, DetectionError, Fault, HubError, MissingDependencyError, UsageError
from trtllm_ct.checkpoint.hub import client, ranges, session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = "some-org/some-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(ranges.time, "sleep", lambda _: None)
    with serving() as server:
        hub_at(server, tmp_path, monkeypatch)
        server.add(NAME, write_checkpoint(tmp_path / "made", shards=2).directory)
        yield server


def fault_of(name: str = NAME, error: type[Exception] = HubError) -> Fault:
    with pytest.raises(error) as raised:
        trtllm_ct.inspect_checkpoint(name)
    (fault,) = raised.value.faults  # type: ignore[attr-defined]
    return fault


def test_a_name_that_is_nothing_is_told_both_readings(hub: HubServer) -> None:
    fault = fault_of("some-org/other")

    assert fault.where == "some-org/other"
    assert fault.expected == f"a directory of this machine, or a model repository on {hub.endpoint}"
    assert fault.found == (
        "neither: no such directory, and no such repository that can be read with no token on this machine"
    )
    assert "hf auth login" in fault.remedy


@pytest.mark.parametrize(
    ("access", "token", "found", "remedy"),
    [
        ("private", None, "no token on this machine", "set HF_TOKEN"),
        ("gated", None, "a gated repository, and no token on this machine", "Ask for access at"),
        ("closed", TOKEN, "a gated repository, and the token of this machine may not read it", "Ask for access at"),
        ("public", "wrong", "a token that the Hub refuses", "hf auth login again"),
    ],
)
def test_a_closed_repository_is_named_with_the_way_in(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    access: str,
    token: str | None,
    found: str,
    remedy: str,
) -> None:
    hub_at(hub, tmp_path, monkeypatch, token=token)
    hub.add(NAME, tmp_path / "made", access=access)

    fault = fault_of()

    assert found in fault.found
    assert remedy in fault.remedy


def test_a_revision_that_is_missing_is_named(hub: HubServer) -> None:
    fault = fault_of(f"{NAME}@v9")

    assert fault.where == f"{NAME}@v9"
    assert fault.found == "no revision 'v9'"


def test_a_repository_without_safetensors_is_no_checkpoint(hub: HubServer, tmp_path: Path) -> None:
    for path in (tmp_path / "made").glob("*.safetensors*"):
        path.unlink()
    (tmp_path / "made" / "pytorch_model.bin").write_bytes(b"x")

    (fault,) = trtllm_ct.inspect_checkpoint(NAME).problems

    assert fault.where == f"{NAME}@{COMMIT}"
    assert "pickle files only" in fault.found


def test_a_repository_without_config_says_what_it_holds(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "made" / "config.json").rename(tmp_path / "made" / "model.gguf")

    fault = fault_of(error=DetectionError)

    assert fault.expected == "a repository with config.json or params.json"
    assert "GGUF" in fault.found


def test_no_network_is_said_with_what_was_tried(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    fault = fault_of()

    assert fault.expected.endswith("a model repository on http://127.0.0.1:9")
    assert fault.found.startswith("no such directory, and from the Hub Conn")
    assert fault.found.endswith("5 times")
    assert "HF_HUB_OFFLINE=1" in fault.remedy


def test_without_huggingface_hub_both_readings_are_told(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    fault = fault_of(NAME, MissingDependencyError)

    assert fault.where == NAME
    assert fault.found == "no such directory, and no huggingface_hub to look up the id of a repository"
    assert "pip install" in fault.remedy


def test_a_directory_goes_before_a_repository(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some-org").mkdir()
    (tmp_path / "made").rename(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)

    assert str(trtllm_ct.inspect_checkpoint(NAME).directory) == NAME
    assert not hub.asked(NAME)


# Offline.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_offline_what_was_read_before_is_answered(hub: HubServer, offline: Callable[[], None]) -> None:
    before = trtllm_ct.inspect_checkpoint(NAME).to_dict()
    offline()
    asked = len(hub.requests)

    assert trtllm_ct.inspect_checkpoint(NAME).to_dict() == before
    assert len(hub.requests) == asked


def test_offline_what_was_never_read_is_named(hub: HubServer, offline: Callable[[], None]) -> None:
    offline()

    fault = fault_of()

    assert "was not read before" in fault.found
    assert not hub.asked(NAME)


def test_offline_a_downloaded_repository_is_read(hub: HubServer, tmp_path: Path, offline: Callable[[], None]) -> None:
    home = tmp_path / "hf" / "models--some-org--some-model"
    snapshot = home / "snapshots" / COMMIT
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    snapshot.parent.mkdir()
    (tmp_path / "made").rename(snapshot)
    offline()

    assert trtllm_ct.inspect_checkpoint(NAME).directory == snapshot


# Answers that are not what was asked for.


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_cut_connection_is_opened_again_for_the_rest(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, cuts: int
) -> None:
    monkeypatch.setattr(session, "_PIECE_BYTES", 256)
    hub.cuts = cuts

    assert trtllm_ct.inspect_checkpoint(NAME).plan is not None
    ranges_asked = [request.range for request in hub.requests if request.host == "store"]
    assert len(ranges_asked) == 2 + cuts
    assert len([text for text in ranges_asked if not text.startswith("bytes=0-")]) == cuts


def test_a_connection_that_is_always_cut_is_said_with_what_came(hub: HubServer) -> None:
    hub.cuts = 1000

    (fault, *_) = trtllm_ct.inspect_checkpoint(NAME).problems

    assert "bytes of model-0000" in fault.found
    assert fault.found.endswith("5 times")


@pytest.mark.parametrize("status", [429, 503, 500, 504])
def test_a_busy_hub_is_asked_again(hub: HubServer, status: int) -> None:
    hub.statuses = [status] * 3

    assert trtllm_ct.inspect_checkpoint(NAME).plan is not None


def test_a_hub_that_stays_busy_is_named(hub: HubServer) -> None:
    hub.statuses = [503] * 1000

    assert fault_of().found == "no such directory, and from the Hub status 503, 5 times"


LIES: dict[str, Callable[[str], str]] = {
    "begin": lambda text: text.replace("bytes 0-", "bytes 1-"),
    "size": lambda text: text + "0",
    "end": lambda text: text.replace("-", "-9", 1),
    "unit": lambda text: text.replace("bytes", "lines"),
    "nothing": lambda _: "",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_content_range_is_refused(hub: HubServer, lie: str) -> None:
    hub.lie = LIES[lie]

    fault = fault_of()

    assert fault.where == f"{NAME}: config.json"
    assert fault.found.startswith("Content-Range ")
    assert "proxy" in fault.remedy


def test_an_answer_that_goes_on_is_cut_off(hub: HubServer) -> None:
    hub.surplus = b"x" * 2**20

    assert fault_of().found == "an answer that goes on after them"


def test_a_compressed_answer_is_refused(hub: HubServer) -> None:
    hub.encoding = "gzip"

    assert "gzip" in fault_of().found


def test_a_server_without_ranges_is_read_from_the_begin_of_files(hub: HubServer) -> None:
    """The rest of the file is not read."""
    hub.whole = True

    assert trtllm_ct.inspect_checkpoint(NAME).plan is not None


def test_a_server_without_ranges_is_refused_where_values_are_inside(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, write_checkpoint(tmp_path / "nvfp4", scheme="nvfp4").directory, commit="f" * 40)
    hub.whole = True

    (fault,) = trtllm_ct.inspect_checkpoint(NAME).problems

    assert fault.found == "the whole file"


@pytest.mark.parametrize(
    ("listing", "found"),
    [
        (b"no JSON", "Expecting value"),
        (b"[]", "an answer without a commit and files"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b'{"sha": "main", "siblings": []}', "an answer without a commit and files"),
        (json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "a"}]}).encode(), "no size of a"),
        (json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "a", "size": -1}]}).encode(), "no size of a"),
        (json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "../a", "size": 1}]}).encode(), "a file without a path"),
    ],
)
def test_an_answer_that_is_no_list_of_files_is_refused(hub: HubServer, listing: bytes, found: str) -> None:
    hub.listing = listing

    assert found in fault_of().found


def test_a_list_of_files_without_end_is_cut_off(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LISTING_BYTES", 100)

    assert fault_of().found == "an answer that goes on after them"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_files_of_enormous_sizes_are_not_fetched(hub: HubServer, tmp_path: Path, file: str) -> None:
    """The limits of local files hold, whatever the Hub says about sizes."""
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "made").iterdir()} | {file: 10**15}
    files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    hub.listing = json.dumps({"sha": COMMIT, "siblings": files}).encode()

    try:
        (fault,) = trtllm_ct.inspect_checkpoint(NAME).problems
    except ConfigError as error:
        (fault,) = error.faults

    assert "where at most" in fault.found
    assert not hub.asked(f"/{file}")


def test_a_file_that_is_shorter_than_listed_is_refused(hub: HubServer, tmp_path: Path) -> None:
    files = [{"rfilename": "config.json", "size": 10**5}]
    hub.listing = json.dumps({"sha": COMMIT, "siblings": files}).encode()

    assert fault_of().found.startswith("Content-Range ")


@pytest.mark.parametrize("url", ["https://huggingface.co/datasets/a/b", "https://huggingface.co/a"])
def test_urls_of_other_things_are_usage_errors(url: str) -> None:
    assert "model repository" in fault_of(url, UsageError).expected

"""The commands that take the name of a repository, as a process of its own and in this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint
from command_line import run_cli
from fresh_python import run_python
from hub_server import COMMIT, HubServer, hub_at, serving

from trtllm_ct.cli import progress
from trtllm_ct.convert import units

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "some-org/some-model"
PLACE = f"{NAME}@{COMMIT}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving() as server:
        hub_at(server, tmp_path, monkeypatch)
        server.add(NAME, write_checkpoint(tmp_path / "made", scheme="nvfp4", shards=2).directory)
        yield server


@pytest.mark.parametrize(
    "command",
    [
        ("inspect",),
        ("inspect", "--modules", "--tp", "2"),
        ("inspect", "--json", "--engine", "1.2.1"),
        ("plan",),
        ("plan", "--json", "--to", "dense"),
        ("doctor", "--json"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_a_command_says_of_a_repository_what_it_says_of_its_directory(
    hub: HubServer, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command

    there, here = (run_cli(name, place, *options) for place in (NAME, tmp_path / "made"))

    assert (there.code, there.err) == (here.code, here.err)
    assert there.out.replace(PLACE, "PLACE").split() == here.out.replace(str(tmp_path / "made"), "PLACE").split()


@pytest.mark.parametrize("tp", [1, 2, 64])
def test_doctor_reads_the_record_of_a_converted_directory(hub: HubServer, tmp_path: Path, tp: int) -> None:
    assert run_cli("convert", tmp_path / "made", tmp_path / "out").code == 0
    hub.add(NAME, tmp_path / "out")

    there, here = (run_cli("doctor", place, "--tp", tp, "--json") for place in (NAME, tmp_path / "out"))

    assert there.code == here.code
    assert there.out.replace(PLACE, "PLACE") == here.out.replace(str(tmp_path / "out"), "PLACE")


def test_a_revision_and_a_url_name_the_same(hub: HubServer) -> None:
    documents = [
        run_cli("inspect", place, "--json").document
        for place in (f"{NAME}@main", PLACE, f"{hub.endpoint}/{NAME}/tree/main")
    ]

    assert [document["directory"] for document in documents] == [PLACE] * 3
    assert documents[0] == documents[1] == documents[2]


def test_a_folder_of_a_repository_is_read_by_its_url(hub: HubServer, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    (tmp_path / "made").rename(outer / "inner")
    hub.add(NAME, outer)

    refused = run_cli("inspect", NAME)
    done = run_cli("inspect", f"{hub.endpoint}/{NAME}/tree/main/inner", "--json")

    assert refused.code == 1
    assert "Give one of the directories inside instead: inner" in refused.err_words
    assert done.document["directory"] == f"{PLACE}/inner"


def test_a_name_that_is_nothing_is_an_error_of_the_checkpoint(hub: HubServer) -> None:
    done = run_cli("inspect", "some-org/other", "--json")

    assert done.code == 1
    assert done.document["error"] == "HubError"


def test_verify_says_how_to_get_the_weights(hub: HubServer) -> None:
    done = run_cli("verify", NAME)

    assert done.code == 1
    assert f"hf download {NAME}" in done.err_words
    assert not hub.asked(NAME)


def test_convert_says_of_a_repository_what_it_says_of_its_directory(hub: HubServer, tmp_path: Path) -> None:
    here = run_cli("convert", tmp_path / "made", tmp_path / "here", "--json").document
    there = run_cli("convert", NAME, tmp_path / "there", "--json", "--keep", "1GB", "--workers", 2).document

    nbytes = sum(path.stat().st_size for path in (tmp_path / "made").glob("*.safetensors"))
    assert (there.pop("source"), there.pop("downloaded_bytes")) == (PLACE, nbytes)
    assert (here.pop("source"), here.pop("downloaded_bytes")) == (str(tmp_path / "made"), 0)
    assert {**there, "out": "", "seconds": 0} == {**here, "out": "", "seconds": 0}


def test_convert_shows_the_download(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0)
    monkeypatch.setattr(units, "UNIT_BYTES", 1)

    done = run_cli("convert", NAME, tmp_path / "there")

    assert {line.partition(":")[0] for line in done.err.splitlines()} == {"Converting", "Downloading"}
    assert "downloaded: " in done.out


@pytest.mark.parametrize(
    ("keep", "found"),
    [("1", "1 bytes"), ("0", "'0'"), ("some", "'some'"), ("-5GB", "'-5GB'")],
)
def test_a_room_that_is_none_is_a_usage_error(hub: HubServer, tmp_path: Path, keep: str, found: str) -> None:
    done = run_cli("convert", NAME, tmp_path / "there", f"--keep={keep}", "--json")

    assert done.code == 2
    assert done.document["error"] == "UsageError"
    (fault,) = done.document["faults"]
    assert (fault["where"], fault["found"]) == ("--keep", found)
    assert not (tmp_path / ".there.partial").exists()


def test_a_process_of_its_own_reads_the_environment(hub: HubServer) -> None:
    code = (
        "import sys\nsys.argv = ['trtllm-ct', 'inspect', sys.argv[1]]\nfrom trtllm_ct.cli.commands import main\nmain()"
    )

    done = run_python(code, NAME)

    assert PLACE in "".join(done.stdout.split())
    assert done.stderr == ""

"""Conversions of repositories that stopped go on from where they stopped, and those without room say so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from builders import write_checkpoint
from served_repository import (
    NAME,
    PLACE,
    SHARDS,
    HighWater,
    made,
    sizes_of,
    smallest_keep,
    tree,
    weights_asked,
)

from trtllm_ct import convert_checkpoint
from trtllm_ct.base.errors import HubError, OutputError, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.work_folder import DOWNLOADS

if TYPE_CHECKING:
    from pathlib import Path

    from hub_server import HubServer


class TestStoppedRuns:
    @pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
    @pytest.mark.parametrize("workers", [1, 4])
    def test_a_store_that_breaks_off_is_gone_on_with(
        self, hub: HubServer, tmp_path: Path, share: float, workers: int
    ) -> None:
        """Nothing that has come is fetched again: a shard is removed only after its units were recorded."""
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        total = sum(sizes_of(directory).values())
        keep = max(smallest_keep(tmp_path), 2 * max(sizes_of(directory).values()))
        hub.weights_sent, hub.weights_left = 0, int(share * total)

        with pytest.raises(HubError, match=r"bytes of model-.* 5 times"):
            convert_checkpoint(NAME, tmp_path / "there", keep=keep, workers=workers)
        assert (tmp_path / ".there.partial").is_dir()
        hub.weights_left = None
        report = convert_checkpoint(NAME, tmp_path / "there", keep=keep, workers=workers)

        assert hub.weights_sent == total
        assert report.downloaded_bytes <= total - int(share * total)
        assert tree(tmp_path / "there") == tree(tmp_path / "here")
        assert not list(tmp_path.glob(".*.partial"))

    def test_less_room_in_the_second_run_is_kept_too(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        needed = smallest_keep(tmp_path)
        hub.weights_left = sum(sizes_of(directory).values()) // 2
        with pytest.raises(HubError):
            convert_checkpoint(NAME, tmp_path / "there", workers=1)
        hub.weights_left = None
        water = HighWater(tmp_path / "there", monkeypatch)

        def begin(_total: int) -> Any:
            water.most = 0  # what the first run has left is removed by now
            return int

        convert_checkpoint(NAME, tmp_path / "there", keep=needed, on_download=begin)

        assert 0 < water.most <= needed
        assert tree(tmp_path / "there") == tree(tmp_path / "here")

    def test_another_commit_is_started_anew_and_that_is_said(
        self, hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        directory = made(tmp_path, hub)
        hub.weights_left = sum(sizes_of(directory).values()) // 2
        with pytest.raises(HubError):
            convert_checkpoint(NAME, tmp_path / "there")
        hub.weights_left = None
        hub.add(NAME, directory, commit="f" * 40)

        with caplog.at_level("WARNING", logger="trtllm_ct"):
            report = convert_checkpoint(NAME, tmp_path / "there")

        assert [record.getMessage() for record in caplog.records if "anew" in record.getMessage()] == [
            f"{tmp_path / '.there.partial'}: of another conversion, or of source files that changed; starting anew"
        ]
        assert report.source == f"{NAME}@{'f' * 40}"
        assert report.resumed_bytes == 0
        assert report.downloaded_bytes == sum(sizes_of(directory).values())

    def test_the_commit_at_the_start_is_converted_to_the_end(self, hub: HubServer, tmp_path: Path) -> None:
        """A branch that moves meanwhile has no effect."""
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        other = write_checkpoint(tmp_path / "other", scheme="int4-g32", shards=SHARDS, seed=5).directory

        def move(_total: int) -> Any:
            hub.repositories[NAME].branches["main"] = "f" * 40
            return int

        report = convert_checkpoint(NAME, tmp_path / "there", on_download=move)

        assert report.source == PLACE
        assert tree(tmp_path / "there") == tree(tmp_path / "here")
        assert tree(other) != tree(directory)

    def test_a_damaged_beginning_of_a_shard_is_noticed_and_fetched_anew(self, hub: HubServer, tmp_path: Path) -> None:
        """As a power cut may leave it."""
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        smallest_keep(tmp_path)  # reads the headers
        hub.weights_left = max(sizes_of(directory).values()) // 2
        with pytest.raises(HubError):
            convert_checkpoint(NAME, tmp_path / "there", workers=1)
        hub.weights_left = None
        left = list((tmp_path / ".there.partial" / DOWNLOADS).iterdir())
        assert left
        for path in left:
            path.write_bytes(b"\0" * path.stat().st_size)
        came: list[int] = []

        report = convert_checkpoint(NAME, tmp_path / "there", on_download=lambda _: came.append)

        assert report.downloaded_bytes == sum(came) == sum(sizes_of(directory).values())
        assert tree(tmp_path / "there") == tree(tmp_path / "here")

    def test_an_output_that_was_damaged_is_made_again(self, hub: HubServer, tmp_path: Path) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        hub.weights_left = sum(sizes_of(directory).values()) * 3 // 4
        with pytest.raises(HubError):
            convert_checkpoint(NAME, tmp_path / "there", workers=1)
        hub.weights_left = None
        weights = tmp_path / ".there.partial" / "model.safetensors"
        with weights.open("r+b") as file:
            file.seek(weights.stat().st_size // 4)
            file.write(b"damaged" * 100)

        convert_checkpoint(NAME, tmp_path / "there")

        assert tree(tmp_path / "there") == tree(tmp_path / "here")

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    def test_a_process_that_is_ended_is_gone_on_with(
        self, hub: HubServer, tmp_path: Path, number: signal.Signals
    ) -> None:
        directory = made(tmp_path, hub)
        convert_checkpoint(directory, tmp_path / "here")
        total = sum(sizes_of(directory).values())
        smallest_keep(tmp_path)  # reads the headers
        hub.weights_sent, hub.stalled_at = 0, total // 2
        running = start(tmp_path)
        while running.poll() is None and not hub.is_stalled:
            time.sleep(0.005)
        running.send_signal(number)
        hub.stalled_at = None  # a download that waits for bytes ends with the next ones
        _, err = running.communicate(timeout=60)
        assert running.returncode == (-number if number == signal.SIGKILL else 128 + number)
        if number != signal.SIGKILL:
            assert "The same command goes on from here." in " ".join(err.split())

        report = convert_checkpoint(NAME, tmp_path / "there")

        assert 0 < report.downloaded_bytes < total
        # What was on its way to the one download that was running may be sent twice.
        assert hub.weights_sent <= total + max(sizes_of(directory).values())
        assert tree(tmp_path / "there") == tree(tmp_path / "here")


def start(tmp_path: Path) -> subprocess.Popen[str]:
    """A conversion in a process of its own, one shard at a time."""
    code = (
        "from trtllm_ct.convert import shards, units\nshards._AT_ONCE = 1\nunits.UNIT_BYTES = 4000\n"
        "from trtllm_ct.cli.main import main\nmain()"
    )
    command = [sys.executable, "-c", code, "convert", NAME, str(tmp_path / "there"), "--workers", "1"]
    return subprocess.Popen(command, env={**os.environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_without_room_for_output_and_downloads_is_refused_before_anything_is_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made(tmp_path, hub)
    output = convert_checkpoint(directory, tmp_path / "here").plan.delivered_bytes
    needed = smallest_keep(tmp_path)
    monkeypatch.setattr(file_calls, "free_bytes", lambda _: output + needed)

    with pytest.raises(UsageError, match=r"expected room for .* bytes, found .* bytes free"):
        convert_checkpoint(NAME, tmp_path / "there", keep=needed)

    assert not weights_asked(hub)
    assert not hub.asked("tokenizer.json")
    assert not list(tmp_path.glob(".*.partial"))


def test_room_for_side_files_is_compared_before_the_first_one_is_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made(tmp_path, hub)
    (directory / "README.md").write_bytes(bytes(10**6))
    output = convert_checkpoint(directory, tmp_path / "here").plan.delivered_bytes
    needed = smallest_keep(tmp_path)
    monkeypatch.setattr(file_calls, "free_bytes", lambda _: output + needed + 10**6 // 2)

    with pytest.raises(UsageError, match=r"expected room for .* bytes, found .* bytes free"):
        convert_checkpoint(NAME, tmp_path / "there", keep=needed)

    assert not hub.asked("tokenizer.json")
    assert not hub.asked("README.md")


def test_a_disk_that_gets_full_is_said_and_gone_on_with(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made(tmp_path, hub)
    convert_checkpoint(directory, tmp_path / "here")
    write, written = file_calls.write_at, [0]

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 30_000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(file_calls, "write_at", full)
        with pytest.raises(OutputError, match="no space left on device"):
            convert_checkpoint(NAME, tmp_path / "there")

    convert_checkpoint(NAME, tmp_path / "there")

    assert tree(tmp_path / "there") == tree(tmp_path / "here")

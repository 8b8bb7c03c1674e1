"""Repositories are converted as their directories are, with few downloads on the disk, and from where a run stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite, write_checkpoint
from hub_server import COMMIT, TOKEN, HubServer, hub_at, serving
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config

from trtllm_ct import convert_checkpoint
from trtllm_ct.base.errors import CatalogError, HubError, OutputError, PayloadError, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.hub import ranges
from trtllm_ct.checkpoint.work_folder import DOWNLOADS
from trtllm_ct.convert import staging, units
from trtllm_ct.pipeline import head_probe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

NAME = "some-org/Some-Model.W4A16"
PLACE = f"{NAME}@{COMMIT}"
SHARDS = 6


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Units of a module or two, so that each shard serves several."""
    monkeypatch.setattr(ranges.time, "sleep", lambda _: None)
    monkeypatch.setattr(ranges, "_WAITS", (0.0,) * 4)
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    with serving(hashes=True) as server:
        hub_at(server, tmp_path, monkeypatch)
        yield server


def made(tmp_path: Path, hub: HubServer, *, scheme: Any = "int4-g32", **options: Any) -> Path:
    """A checkpoint of several shards with side files, served as a repository."""
    directory = write_checkpoint(tmp_path / "made", scheme=scheme, shards=SHARDS, **options).directory
    for name, text in {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"tokenizer_class": "TokenizersBackend"}',
        "README.md": "A model.",
        "additional_chat_templates/tool.jinja": "{{ x }}",
        "assets/picture.png": "?",
        "training.log": "?",
        ".gitattributes": "?",
    }.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    hub.add(NAME, directory)
    return directory


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sizes_of(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}


def weights_asked(hub: HubServer) -> Counter[str]:
    """How often each weight file was asked for beyond its header."""
    return Counter(
        request.path.rpartition("/")[2]
        for request in hub.requests
        if request.host == "store" and not request.range.startswith("bytes=0-") and request.range
    )


class HighWater:
    """Watches the bytes in the folder of downloads, after every write to it."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = out.with_name(f".{out.name}.partial") / DOWNLOADS
        self.most = 0
        self.files: set[str] = set()
        write = file_calls.write_at

        def watched(descriptor: int, data: memoryview, offset: int) -> int:
            written = write(descriptor, data, offset)
            self.look()
            return written

        monkeypatch.setattr(file_calls, "write_at", watched)

    def look(self) -> None:
        statuses = {}
        for path in self.folder.glob("*.safetensors"):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                statuses[path.name] = status.st_size
        self.files |= statuses.keys()
        self.most = max(self.most, sum(statuses.values()))


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "int4": {"scheme": "int4-g32"},
    "nvfp4": {"scheme": "nvfp4"},
    "mixed": {"scheme": {"q_proj": "int4-g64", "down_proj": "fp8-tensor-static"}, "kv": True},
    "experts": {"scheme": "nvfp4", "config": tiny_config("Qwen3MoeForCausalLM")},
    "nothing quantized": {"scheme": "dense"},
}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_repository_is_converted_as_its_directory(hub: HubServer, tmp_path: Path, case: str, workers: int) -> None:
    directory = made(tmp_path, hub, **CHECKPOINTS[case])

    here = convert_checkpoint(directory, tmp_path / "here", carry=["*.log"])
    there = convert_checkpoint(NAME, tmp_path / "there", carry=["*.log"], workers=workers)

    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert there.source == PLACE
    assert there.downloaded_bytes == sum(sizes_of(directory).values())
    document = {key: value for key, value in there.to_dict().items() if key not in _OF_A_RUN}
    assert document == {key: value for key, value in here.to_dict().items() if key not in _OF_A_RUN}
    assert there.left_out_files == ("assets/",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "here", "made", "there"]


_OF_A_RUN = {"source", "out", "seconds", "downloaded_bytes"}


@pytest.mark.parametrize("to", ["dense", "engine"])
def test_every_kind_of_directory_is_written(hub: HubServer, tmp_path: Path, to: str) -> None:
    directory = made(tmp_path, hub, scheme="fp8-tensor-static")

    for place, out in ((directory, "here"), (NAME, "there")):
        convert_checkpoint(place, tmp_path / out, to=to, max_shard_bytes=50_000)

    assert tree(tmp_path / "there") == tree(tmp_path / "here")


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("shards_kept", [1, 2, 3])
def test_no_more_than_the_kept_bytes_are_on_the_disk(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_kept: int, workers: int
) -> None:
    directory = made(tmp_path, hub)
    convert_checkpoint(directory, tmp_path / "here")
    sizes = sizes_of(directory)
    keep = max(smallest_keep(tmp_path), shards_kept * max(sizes.values()))
    water = HighWater(tmp_path / "there", monkeypatch)

    convert_checkpoint(NAME, tmp_path / "there", keep=keep, workers=workers)

    assert 0 < water.most <= keep < sum(sizes.values())
    assert water.files == sizes.keys()
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def smallest_keep(tmp_path: Path) -> int:
    """The number that the error names."""
    with pytest.raises(UsageError) as raised:
        convert_checkpoint(NAME, tmp_path / "never", keep=1)
    (fault,) = raised.value.faults
    assert (fault.where, fault.found) == ("--keep", "1 bytes")
    assert fault.expected.startswith("at least ")
    return int(fault.remedy.split()[2])


def test_too_little_room_is_refused_before_weights_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    made(tmp_path, hub)
    needed = smallest_keep(tmp_path)

    assert not weights_asked(hub)
    assert not hub.asked("tokenizer.json")
    with pytest.raises(UsageError):
        convert_checkpoint(NAME, tmp_path / "out", keep=needed - 1)
    convert_checkpoint(NAME, tmp_path / "out", keep=needed)

    assert not (tmp_path / "never").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_by_default_a_unit_that_needs_more_gets_it(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, hub)
    monkeypatch.setattr(staging, "KEEP_BYTES", 1)
    water = HighWater(tmp_path / "out", monkeypatch)

    convert_checkpoint(NAME, tmp_path / "out")

    assert water.most <= smallest_keep(tmp_path)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_room_of_no_byte_is_none(tmp_path: Path, keep: int) -> None:
    with pytest.raises(UsageError, match="--keep: expected at least one byte"):
        convert_checkpoint(NAME, tmp_path / "out", keep=keep)


def test_shards_that_do_not_stay_are_fetched_again_and_that_is_said(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the parts of a layer are in shards far apart."""
    directory = made(tmp_path, hub)
    scatter(directory)
    sizes = sizes_of(directory)
    needed = smallest_keep(tmp_path)

    with caplog.at_level("WARNING", logger="trtllm_ct"):
        less = convert_checkpoint(NAME, tmp_path / "less", keep=needed)
    said = [record.getMessage() for record in caplog.records if "more than once" in record.getMessage()]
    enough = int(said[0].rpartition("--keep ")[2].split()[0])
    caplog.clear()
    once = convert_checkpoint(NAME, tmp_path / "once", keep=enough)

    assert less.downloaded_bytes > once.downloaded_bytes == sum(sizes.values())
    assert int(said[0].split()[0]) == less.downloaded_bytes - once.downloaded_bytes
    assert not caplog.records
    assert tree(tmp_path / "less") == tree(tmp_path / "once")


def scatter(directory: Path) -> None:
    """Let each part of a layer lie in two shards, other ones for each part."""
    files = sorted(sizes_of(directory))
    tensors = {name: tensor for file in files for name, tensor in load_file(directory / file).items()}
    parts = sorted({name.rpartition(".")[0].rpartition(".")[0] for name in tensors})
    pairs = list(combinations(files, 2))
    homes = {
        name: pairs[parts.index(name.rpartition(".")[0].rpartition(".")[0]) % len(pairs)][number % 2]
        for number, name in enumerate(sorted(tensors))
    }
    for file in files:
        save_file({name: tensors[name].clone() for name, home in homes.items() if home == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


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


def threading_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch-")]


def test_faulty_values_are_all_reported_and_leave_nothing(hub: HubServer, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.down_proj.weight_scale" for layer in range(2)]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name][:] = float("nan")

    rewrite(made(tmp_path, hub), spoil)

    with pytest.raises(PayloadError) as raised:
        convert_checkpoint(NAME, tmp_path / "there")

    assert len(raised.value.faults) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]


@pytest.mark.parametrize("depth", [31, 40])
def test_side_files_too_deep_are_refused_and_leave_nothing(hub: HubServer, tmp_path: Path, depth: int) -> None:
    """What was put into deeper folders could not be removed again, and no later run could go on."""
    directory = made(tmp_path, hub)
    deep = f"{'a/' * depth}x.txt"
    (directory / deep).parent.mkdir(parents=True)
    (directory / deep).write_text("")

    if depth < 32:
        assert deep in convert_checkpoint(NAME, tmp_path / "there", carry=["a"]).carried_files
        return
    with pytest.raises(CatalogError, match=f"in at most 31 folders in each other, found {depth} of them") as raised:
        convert_checkpoint(NAME, tmp_path / "there", carry=["a"])

    assert raised.value.faults[0].where == f"{PLACE}/{deep}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]


def test_side_files_without_end_are_refused_before_the_first_one_is_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs at the top are fetched because a configuration may name them; real repositories have a few."""
    monkeypatch.setattr(staging, "MAX_SIDE_FILES", 20)
    directory = made(tmp_path, hub)
    for number in range(20):
        (directory / f"module_{number}.py").write_text("")

    with pytest.raises(CatalogError, match=r"expected at most 20 side files, found \d+ of them"):
        convert_checkpoint(NAME, tmp_path / "there")

    assert not hub.asked(".py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]


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


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_config_json_ties_is_compared_as_a_whole(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, equal: bool
) -> None:
    """A directory is compared so too; `inspect` of a repository looks at samples only."""
    monkeypatch.setattr(head_probe, "_SAMPLE_BYTES", 64)
    directory = write_checkpoint(tmp_path / "made", config=tiny_config(tie_word_embeddings=True)).directory

    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not equal:
            tensors["lm_head.weight"][3, 5] += 1

    rewrite(directory, store_head)
    hub.add(NAME, directory)

    here = convert_checkpoint(directory, tmp_path / "here")
    there = convert_checkpoint(NAME, tmp_path / "there")

    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert there.warnings == here.warnings


def test_ranks_on_other_machines_are_refused(hub: HubServer, tmp_path: Path) -> None:
    made(tmp_path, hub)

    with pytest.raises(UsageError, match="hf download") as raised:
        staging.staged_source(NAME, None, "mpi")  # type: ignore[arg-type]

    assert raised.value.faults[0].where == "--executor"


def test_files_of_others_beside_the_downloads_stay_and_are_named(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, hub)

    def put(_total: int) -> Any:
        (tmp_path / ".there.partial" / DOWNLOADS).mkdir(exist_ok=True)
        (tmp_path / ".there.partial" / DOWNLOADS / "thesis.tex").write_text("years")
        return int

    with caplog.at_level("WARNING", logger="trtllm_ct"):
        convert_checkpoint(NAME, tmp_path / "there", on_download=put)

    assert [path.name for path in (tmp_path / "there" / DOWNLOADS).iterdir()] == ["thesis.tex"]
    assert any(f"{DOWNLOADS}/thesis.tex" in record.getMessage() for record in caplog.records)


def test_downloads_are_shown_from_threads_with_their_sum(hub: HubServer, tmp_path: Path) -> None:
    directory = made(tmp_path, hub)
    totals, pieces = [], []

    def begin(total: int) -> Any:
        totals.append(total)
        return pieces.append

    convert_checkpoint(NAME, tmp_path / "there", on_download=begin)

    assert totals == [sum(sizes_of(directory).values())] == [sum(pieces)]
    assert not threading_left()

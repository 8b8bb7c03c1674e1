"""A checkpoint of several shards that a local server has as a repository, and what its conversions are compared by."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from builders import write_checkpoint
from hub_server import COMMIT, HubServer

from trtllm_ct import convert_checkpoint
from trtllm_ct.base.errors import UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.work_folder import DOWNLOADS

if TYPE_CHECKING:
    from pathlib import Path


__all__ = [
    "NAME",
    "PLACE",
    "SHARDS",
    "HighWater",
    "made",
    "sizes_of",
    "smallest_keep",
    "threading_left",
    "tree",
    "weights_asked",
]

NAME = "some-org/Some-Model.W4A16"
PLACE = f"{NAME}@{COMMIT}"
SHARDS = 6


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


def smallest_keep(tmp_path: Path) -> int:
    """The number that the error names."""
    with pytest.raises(UsageError) as raised:
        convert_checkpoint(NAME, tmp_path / "never", keep=1)
    (fault,) = raised.value.faults
    assert (fault.where, fault.found) == ("--keep", "1 bytes")
    assert fault.expected.startswith("at least ")
    return int(fault.remedy.split()[2])


def threading_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch-")]

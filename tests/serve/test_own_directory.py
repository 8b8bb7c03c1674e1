"""Prepared directories are used only if this user made them, and nobody else can have changed them."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint
from other_user import OTHER_USER, as_other_user
from tiny_models import tiny_config

from trtllm_ct.base.errors import SidecarError
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.serve import leases
from trtllm_ct.serve.sidecar import SIDECAR_FILE, Sidecar, make_sidecar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG = tiny_config(hidden=128, intermediate=256)
OPTIONS = PlanOptions(to="tensorrt_llm")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(leases, "_held", {})
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int4-g64").directory
    (directory / "tokenizer.json").write_text("{}")
    return directory


def replace_link(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("/etc/hostname")


def name_other_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder of all": (lambda directory: directory.chmod(0o777), "other users can write"),
    "folder of the group": (lambda directory: directory.chmod(0o770), "other users can write"),
    "root of all": (lambda directory: directory.parent.chmod(0o777), "other users can write"),
    "file of all": (lambda directory: (directory / "config.json").chmod(0o666), "other users can write"),
    "record of all": (lambda directory: (directory / SIDECAR_FILE).chmod(0o666), "other users can write"),
    "auto_map": (name_other_code, "other content of config.json"),
    "another file": (lambda directory: (directory / "evil.py").write_text(""), "other content of evil.py"),
    "a file less": (lambda directory: (directory / "hf_quant_config.json").unlink(), "of hf_quant_config.json"),
    "another link": (replace_link, "other content of tokenizer.json"),
    "a named pipe": (lambda directory: os.mkfifo(directory / "pipe"), "other content of .*pipe"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_what_is_not_what_this_user_made_is_refused(source: Path, change: Callable[[Path], object], said: str) -> None:
    """By the process that serves, and by the one that prepares it a second time."""
    directory = make_sidecar(source, OPTIONS)
    change(directory)

    with pytest.raises(SidecarError, match=said):
        Sidecar.open(directory)
    with pytest.raises(SidecarError, match=said):
        make_sidecar(source, OPTIONS)


def test_a_new_directory_is_private_whatever_the_umask(source: Path) -> None:
    before = os.umask(0)
    try:
        directory = make_sidecar(source, OPTIONS)
    finally:
        os.umask(before)

    assert directory.stat().st_mode & 0o777 == 0o700
    assert directory.parent.stat().st_mode & 0o777 == 0o700


def test_a_record_of_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    directory = make_sidecar(source, OPTIONS)
    record = json.loads((directory / SIDECAR_FILE).read_text())
    (directory / SIDECAR_FILE).write_text(json.dumps(record | {"source": str(tmp_path)}))

    with pytest.raises(SidecarError, match="another source"):
        make_sidecar(source, OPTIONS)


def test_a_lock_of_another_process_is_not_waited_for(source: Path) -> None:
    directory = make_sidecar(source, OPTIONS)
    os.close(leases._held.pop(directory / SIDECAR_FILE))  # as in a new process
    started = time.monotonic()
    with (directory / SIDECAR_FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        with pytest.raises(SidecarError, match="keeps it locked"):
            make_sidecar(source, OPTIONS)

    assert time.monotonic() - started < 5


@pytest.mark.two_users
class TestTwoUsers:
    """One user prepares a directory, another one serves."""

    @pytest.fixture(autouse=True)
    def shared_root(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A folder for all users, as on a shared disk."""
        with TemporaryDirectory() as name:
            Path(name).chmod(0o755)
            root = Path(name) / "cache"
            root.mkdir()
            root.chmod(0o755)
            monkeypatch.setenv("TRTLLM_CT_CACHE", str(root))
            yield root

    def test_a_directory_that_another_user_owns_is_refused(self, source: Path) -> None:
        directory = make_sidecar(source, OPTIONS)
        os.chown(directory, OTHER_USER, OTHER_USER)

        with pytest.raises(SidecarError, match=f"user {OTHER_USER} owns it"):
            Sidecar.open(directory)
        with pytest.raises(SidecarError, match=f"user {OTHER_USER} owns it"):
            make_sidecar(source, OPTIONS)

    def test_a_file_that_another_user_owns_is_refused(self, source: Path) -> None:
        directory = make_sidecar(source, OPTIONS)
        os.chown(directory / "config.json", OTHER_USER, OTHER_USER)

        with pytest.raises(SidecarError, match=f"user {OTHER_USER} owns it"):
            Sidecar.open(directory)

    def test_a_root_that_another_user_made_is_refused(self, source: Path, shared_root: Path) -> None:
        shared_root.chmod(0o1777)
        os.environ["TRTLLM_CT_CACHE"] = str(shared_root / "mine")
        as_other_user(lambda: (shared_root / "mine").mkdir(mode=0o777))

        with pytest.raises(SidecarError, match=f"user {OTHER_USER} owns it"):
            make_sidecar(source, OPTIONS)

        assert list((shared_root / "mine").iterdir()) == []

    def test_a_directory_of_root_is_not_that_of_another_user(self, source: Path) -> None:
        directory = make_sidecar(source, OPTIONS)
        directory.chmod(0o755)

        def serve() -> None:
            with pytest.raises(SidecarError):
                Sidecar.open(directory)

        as_other_user(serve)

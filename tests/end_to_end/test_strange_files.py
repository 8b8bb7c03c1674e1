"""Strange things under the names of a checkpoint's files: an error at once, before a byte is read.

Named pipes would block, devices never end, and sparse files of 100 GB would fill the memory.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint
from command_line import run_cli
from fresh_python import run_python
from other_user import OTHER_USER, as_other_user

from trtllm_ct import convert_checkpoint, verify_checkpoint
from trtllm_ct.base.errors import CheckpointError
from trtllm_ct.checkpoint.catalog import INDEX_FILE
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

GB = 10**9
FILES = (
    "config.json", "params.json", "hf_quant_config.json", "quantize_config.json", "recipe.yaml", INDEX_FILE,
    "model.safetensors", "tokenizer.json", "trtllm_ct.json",
)  # fmt: skip


def bind(path: Path) -> None:
    """Put a socket there; its path has to be short."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def sparse(size: int) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return put


STRANGE: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": lambda path: path.mkdir(),
    "3 GB": sparse(3 * GB),
    "100 GB": sparse(100 * GB),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nowhere": lambda path: path.symlink_to("gone"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tokenizer=True).directory


@pytest.mark.parametrize("put", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("name", FILES)
def test_a_strange_file_is_refused_at_once(directory: Path, tmp_path: Path, name: str, put: Callable[[Path], object]):
    (directory / name).unlink(missing_ok=True)
    put(directory / name)
    tracemalloc.start()
    started = time.process_time()

    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(directory, tmp_path / "out")

    assert time.process_time() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 200 * 10**6
    tracemalloc.stop()
    assert name in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("read", [lambda directory: plan_checkpoint(directory, "dense"), verify_checkpoint])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "recipe.yaml"])
def test_other_commands_refuse_it_too(directory: Path, name: str, read: Callable[..., object]):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)

    with pytest.raises(CheckpointError, match="named pipe"):
        read(directory)


@pytest.mark.parametrize("put", STRANGE.values(), ids=STRANGE)
def test_a_strange_file_of_modes_in_an_output_is_refused(tmp_path: Path, put: Callable[[Path], object]):
    directory = write_checkpoint(tmp_path / "model", scheme="fp8-tensor-static").directory
    convert_checkpoint(directory, tmp_path / "out")
    put(tmp_path / "out" / "quant_cfg.json")

    with pytest.raises(CheckpointError, match=r"quant_cfg\.json"):
        verify_checkpoint(directory, tmp_path / "out")


@pytest.mark.reference
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_reference_engine_waits_for_no_tokenizer(directory: Path, name: str):
    from trtllm_ct.reference.generate import load_tokenizer

    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)

    with pytest.raises(CheckpointError, match="named pipe"):
        load_tokenizer(str(directory))


@pytest.mark.two_users
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"])
def test_a_file_without_permission_is_an_error_of_the_checkpoint(tmp_path: Path, name: str):
    place = Path(f"/tmp/{tmp_path.parent.name}-{tmp_path.name}")  # below a folder that the other user may enter
    directory = write_checkpoint(place / "model", tokenizer=True).directory
    try:
        (directory / name).touch()
        (directory / name).chmod(0)
        place.chmod(0o777)
        directory.chmod(0o755)

        def convert() -> None:
            with pytest.raises(CheckpointError, match=r"(?i)permission denied"):
                convert_checkpoint(directory, place / "out", workers=1)

        as_other_user(convert, user=OTHER_USER)
    finally:
        shutil.rmtree(place)


EVIL = "model\x1b]0;owned\x07\nConverted to OUT"


@pytest.mark.parametrize("name", [b"model\xff.safetensors", EVIL.encode() + b".safetensors"])
def test_weight_files_with_unprintable_names_are_refused(directory: Path, tmp_path: Path, name: bytes):
    (directory / "model.safetensors").rename(directory / os.fsdecode(name))

    done = run_cli("convert", directory, tmp_path / "out", "--to", "modelopt")

    assert done.code == 1
    assert "Rename the file" in done.err
    assert "\x1b" not in done.err + done.out
    assert "\nConverted" not in done.err + done.out


@pytest.mark.parametrize("name", [os.fsdecode(b"di\xffr"), "di\x1b[2Jr", "di\nr"])
def test_directories_with_such_names_are_converted_and_printed_harmlessly(tmp_path: Path, name: str):
    source = write_checkpoint(tmp_path / name).directory

    for arguments in (
        ("inspect", source), ("convert", source, tmp_path / f"{name}out", "--to", "modelopt"), ("verify", source),
        ("plan", source, "--to", "dense"),
    ):  # fmt: skip
        done = run_cli(*arguments)
        assert done.code == 0
        assert "\x1b" not in done.out + done.err
        assert "di\nr" not in done.out
        (done.out + done.err).encode()


PROGRAM = """
    import os, sys
    os.close(1)
    os.execv(sys.executable, [sys.executable, "-m", "trtllm_ct", *sys.argv[1:]])
    """


def test_a_command_runs_with_stdout_closed(directory: Path, tmp_path: Path):
    run_python(PROGRAM, "inspect", directory)
    run_python(PROGRAM, "convert", directory, tmp_path / "out", "--to", "modelopt")

    verify_checkpoint(directory, tmp_path / "out").raise_if_bad()


FULL = """
    import os, sys
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    code = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-m", "trtllm_ct", *sys.argv[1:]])
    assert code == 1, code
    """


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_full_disk_under_stdout_is_said(directory: Path, option: tuple[str, ...]):
    assert "no space left" in run_python(FULL, "inspect", directory, *option).stderr

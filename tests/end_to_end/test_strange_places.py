"""Commands on paths that can't be used: each is an error with all its parts, and nothing is left behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli
from other_user import IS_ROOT, as_other_user

from trtllm_ct.base.errors import CatalogError, UsageError
from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = tiny_config(layers=1, hidden=32, intermediate=64, vocabulary=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", config=CONFIG, scheme="int8-channel").directory


def let_others_enter(place: Path) -> None:
    """Open a directory, and those of pytest above it."""
    for path in (place, *place.parents[:3]):
        if path == place or "pytest-" in str(path):
            path.chmod(0o755)


def commands(source: Path, place: Path) -> Iterator[tuple[object, ...]]:
    """Every command with a directory, with `place` as each of its directories."""
    yield "inspect", place
    yield "plan", place, "--to", "dense"
    yield "verify", place
    yield "verify", source, place
    yield "doctor", place
    yield "convert", place, source.parent / "out", "--to", "modelopt"
    yield "convert", source, place, "--to", "modelopt"
    yield "convert", source, place / "a" / "out", "--to", "modelopt", "--overwrite"


def assert_refused(source: Path, place: Path, found: str) -> None:
    for command in commands(source, place):
        done = run_cli(*command, "--json")
        assert done.code in {1, 2}, command
        faults = done.document.get("faults") or done.document["served"]["faults"] if done.out else ()
        assert any(found in fault["found"] for fault in faults), (command, faults)
        assert all(fault["remedy"] for fault in faults)
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]


@pytest.mark.parametrize(
    ("name", "found"), [("n" * 300, "file name too long"), ("n/" * 3000, "file name too long"), ("loop", "")]
)
def test_names_that_lead_nowhere(source: Path, tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "loop").symlink_to("loop")

    assert_refused(source, tmp_path / name, found)

    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_folder_that_another_user_may_not_enter(source: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    assert_refused(source, tmp_path / "private" / ("n" * 300), "")  # imports what the other user may not read
    if not IS_ROOT:
        return  # Nobody else can be played.
    let_others_enter(source)
    let_others_enter(tmp_path)

    as_other_user(lambda: assert_refused(source, tmp_path / "private" / "x", "permission denied"))

    assert list((tmp_path / "private").iterdir()) == []


def test_a_source_that_can_not_be_read_is_an_error_of_the_source(source: Path, tmp_path: Path) -> None:
    """And not of the output, of which nothing is left."""
    if not IS_ROOT:
        return
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    let_others_enter(tmp_path)
    convert_checkpoint(source, tmp_path / "warm", to="dense")

    def attempt() -> None:
        with pytest.raises(CatalogError, match="permission denied") as raised:
            convert_checkpoint(tmp_path / "private" / "model", tmp_path / "open" / "out")
        assert raised.value.faults[0].where.startswith(str(tmp_path / "private"))

    as_other_user(attempt)

    assert list((tmp_path / "open").iterdir()) == []


def test_a_current_directory_that_is_gone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        for command in (("convert", source, "out", "--to", "modelopt"), ("convert", "x", "out", "--to", "modelopt")):
            done = run_cli(*command)
            assert (done.code, done.out) == (2, "")
            assert "no such file or directory" in done.err_words
        assert run_cli("inspect", ".").code == 1
    finally:
        os.chdir(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ("--tp", 10**9), ("--pp", 10**9), ("--tp", 10**9, "--ep", 10**9), ("--workers", 10**8),
        ("--max-shard-size", "9" * 400),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_nothing_has_are_refused_at_once(source: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    done = run_cli("convert", source, tmp_path / "out", "--to", "modelopt", *options)

    assert (done.code, done.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_can_have(source: Path, tmp_path: Path) -> None:
    """An argument of a program can't have one; a caller's may."""
    with pytest.raises(UsageError, match="embedded null"):
        convert_checkpoint(source, f"{tmp_path}/o\0ut")

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trtllm_ct.base.errors import UsageError
from trtllm_ct.checkpoint.output import check_output_place, clear, replacing_directory


def old_directory(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    return out


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fill(out: Path, *, overwrite: bool = False) -> None:
    with replacing_directory(out, overwrite=overwrite) as partial:
        (partial / "new").write_text("new")


def fail_after_writing(path: Path, error: type[BaseException]) -> None:
    path.write_text("new")
    raise error


def test_work_happens_in_a_directory_beside_the_output_and_is_renamed_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"

    with replacing_directory(out, overwrite=False) as partial:
        assert partial == tmp_path / ".out.partial"
        (partial / "new").write_text("new")
        assert not out.exists()

    assert entries(out) == ["new"]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_everything_as_it_was(tmp_path: Path, existing: bool) -> None:
    out = old_directory(tmp_path) if existing else tmp_path / "out"
    before = entries(tmp_path)

    with pytest.raises(ValueError), replacing_directory(out, overwrite=True) as partial:  # noqa: PT011 (as raised)
        fail_after_writing(partial / "new", ValueError)

    assert entries(tmp_path) == before
    assert not existing or entries(out) == ["old"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_keeps_the_work_for_the_next_run(tmp_path: Path, interrupt: type[BaseException]) -> None:
    out = old_directory(tmp_path)

    with pytest.raises(interrupt), replacing_directory(out, overwrite=True) as partial:
        fail_after_writing(partial / "new", interrupt)

    assert entries(out) == ["old"]
    with replacing_directory(out, overwrite=True) as partial:
        assert entries(partial) == ["new"]
    assert entries(out) == ["new"]


def test_an_existing_directory_is_refused_without_overwrite(tmp_path: Path) -> None:
    out = old_directory(tmp_path)

    with pytest.raises(UsageError, match="--overwrite"):
        fill(out)

    assert entries(out) == ["old"]
    assert entries(tmp_path) == ["out"]


def test_overwrite_replaces_only_at_the_end(tmp_path: Path) -> None:
    out = old_directory(tmp_path)

    with replacing_directory(out, overwrite=True) as partial:
        (partial / "new").write_text("new")
        assert entries(out) == ["old"]

    assert entries(out) == ["new"]
    assert entries(tmp_path) == ["out"]


def test_a_second_run_at_once_is_refused_and_the_first_continues(tmp_path: Path) -> None:
    with replacing_directory(tmp_path / "out", overwrite=False) as partial:
        (partial / "new").write_text("new")
        with pytest.raises(UsageError, match="another process that writes there"):
            fill(tmp_path / "out")

    assert entries(tmp_path / "out") == ["new"]
    assert entries(tmp_path) == ["out"]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(UsageError, match="a file of that name"):
        fill(tmp_path / "out", overwrite=True)

    assert (tmp_path / "out").read_text() == "mine"


def test_leftovers_of_a_crashed_run_can_be_cleared_in_part(tmp_path: Path) -> None:
    (tmp_path / ".out.partial/folder").mkdir(parents=True)
    for name in ("half", "good", "folder/file"):
        (tmp_path / ".out.partial" / name).write_text(name)

    with replacing_directory(tmp_path / "out", overwrite=False) as partial:
        clear(partial, keep={"good"})
        (partial / "new").write_text("new")

    assert entries(tmp_path / "out") == ["good", "new"]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_working_directory_path_that_is_no_directory_is_replaced(tmp_path: Path, kind: str) -> None:
    """A link is not followed: its target may belong to somebody else."""
    (tmp_path / "theirs").mkdir()
    if kind == "file":
        (tmp_path / ".out.partial").write_text("")
    else:
        (tmp_path / ".out.partial").symlink_to(tmp_path / "theirs")

    fill(tmp_path / "out")

    assert entries(tmp_path / "out") == ["new"]
    assert not (tmp_path / "out").is_symlink()
    assert entries(tmp_path) == ["out", "theirs"]


def test_leftovers_of_a_crash_while_replacing_are_removed(tmp_path: Path) -> None:
    out = old_directory(tmp_path)
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced/older").write_text("older")

    fill(out, overwrite=True)

    assert entries(tmp_path) == ["out"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    fill(tmp_path / "a/b/out")

    assert entries(tmp_path / "a/b") == ["out"]


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")

    with pytest.raises(UsageError, match="not a directory"):
        fill(tmp_path / "a/out")


def test_the_old_directory_comes_back_when_the_new_one_can_not_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = old_directory(tmp_path)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)

    with pytest.raises(OSError, match="Input/output error"):
        fill(out, overwrite=True)

    assert entries(out) == ["old"]
    assert entries(tmp_path) == ["out"]


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"), replacing_directory(tmp_path / "out", overwrite=False):
        old_directory(tmp_path)

    assert entries(tmp_path / "out") == ["old"]
    assert entries(tmp_path) == ["out"]


def test_a_link_keeps_leading_to_the_output(tmp_path: Path) -> None:
    """OUT may be a link to another disk: the work happens there, where a rename can work."""
    (tmp_path / "disk").mkdir()
    out = old_directory(tmp_path / "disk")
    (tmp_path / "link").symlink_to(out)

    fill(tmp_path / "link", overwrite=True)

    assert (tmp_path / "link").is_symlink()
    assert entries(out) == ["new"]


@pytest.mark.parametrize("place", ["out", "out/inner"])
def test_a_directory_that_holds_the_current_one_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = old_directory(tmp_path)
    (tmp_path / place).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / place)

    with pytest.raises(UsageError, match="the current or the home directory"):
        fill(out, overwrite=True)

    assert "old" in entries(out)


def test_the_home_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(old_directory(tmp_path)))

    with pytest.raises(UsageError, match="the current or the home directory"):
        fill(tmp_path / "out", overwrite=True)


def test_the_root_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the root of the file system"):
        fill(Path("/"), overwrite=True)


@pytest.mark.parametrize(
    ("source", "out"),
    [("a", "a"), ("a", "a/out"), ("a/source", "a"), ("a", "b/../a"), ("a", "link"), ("link/source", "a")],
)
def test_source_and_output_may_not_lie_in_each_other(tmp_path: Path, source: str, out: str) -> None:
    (tmp_path / "a/source").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")

    with pytest.raises(UsageError, match="Choose an output directory beside the source"):
        check_output_place(tmp_path / source, tmp_path / out)


@pytest.mark.parametrize("out", ["b", "a-out", "missing/out"])
def test_separate_source_and_output_are_accepted(tmp_path: Path, out: str) -> None:
    (tmp_path / "a").mkdir()

    check_output_place(tmp_path / "a", tmp_path / out)


def test_an_old_directory_that_resists_deletion_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_directory(tmp_path)
    rmtree = shutil.rmtree

    def resisting(path: Path, *, ignore_errors: bool = False) -> None:
        if not path.name.endswith(".replaced"):
            rmtree(path)
        elif not ignore_errors:
            raise PermissionError(path)

    monkeypatch.setattr(shutil, "rmtree", resisting)

    fill(out, overwrite=True)

    assert entries(out) == ["new"]

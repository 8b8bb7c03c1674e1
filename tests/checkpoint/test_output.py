from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trtllm_ct.base.errors import OutputError, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.checkpoint.manifest import MANIFEST
from trtllm_ct.checkpoint.output import check_output_place, replacing_directory


def old_directory(tmp_path: Path) -> Path:
    """An output of an earlier run that holds the file `old`."""
    fill(tmp_path / "out", name="old")
    return tmp_path / "out"


def entries(directory: Path) -> list[str]:
    """The names in a directory, without the list that every output has."""
    return sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)


def fill(out: Path, *, overwrite: bool = False, force: bool = False, name: str = "new") -> None:
    with replacing_directory(out, overwrite=overwrite, force=force) as partial:
        (partial.path / name).write_text(name)


def fail_after_writing(path: Path, error: type[BaseException]) -> None:
    path.write_text("new")
    raise error


def test_work_happens_in_a_directory_beside_the_output_and_is_renamed_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"

    with replacing_directory(out, overwrite=False) as partial:
        assert partial.path == tmp_path / ".out.partial"
        (partial.path / "new").write_text("new")
        assert not out.exists()

    assert entries(out) == ["new"]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_everything_as_it_was(tmp_path: Path, existing: bool) -> None:
    out = old_directory(tmp_path) if existing else tmp_path / "out"
    before = entries(tmp_path)

    with pytest.raises(ValueError), replacing_directory(out, overwrite=True) as partial:  # noqa: PT011 (as raised)
        fail_after_writing(partial.path / "new", ValueError)

    assert entries(tmp_path) == before
    assert not existing or entries(out) == ["old"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_keeps_the_work_for_the_next_run(tmp_path: Path, interrupt: type[BaseException]) -> None:
    out = old_directory(tmp_path)

    with pytest.raises(interrupt), replacing_directory(out, overwrite=True) as partial:
        fail_after_writing(partial.path / "new", interrupt)

    assert entries(out) == ["old"]
    with replacing_directory(out, overwrite=True) as partial:
        assert entries(partial.path) == ["new"]
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
        (partial.path / "new").write_text("new")
        assert entries(out) == ["old"]

    assert entries(out) == ["new"]
    assert entries(tmp_path) == ["out"]


def test_a_second_run_at_once_is_refused_and_the_first_continues(tmp_path: Path) -> None:
    with replacing_directory(tmp_path / "out", overwrite=False) as partial:
        (partial.path / "new").write_text("new")
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
        partial.clear(keep={"good"})
        (partial.path / "new").write_text("new")

    assert entries(tmp_path / "out") == ["good", "new"]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_working_directory_path_that_is_no_directory_is_refused(tmp_path: Path, kind: str) -> None:
    """Nobody knows whose it is: it is neither followed nor removed."""
    (tmp_path / "theirs").mkdir()
    if kind == "file":
        (tmp_path / ".out.partial").write_text("mine")
    else:
        (tmp_path / ".out.partial").symlink_to(tmp_path / "theirs")

    with pytest.raises(UsageError, match=f"a {kind} of that name"):
        fill(tmp_path / "out")

    assert entries(tmp_path) == [".out.partial", "theirs"]
    assert entries(tmp_path / "theirs") == []


def test_missing_parents_are_made(tmp_path: Path) -> None:
    fill(tmp_path / "a/b/out")

    assert entries(tmp_path / "a/b") == ["out"]


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")

    with pytest.raises(UsageError, match="not a directory"):
        fill(tmp_path / "a/out")


def refuse_to_exchange(_name: str, _other: str, _folder: int) -> bool:
    """As on a file system that can't exchange two names."""
    return False


def test_the_old_directory_comes_back_when_the_new_one_can_not_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = old_directory(tmp_path)
    rename = file_calls.rename

    def failing(name: str, new_name: str, folder: int) -> None:
        if name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(name, new_name, folder)

    monkeypatch.setattr(file_calls, "rename", failing)
    monkeypatch.setattr(file_calls, "exchange", refuse_to_exchange)

    with pytest.raises(OutputError, match="input/output error"):
        fill(out, overwrite=True)

    assert entries(out) == ["old"]
    assert entries(tmp_path) == [".out.partial", "out"]


def test_a_file_system_without_exchange_replaces_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_directory(tmp_path)
    monkeypatch.setattr(file_calls, "exchange", refuse_to_exchange)

    fill(out, overwrite=True)

    assert entries(out) == ["new"]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_after_a_stop_between_the_two_steps_puts_the_old_output_back(
    tmp_path: Path, overwrite: bool, caplog: pytest.LogCaptureFixture
) -> None:
    old_directory(tmp_path).rename(tmp_path / ".out.replaced-by-trtllm-ct")

    if overwrite:
        fill(tmp_path / "out", overwrite=True)
    else:
        with pytest.raises(UsageError, match="--overwrite"):
            fill(tmp_path / "out")

    assert entries(tmp_path / "out") == (["new"] if overwrite else ["old"])
    assert entries(tmp_path) == ["out"]
    assert "put back" in caplog.text


def test_leftovers_of_a_stop_after_the_two_steps_are_removed_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = old_directory(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    old_directory(tmp_path / "elsewhere").rename(tmp_path / ".out.replaced-by-trtllm-ct")
    (tmp_path / "elsewhere").rmdir()

    fill(out, overwrite=True)

    assert entries(tmp_path) == ["out"]
    assert ".out.replaced-by-trtllm-ct: removed" in caplog.text


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"), replacing_directory(tmp_path / "out", overwrite=False):
        (tmp_path / "out").mkdir()

    assert entries(tmp_path / "out") == []
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


def test_an_old_directory_that_resists_deletion_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = old_directory(tmp_path)
    unlink = file_calls.unlink

    def resisting(name: str, folder: int) -> None:
        if name == "old":
            raise PermissionError(13, "Permission denied")
        unlink(name, folder)

    monkeypatch.setattr(file_calls, "unlink", resisting)

    fill(out, overwrite=True)

    assert entries(out) == ["new"]
    assert ".out.partial: the old output could not be removed" in caplog.text


class TestWhatIsReplaced:
    """`--overwrite` deletes what conversions wrote and nothing else."""

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("years")

        for force in (False, True):
            with pytest.raises(UsageError, match="an output of trtllm-ct to replace"):
                fill(tmp_path / "out", overwrite=True, force=force)

        assert entries(tmp_path / "out") == ["thesis.tex"]
        assert entries(tmp_path) == ["out"]

    @pytest.mark.parametrize("place", ["thesis.tex", "notes/thesis.tex"])
    def test_a_file_that_was_added_to_an_output_is_named(self, tmp_path: Path, place: str) -> None:
        out = old_directory(tmp_path)
        (out / place).parent.mkdir(exist_ok=True)
        (out / place).write_text("years")

        with pytest.raises(UsageError, match=f"files that it did not write: '{place}'"):
            fill(out, overwrite=True)

        assert (out / place).read_text() == "years"

    def test_a_file_that_is_added_meanwhile_is_kept(self, tmp_path: Path) -> None:
        out = old_directory(tmp_path)

        with (
            pytest.raises(UsageError, match="files that it did not write"),
            replacing_directory(out, overwrite=True),
        ):
            (out / "thesis.tex").write_text("years")

        assert entries(out) == ["old", "thesis.tex"]

    @pytest.mark.parametrize("force", [False, True])
    def test_a_model_directory_is_replaced_with_force(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "out").mkdir()
        for name in ("config.json", "model.safetensors", "README.md"):
            (tmp_path / "out" / name).touch()

        if force:
            fill(tmp_path / "out", overwrite=True, force=True)
        else:
            with pytest.raises(UsageError, match="--overwrite --force replaces any model directory"):
                fill(tmp_path / "out", overwrite=True)

        assert entries(tmp_path / "out") == (["new"] if force else ["README.md", "config.json", "model.safetensors"])

    def test_an_empty_directory_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()

        fill(tmp_path / "out", overwrite=True)

        assert entries(tmp_path / "out") == ["new"]

    def test_a_folder_of_the_user_with_a_similar_name_is_kept(self, tmp_path: Path) -> None:
        out = old_directory(tmp_path)
        (tmp_path / ".out.replaced").mkdir()

        fill(out, overwrite=True)

        assert entries(tmp_path) == [".out.replaced", "out"]

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"written_by": "trtllm-ct"}', "[" * 100_000])
    def test_a_list_that_is_none_allows_nothing(self, tmp_path: Path, content: str) -> None:
        out = old_directory(tmp_path)
        (out / MANIFEST).write_text(content)

        with pytest.raises(UsageError, match="a directory that it did not write"):
            fill(out, overwrite=True)

        assert entries(out) == ["old"]


class TestModes:
    @pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
    def test_only_the_finished_directory_is_open_to_others(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            with replacing_directory(tmp_path / "out", overwrite=False) as partial:
                (partial.path / "new").touch()
                assert stat.S_IMODE(partial.path.stat().st_mode) == 0o700
        finally:
            os.umask(before)

        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from other_user import IS_ROOT, OTHER_USER

from trtllm_ct.base.errors import (
    CatalogError,
    DetectionError,
    HubError,
    OutputError,
    PayloadError,
    PlanError,
    UsageError,
)
from trtllm_ct.checkpoint import file_calls, mounts, output_place
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.manifest import MANIFEST
from trtllm_ct.checkpoint.output import check_output_place, replacing_directory, what_is_left
from trtllm_ct.checkpoint.work_folder import DOWNLOADS, JOURNAL, REPLACED_MARK, files_line
from trtllm_ct.convert.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable


def check_both(source: Path, out: Path) -> None:
    check_output_place(source, out)
    fill(out)


BEGUN = b'{"conversion": "0"}\n'
UNITS = BEGUN + b'{"unit": 0}\n'
"""Journals of a conversion without and with finished units."""


def old_directory(tmp_path: Path) -> Path:
    """An output of an earlier run that holds the file `old`."""
    fill(tmp_path / "out", name="old")
    return tmp_path / "out"


def entries(directory: Path) -> list[str]:
    """The names in a directory, without the list that every output has, and the journal of every work."""
    return sorted(path.name for path in directory.iterdir() if path.name not in {MANIFEST, JOURNAL})


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
    for name in (JOURNAL, "half", "good", "folder/file"):
        (tmp_path / ".out.partial" / name).write_text("" if name == JOURNAL else name)

    with replacing_directory(tmp_path / "out", overwrite=False) as partial:
        partial.remove_files({"half", "folder/file"})
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


def test_a_directory_that_appears_meanwhile_is_not_replaced_and_the_work_is_kept(tmp_path: Path) -> None:
    def run() -> None:
        with replacing_directory(tmp_path / "out", overwrite=False) as work:
            work.write("new", b"new")
            work.write(JOURNAL, BEGUN)
            (tmp_path / "out").mkdir()

    with pytest.raises(OutputError, match="--overwrite"):
        run()

    assert entries(tmp_path / "out") == []
    assert entries(tmp_path / ".out.partial") == ["new"]
    assert (tmp_path / ".out.partial" / JOURNAL).read_bytes() == BEGUN


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
            pytest.raises(OutputError, match="files that it did not write"),
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

    @pytest.mark.parametrize("change", ["another size", "same size", "large"])
    def test_a_file_that_was_changed_is_named(self, tmp_path: Path, change: str) -> None:
        old = b"old" if change != "large" else bytes(2**20 + 1)
        with replacing_directory(tmp_path / "out", overwrite=False) as work:
            work.write("README.md", old)
        (tmp_path / "out/README.md").write_bytes(old + b"!" if change == "another size" else b"m" + old[1:])
        if change == "large":
            os.utime(tmp_path / "out/README.md", (time.time() + 10,) * 2)

        with pytest.raises(UsageError, match=r"files that were changed since: 'README\.md'"):
            fill(tmp_path / "out", overwrite=True)
        fill(tmp_path / "out", overwrite=True, force=True)

        assert entries(tmp_path / "out") == ["new"]

    def test_a_copy_with_its_times_is_replaced(self, tmp_path: Path) -> None:
        with replacing_directory(tmp_path / "out", overwrite=False) as work:
            work.write("model", bytes(2**20 + 1))
        shutil.copytree(tmp_path / "out", tmp_path / "copy")

        fill(tmp_path / "copy", overwrite=True)

        assert entries(tmp_path / "copy") == ["new"]

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


class TestWhoseItIs:
    """A directory with the name of a working directory is touched only if a conversion has made it."""

    @pytest.mark.parametrize("name", [".out.partial", ".out.replaced-by-trtllm-ct"])
    @pytest.mark.parametrize("journal", [None, "my notes", '{"conversion": 1}'])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_the_user_is_refused_by_name(
        self, tmp_path: Path, name: str, journal: str | None, overwrite: bool
    ) -> None:
        if overwrite:
            old_directory(tmp_path)
        (tmp_path / name / "photos").mkdir(parents=True, mode=0o700)
        (tmp_path / name / "photos/a.jpg").write_text("years")
        if journal is not None:
            (tmp_path / name / JOURNAL).write_text(journal)

        with pytest.raises(UsageError, match=rf"{name}: .* no conversion has left there\. Move it away"):
            fill(tmp_path / "out", overwrite=overwrite)

        assert (tmp_path / name / "photos/a.jpg").read_text() == "years"
        assert entries(tmp_path) == sorted([name, *(["out"] if overwrite else [])])

    @pytest.mark.parametrize("name", [".out.partial", ".out.replaced-by-trtllm-ct"])
    def test_an_output_to_which_something_was_added_is_refused_too(self, tmp_path: Path, name: str) -> None:
        fill(tmp_path / "out")
        shutil.copytree(tmp_path / "out", tmp_path / name)
        (tmp_path / name / "thesis.tex").write_text("years")

        with pytest.raises(UsageError, match="no conversion has left there"):
            fill(tmp_path / "out", overwrite=True)

        assert (tmp_path / name / "thesis.tex").read_text() == "years"

    @pytest.mark.parametrize("journal", [b"", BEGUN[:5], BEGUN, UNITS, bytes(100)], ids=str)
    def test_the_journal_of_a_conversion_proves_it(self, tmp_path: Path, journal: bytes) -> None:
        """A kill may leave it empty or cut short, and a power cut full of zeros."""
        (tmp_path / ".out.partial").mkdir(mode=0o700)
        (tmp_path / ".out.partial" / JOURNAL).write_bytes(journal)
        (tmp_path / ".out.partial/half").touch()

        with replacing_directory(tmp_path / "out", overwrite=False) as work:
            assert entries(work.path) == ["half"]
            assert work.read(JOURNAL, 1000) == journal

    def test_a_journal_of_another_user_proves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / ".out.partial").mkdir(mode=0o777)
        (tmp_path / ".out.partial/thesis.tex").write_text("years")
        (tmp_path / ".out.partial").chmod(0o777)
        (tmp_path / ".out.partial" / JOURNAL).write_bytes(BEGUN)
        if not IS_ROOT:
            return  # Nobody else can own a file here.
        os.chown(tmp_path / ".out.partial" / JOURNAL, OTHER_USER, OTHER_USER)

        with pytest.raises(UsageError, match="no conversion has left there"):
            fill(tmp_path / "out")

        assert (tmp_path / ".out.partial/thesis.tex").read_text() == "years"

    @pytest.mark.parametrize("stopped_at", range(1, 8))
    @pytest.mark.parametrize("force", [False, True])
    def test_an_old_output_whose_removal_was_stopped_is_removed_by_the_next_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int, force: bool
    ) -> None:
        """It may be any model directory, of which nothing else says that it may go."""
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / name).write_text(name)
        if not force:
            shutil.rmtree(tmp_path / "out")
            old_directory(tmp_path)
        calls = [0]

        def stopping(name: str) -> Callable[..., Any]:
            done = getattr(file_calls, name)

            def call(*arguments: Any) -> Any:
                if entries(tmp_path / "out") == ["new"] and (tmp_path / ".out.partial").exists():
                    calls[0] += name in {"unlink", "remove_directory"}
                    if calls[0] == stopped_at:
                        raise KeyboardInterrupt
                return done(*arguments)

            return call

        for name in ("unlink", "remove_directory"):
            monkeypatch.setattr(file_calls, name, stopping(name))
        with suppress(KeyboardInterrupt):
            fill(tmp_path / "out", overwrite=True, force=force)
        monkeypatch.undo()

        fill(tmp_path / "out", overwrite=True, name="newest")

        assert entries(tmp_path / "out") == ["newest"]
        assert entries(tmp_path) == ["out"]

    def test_without_overwrite_what_is_left_is_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        old_directory(tmp_path).rename(tmp_path / ".out.partial")
        fill_elsewhere = tmp_path / "elsewhere"
        fill(fill_elsewhere)
        fill_elsewhere.rename(tmp_path / "out")

        with pytest.raises(UsageError, match="--overwrite"):
            fill(tmp_path / "out")

        assert ".out.partial: left of an earlier run" in caplog.text


LISTS = BEGUN + b'{"files": ["model", "folder/model", "later"]}\n'
"""The journal of a conversion that was going to write three files."""


class TestFilesOfTheUser:
    """A file that no conversion wrote is not removed, wherever it is and whatever ends the run."""

    @staticmethod
    def work(tmp_path: Path, journal: bytes = LISTS, mode: int = 0o700) -> Path:
        partial = tmp_path / ".out.partial"
        (partial / "folder").mkdir(parents=True)
        partial.chmod(mode)
        (partial / JOURNAL).write_bytes(journal)
        for name in ("model", "folder/model", "thesis", "folder/thesis"):
            (partial / name).write_text(name)
        return partial

    @pytest.mark.parametrize("mode", [0o700, 0o777])
    @pytest.mark.parametrize(
        "journal", [LISTS, LISTS[len(BEGUN) :], REPLACED_MARK + LISTS[len(BEGUN) :], b"", bytes(9)]
    )
    @pytest.mark.parametrize("error", [None, PayloadError, CatalogError, UsageError, ValueError, OSError])
    def test_it_stays_whatever_the_journal_says(
        self, tmp_path: Path, mode: int, journal: bytes, error: type[Exception] | None
    ) -> None:
        self.work(tmp_path, journal, mode)

        def run() -> None:
            with replacing_directory(tmp_path / "out", overwrite=False):
                if error is not None:
                    raise error
                Journal(Folder(tmp_path / ".out.partial"), "0", ["model", "folder/model"]).close()

        with pytest.raises((error or UsageError, UsageError)):
            run()

        for name in ("thesis", "folder/thesis"):
            assert (tmp_path / ".out.partial" / name).read_text() == name

    @pytest.mark.parametrize("journal", [LISTS, b""], ids=["by the journal", "by this run"])
    def test_a_conversion_names_it_and_changes_nothing(self, tmp_path: Path, journal: bytes) -> None:
        partial = self.work(tmp_path, journal)
        before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}

        with pytest.raises(UsageError, match="no conversion wrote: 'folder/thesis', 'thesis'") as raised:
            Journal(Folder(partial), "1", ["model", "folder/model"])

        assert "Move these files away" in raised.value.faults[0].remedy
        assert before == {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}

    def test_once_it_is_moved_away_the_conversion_goes_on(self, tmp_path: Path) -> None:
        partial = self.work(tmp_path)
        for name in ("thesis", "folder/thesis"):
            (partial / name).unlink()

        Journal(Folder(partial), "1", ["model"]).close()

        assert sorted(path.name for path in partial.iterdir()) == [JOURNAL]

    def test_one_that_comes_during_the_run_is_in_the_output_and_keeps_it(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with replacing_directory(tmp_path / "out", overwrite=False) as work:
            work.write(JOURNAL, LISTS)
            for name in ("model", "thesis"):
                work.write(name, name.encode())

        assert "it also has files that no conversion wrote: 'thesis'" in caplog.text
        with pytest.raises(UsageError, match="files that it did not write: 'thesis'"):
            fill(tmp_path / "out", overwrite=True)

    def test_one_that_comes_during_a_run_that_fails_stays_and_is_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def run() -> None:
            with replacing_directory(tmp_path / "out", overwrite=False) as work:
                work.write(JOURNAL, LISTS)
                for name in ("model", "thesis"):
                    work.write(name, name.encode())
                raise PayloadError

        with pytest.raises(PayloadError):
            run()

        assert entries(tmp_path / ".out.partial") == ["thesis"]
        assert "not removed: files of somebody else are in it: 'thesis'" in caplog.text

    def test_one_that_comes_while_an_old_output_is_removed_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old_directory(tmp_path)
        remove = Folder.remove_files

        def slow(folder: Folder, *arguments: Any) -> None:
            if folder.path == tmp_path / "out":
                (tmp_path / ".out.partial/thesis").write_text("thesis")
            remove(folder, *arguments)

        monkeypatch.setattr(Folder, "remove_files", slow)

        fill(tmp_path / "out", overwrite=True)

        assert entries(tmp_path / ".out.partial") == ["thesis"]
        with pytest.raises(UsageError, match="no conversion wrote: 'thesis'"):
            fill(tmp_path / "out", overwrite=True)


class TestAnotherReplaced:
    """What is under the name that an old output may get is noticed before any work."""

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("kind", ["file", "link", "fifo", "folder", "of another user"])
    def test_it_is_refused_by_name_and_left_alone(self, tmp_path: Path, kind: str, overwrite: bool) -> None:
        place = tmp_path / ".out.replaced-by-trtllm-ct"
        if overwrite:
            old_directory(tmp_path)
        if kind == "file":
            place.write_text("mine")
        elif kind == "link":
            place.symlink_to(tmp_path)
        elif kind == "fifo":
            os.mkfifo(place)
        else:
            place.mkdir()
            (place / "thesis").write_text("mine")
        if kind == "of another user" and IS_ROOT:
            os.chown(place, 4711, 4711)
        before = sorted(path.name for path in tmp_path.iterdir())

        with pytest.raises(UsageError) as raised, replacing_directory(tmp_path / "out", overwrite=overwrite):
            pytest.fail("work has begun")

        assert raised.value.faults[0].where == str(place)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


class TestWhatIsKept:
    """Finished units are deleted only for a fault that a rerun would meet again."""

    @staticmethod
    def run_with(tmp_path: Path, error: Exception, *, earlier: bytes, journal: bytes) -> list[str]:
        if earlier:
            (tmp_path / ".out.partial").mkdir(mode=0o700)
            (tmp_path / ".out.partial" / JOURNAL).write_bytes(earlier)

        def run() -> None:
            with replacing_directory(tmp_path / "out", overwrite=False) as work:
                if journal != earlier:
                    work.write(JOURNAL, journal)
                raise error

        with pytest.raises(type(error)):
            run()
        return sorted(path.name for path in tmp_path.iterdir())

    @pytest.mark.parametrize("error", [DetectionError, CatalogError, PlanError, UsageError, PayloadError, ValueError])
    def test_an_error_before_the_work_has_begun_leaves_earlier_work_alone(
        self, tmp_path: Path, error: type[Exception]
    ) -> None:
        """A source that is not mounted, a wrong option, a full disk."""
        assert self.run_with(tmp_path, error(), earlier=UNITS, journal=UNITS) == [".out.partial"]
        assert (tmp_path / ".out.partial" / JOURNAL).read_bytes() == UNITS

    def test_an_error_of_the_callers_files_is_not_taken_for_one_of_the_output(self, tmp_path: Path) -> None:
        with (
            pytest.raises(PermissionError, match="source"),
            replacing_directory(tmp_path / "out", overwrite=False),
        ):
            raise PermissionError(errno.EACCES, "Permission denied", "source")

    @pytest.mark.parametrize("error", [HubError, OSError, OutputError, UsageError, ValueError])
    def test_an_error_that_is_no_fault_of_the_checkpoint_keeps_the_work_of_this_run(
        self, tmp_path: Path, error: type[Exception]
    ) -> None:
        assert self.run_with(tmp_path, error(), earlier=b"", journal=UNITS) == [".out.partial"]

    @pytest.mark.parametrize("error", [DetectionError, CatalogError, PlanError, PayloadError])
    @pytest.mark.parametrize("journal", [BEGUN, UNITS])
    def test_a_fault_of_the_checkpoint_leaves_nothing_of_this_run(
        self, tmp_path: Path, error: type[Exception], journal: bytes
    ) -> None:
        assert self.run_with(tmp_path, error(), earlier=b"", journal=journal) == []

    def test_faulty_values_end_earlier_work_that_was_gone_on_with(self, tmp_path: Path) -> None:
        assert self.run_with(tmp_path, PayloadError(), earlier=BEGUN, journal=UNITS) == []

    @pytest.mark.parametrize(("name", "kept"), [("model.safetensors", True), ("tokenizer.json", False)])
    def test_weights_that_were_downloaded_are_work(self, tmp_path: Path, name: str, *, kept: bool) -> None:
        def run() -> None:
            with replacing_directory(tmp_path / "out", overwrite=False) as work:
                work.write(JOURNAL, BEGUN + files_line([f"{DOWNLOADS}/{name}"]))
                work.copy(f"{DOWNLOADS}/{name}", [b"x"])
                raise HubError

        with pytest.raises(HubError):
            run()

        assert (tmp_path / ".out.partial").exists() == kept

    @pytest.mark.parametrize("error", [UsageError, PlanError, ValueError, HubError])
    def test_without_work_nothing_is_kept(self, tmp_path: Path, error: type[Exception]) -> None:
        assert self.run_with(tmp_path, error(), earlier=b"", journal=b"") == []

    @pytest.mark.parametrize("call", ["exchange", "rename", "sync"])
    def test_a_failure_of_the_last_step_keeps_the_journal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        if call == "exchange":
            old_directory(tmp_path)

        def failing(*_: Any) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy")

        def run() -> None:
            with replacing_directory(tmp_path / "out", overwrite=True) as work:
                work.write(JOURNAL, UNITS)
                monkeypatch.setattr(file_calls, call, failing)

        with pytest.raises(OutputError, match="busy"):
            run()

        assert (tmp_path / ".out.partial" / JOURNAL).read_bytes() == UNITS


class TestPlaces:
    """What can't work at the end is said at the beginning."""

    def test_a_mount_point_is_refused_before_any_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out dir").mkdir()
        table = tmp_path / "mountinfo"
        escaped = str(tmp_path / "out dir").replace(" ", "\\040")
        table.write_text(f"1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / {escaped} rw shared:1 - tmpfs b rw\n")
        monkeypatch.setattr(mounts, "_TABLE", table)

        for overwrite in (False, True):
            with pytest.raises(UsageError, match=r"a mount point, which can't be replaced\. Choose a new dir"):
                fill(tmp_path / "out dir", overwrite=overwrite)

        assert entries(tmp_path) == ["mountinfo", "out dir"]

    def test_a_folder_in_which_nothing_can_be_renamed_is_refused_before_any_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Although an earlier run has left its work there."""
        (tmp_path / ".out.partial").mkdir(mode=0o700)
        (tmp_path / ".out.partial" / JOURNAL).write_bytes(UNITS)
        monkeypatch.setattr(file_calls, "is_writable", lambda _folder: False)

        with pytest.raises(UsageError, match="permission denied"):
            fill(tmp_path / "out")

        assert (tmp_path / ".out.partial" / JOURNAL).read_bytes() == UNITS

    @pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOTEMPTY])
    def test_a_lower_layer_of_an_overlay_is_refused_before_any_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        out = old_directory(tmp_path)
        monkeypatch.setattr(output_place, "is_overlay", lambda _device: True)

        def rename(*_: Any, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "rename", rename)

        if code == errno.EXDEV:
            with pytest.raises(UsageError, match="a lower layer of an overlay"):
                fill(out, overwrite=True)
        else:
            fill(out, overwrite=True)

        assert entries(out) == (["old"] if code == errno.EXDEV else ["new"])
        assert entries(tmp_path) == ["out"]

    def test_the_question_whether_a_directory_can_be_moved_moves_nothing(self, tmp_path: Path) -> None:
        out = old_directory(tmp_path)
        (tmp_path / "full").mkdir()
        (tmp_path / "full/file").touch()

        with Folder(tmp_path) as parent:
            assert file_calls.is_movable("out", "full", parent.descriptor)

        assert entries(out) == ["old"]
        assert entries(tmp_path / "full") == ["file"]

    def test_exchange_between_layers_falls_back_to_two_steps(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = old_directory(tmp_path)
        rename = file_calls._renameat2

        def without_exchange(name: str, new_name: str, folder: int, flags: int) -> None:
            if flags == file_calls._RENAME_EXCHANGE:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            rename(name, new_name, folder, flags)

        monkeypatch.setattr(file_calls, "_renameat2", without_exchange)

        fill(out, overwrite=True)

        assert entries(out) == ["new"]
        assert entries(tmp_path) == ["out"]

    def test_the_names_of_folders_that_were_made_are_synced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced = []
        monkeypatch.setattr(
            file_calls, "sync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink())
        )

        fill(tmp_path / "a/b/out")

        assert {tmp_path, tmp_path / "a", tmp_path / "a/b"} <= set(synced)

    @pytest.mark.parametrize("out", ["n" * 250, "n" * 300, "nul\0", "loop", "loop/out", "n" * 5000])
    def test_a_name_that_can_not_be_used_is_an_error_of_usage(self, tmp_path: Path, out: str) -> None:
        (tmp_path / "loop").symlink_to("loop")

        with pytest.raises(UsageError, match=r"too long|null|levels of symbolic links"):
            fill(tmp_path / out)
        with pytest.raises(UsageError, match=r"too long|null|levels of symbolic links"):
            check_both(tmp_path / "source", tmp_path / out)

        assert entries(tmp_path) == ["loop"]

    def test_a_current_directory_that_is_gone_is_an_error_of_usage(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        try:
            with pytest.raises(UsageError, match="no such file or directory"):
                fill(Path("out"))
            fill(tmp_path / "out")
            fill(tmp_path / "out", overwrite=True, name="newer")
        finally:
            os.chdir(tmp_path)

        assert entries(tmp_path / "out") == ["newer"]

    def test_without_a_home_directory_an_output_can_be_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = old_directory(tmp_path)

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)

        fill(out, overwrite=True)

        assert entries(out) == ["new"]

    @pytest.mark.parametrize("depth", [40, 1200])
    @pytest.mark.parametrize("name", ["out", ".out.partial"])
    def test_folders_too_deep_are_an_error(self, tmp_path: Path, depth: int, name: str) -> None:
        (tmp_path / name).mkdir(mode=0o700)
        (tmp_path / name / "config.json").touch()
        (tmp_path / name / "model.safetensors").touch()
        if name != "out":
            (tmp_path / name / JOURNAL).write_bytes(BEGUN)
        before = Path.cwd()
        os.chdir(tmp_path / name)
        for _ in range(depth):
            os.mkdir("d")  # noqa: PTH102 (a path of this depth is too long)
            os.chdir("d")
        os.chdir(before)

        def run() -> None:
            with replacing_directory(tmp_path / "out", overwrite=True, force=True) as work:
                work.remove_files(set(work.files()) - {JOURNAL})

        with pytest.raises((UsageError, OutputError, OSError), match="more than 32 folders in each other") as raised:
            run()

        assert name == ".out.partial" or raised.type is UsageError
        assert not (tmp_path / ("out" if name != "out" else ".out.partial")).exists()
        subprocess.run(["rm", "-rf", tmp_path / name], check=True)


class TestLinksOfOthers:
    @pytest.mark.parametrize("place", ["link", "folder/link/out"])
    def test_a_link_of_another_user_is_not_followed(self, tmp_path: Path, place: str) -> None:
        if not IS_ROOT:
            return  # Nobody else can make a link here.
        (tmp_path / "folder").mkdir()
        (tmp_path / "victim").mkdir()
        link = tmp_path / place.removesuffix("/out")
        link.symlink_to(tmp_path / "victim" / ("" if place.endswith("out") else "out"))
        os.chown(link, OTHER_USER, OTHER_USER, follow_symlinks=False)

        with pytest.raises(UsageError, match=f"link: .* found a link of another user, with the number {OTHER_USER}"):
            fill(tmp_path / place)
        with pytest.raises(UsageError, match="a link of another user"):
            check_output_place(tmp_path / "source", tmp_path / place)

        assert entries(tmp_path / "victim") == []

    def test_a_folder_that_becomes_a_link_meanwhile_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "folder").symlink_to(tmp_path)

        with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
            file_calls.open_way(str(tmp_path / "folder"))


class TestWhatIsLeft:
    """What the line after Ctrl-C says."""

    def test_before_anything_is_written(self, tmp_path: Path) -> None:
        assert what_is_left(tmp_path / "out")() == "Nothing was written."

    def test_while_the_work_goes_on(self, tmp_path: Path) -> None:
        old_directory(tmp_path)
        says = what_is_left(tmp_path / "out")
        with replacing_directory(tmp_path / "out", overwrite=True):
            assert says() == "The same command goes on from here."

    def test_when_the_output_has_its_name(self, tmp_path: Path) -> None:
        says = what_is_left(tmp_path / "out")
        fill(tmp_path / "out")
        assert says() == "The output is complete."

    def test_when_the_old_one_is_still_there(self, tmp_path: Path) -> None:
        says = what_is_left(tmp_path / "out")
        fill(tmp_path / "out")
        (tmp_path / ".out.partial").mkdir()
        assert says().startswith(f"The output is complete. {tmp_path}/.out.partial is the old one;")

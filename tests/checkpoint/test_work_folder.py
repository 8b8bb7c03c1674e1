"""The working directory has a name that can be guessed: nothing that others put there is entered, kept or removed."""

from __future__ import annotations

import os
import pickle
import stat
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trtllm_ct.base.errors import OutputError, TrtllmCtError, UsageError
from trtllm_ct.checkpoint import work_folder
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.output import replacing_directory
from trtllm_ct.checkpoint.work_folder import CONVERSION_MARK, JOURNAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VICTIM, ATTACKER = 61_001, 61_002


@pytest.fixture(params=[0o1777, 0o777], ids=["sticky", "writable"])
def open_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder in which everybody may write, below folders that everybody may enter."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(request.param)
        yield folder
        folder.chmod(0o700)


def as_user(user: int, act: Callable[[], object]) -> str:
    """Run `act` as a user in a child process; return the message of its error, empty if there is none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            try:
                act()
            except TrtllmCtError as error:
                os.write(writing, f"{type(error).__name__}: {error}".encode())
        except BaseException:  # noqa: BLE001 (the child ends with any)
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        message = stream.read()
    os.waitpid(child, 0)
    return message


def belongs_to_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a directory be another user's: by its owner where this is root, else by who this process takes itself for."""
    if os.geteuid() == 0:
        os.chown(path, ATTACKER, ATTACKER)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: VICTIM)
        monkeypatch.setattr(work_folder, "_as_made", lambda _parent: (VICTIM, 0o700))


def convert(out: Path, content: str = "mine", *, overwrite: bool = False) -> None:
    with replacing_directory(out, overwrite=overwrite) as work:
        work.write("model", content.encode())


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_a_directory_of_another_user_is_refused_by_name_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir(mode)
    (tmp_path / "valuable").write_text("valuable")
    (partial / JOURNAL).symlink_to(tmp_path / "valuable")
    belongs_to_another(partial, monkeypatch)

    with pytest.raises(UsageError, match=r"\.out\.partial: .* a directory of another user"):
        convert(tmp_path / "out")

    assert (tmp_path / "valuable").read_text() == "valuable"
    assert (partial / JOURNAL).is_symlink()
    assert not (tmp_path / "out").exists()


def test_two_users_of_one_folder(open_folder: Path) -> None:
    """One prepares a working directory whose journal leads to a file of the other."""
    if os.geteuid() != 0:
        return  # Nobody else may be played; the other tests do it by modes.
    valuable, partial = open_folder / "valuable", open_folder / ".out.partial"
    as_user(VICTIM, lambda: valuable.write_text("valuable"))

    def prepare() -> None:
        partial.mkdir()
        partial.chmod(0o777)
        (partial / JOURNAL).symlink_to(valuable)

    assert as_user(ATTACKER, prepare) == ""

    message = as_user(VICTIM, lambda: convert(open_folder / "out"))

    assert message.startswith(f"UsageError: {partial}: expected a place for a new directory, found a directory of anot")
    assert valuable.read_text() == "valuable"
    assert (partial / JOURNAL).is_symlink()
    assert sorted(path.name for path in open_folder.iterdir()) == [".out.partial", "valuable"]


def test_an_output_belongs_to_who_made_it_and_nobody_else_could_write_to_it(open_folder: Path) -> None:
    if os.geteuid() != 0:
        return

    def run() -> None:
        with replacing_directory(open_folder / "out", overwrite=False) as work:
            work.write("model", b"mine")
            assert stat.S_IMODE(work.path.stat().st_mode) == 0o700

    assert as_user(VICTIM, run) == ""
    assert (open_folder / "out").stat().st_uid == VICTIM
    assert "Permission denied" in as_user(ATTACKER, lambda: (open_folder / "out/config.json").write_text("theirs"))


def test_an_output_of_another_user_is_not_replaced(open_folder: Path) -> None:
    if os.geteuid() != 0:
        return
    assert as_user(ATTACKER, lambda: convert(open_folder / "out", "theirs")) == ""

    message = as_user(VICTIM, lambda: convert(open_folder / "out", overwrite=True))

    assert "a directory of another user" in message
    assert (open_folder / "out/model").read_text() == "theirs"


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_what_others_could_have_put_there_is_not_kept(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "folder").mkdir(parents=True)
    partial.chmod(mode)
    (tmp_path / "valuable").write_text("valuable")
    (partial / JOURNAL).write_bytes(CONVERSION_MARK + b'0"}\n{"files": ["folder/model", "link"]}\n')
    (partial / "link").symlink_to(tmp_path / "valuable")
    (partial / "folder/model").write_text("theirs")

    with replacing_directory(tmp_path / "out", overwrite=False) as work:
        assert work.names() == [JOURNAL]
        assert stat.S_IMODE(work.path.stat().st_mode) == 0o700
        work.write(JOURNAL, b"mine")

    assert (tmp_path / "valuable").read_text() == "valuable"
    assert "others could write to it; starting anew" in caplog.text


def test_a_link_in_place_of_the_journal_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "valuable").write_text("")
    (tmp_path / ".out.partial").mkdir(0o700)
    (tmp_path / ".out.partial" / JOURNAL).symlink_to(tmp_path / "valuable")

    with pytest.raises(UsageError, match="a directory that no conversion has left there"):
        convert(tmp_path / "out")

    assert (tmp_path / ".out.partial" / JOURNAL).is_symlink()


def test_links_in_a_working_directory_are_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "valuable").write_text("valuable")
    (tmp_path / ".out.partial").mkdir(0o700)
    (tmp_path / ".out.partial" / JOURNAL).touch()
    (tmp_path / ".out.partial/model").symlink_to(tmp_path / "valuable")

    convert(tmp_path / "out")

    assert (tmp_path / "valuable").read_text() == "valuable"
    assert not (tmp_path / "out/model").is_symlink()


def test_a_directory_that_is_exchanged_meanwhile_does_not_become_the_output(tmp_path: Path) -> None:
    """In a folder of a group, others can rename what is in it."""

    def run() -> None:
        with replacing_directory(tmp_path / "out", overwrite=False) as work:
            work.path.rename(tmp_path / "away")
            work.path.mkdir()
            (work.path / "model").write_text("theirs")
            work.write("model", b"mine")

    with pytest.raises(OutputError, match="another directory than the one of this run"):
        run()

    assert not (tmp_path / "out").exists()
    assert (tmp_path / "away/model").read_text() == "mine"
    assert (tmp_path / ".out.partial/model").read_text() == "theirs"


@pytest.mark.parametrize("private", [False, True])
def test_another_process_opens_only_a_directory_that_is_private(tmp_path: Path, private: bool) -> None:
    """As the ranks of an MPI job do."""
    with replacing_directory(tmp_path / "out", overwrite=False) as work:
        work.write("model", b"mine")
        pickled = pickle.dumps(work)
        if private:
            with pickle.loads(pickled) as reopened:
                assert reopened.read("model", 10) == b"mine"
        else:
            work.path.chmod(0o777)
            with pytest.raises(UsageError, match="a directory in which others can write"):
                pickle.loads(pickled)


def test_a_link_in_place_of_the_directory_is_not_followed_by_another_process(tmp_path: Path) -> None:
    with replacing_directory(tmp_path / "out", overwrite=False) as work:
        work.write("model", b"mine")
        pickled = pickle.dumps(work)
        work.path.rename(tmp_path / "away")
        work.path.symlink_to(tmp_path / "away")
        with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
            pickle.loads(pickled)
        work.path.unlink()
        (tmp_path / "away").rename(work.path)


def test_a_file_system_that_shows_another_owner_for_everything_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that turns root into nobody, or has neither owners nor modes."""
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    monkeypatch.setattr(work_folder, "_as_made", lambda _parent: (real, 0o40777))

    convert(tmp_path / "out")

    assert (tmp_path / "out/model").read_text() == "mine"


def test_a_probe_of_the_owner_is_made_in_the_open_folder_and_removed(tmp_path: Path) -> None:
    """Not by a path, on which another user may put a link meanwhile."""
    (tmp_path / "folder").mkdir()
    with Folder(tmp_path / "folder") as folder:
        (tmp_path / "folder").rename(tmp_path / "away")
        (tmp_path / "folder").symlink_to(tmp_path)

        owner, mode = work_folder._as_made(folder)

    assert (owner, stat.S_IMODE(mode)) == (os.geteuid(), 0o700)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "folder"]
    assert not list((tmp_path / "away").iterdir())

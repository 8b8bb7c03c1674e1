"""Files of machine code are executed: they are read and written only where no other user can put anything."""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from other_user import OTHER_USER, as_other_user

from trtllm_ct.layouts.loops import code_cache
from trtllm_ct.layouts.loops.code_cache import read_cached, stamp_of, write_cached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAMP, CODE, NAME = bytes(32), b"machine code", "kernels.loop.0.o"
CONTENT = STAMP + hashlib.sha256(CODE).digest() + CODE


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(code_cache, "_keeps_files", True)
    monkeypatch.setattr(code_cache, "_said", [])
    return tmp_path / "home"


def plant(home: Path, *, mode: int = 0o700) -> Path:
    """Put a file into the cache that is complete and up to date."""
    folder = home / "trtllm_ct"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(CONTENT)
    (folder / NAME).chmod(0o600)
    folder.chmod(mode)
    return folder / NAME


def test_what_is_written_is_read(home: Path) -> None:
    assert read_cached(NAME, STAMP) is None

    write_cached(NAME, STAMP, CODE)

    assert read_cached(NAME, STAMP) == CODE
    assert [path.name for path in (home / "trtllm_ct").iterdir()] == [NAME]
    assert (home / "trtllm_ct").stat().st_mode & 0o777 == 0o700
    assert (home / "trtllm_ct" / NAME).stat().st_mode & 0o777 == 0o600


def test_a_new_folder_is_private_whatever_the_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        write_cached(NAME, STAMP, CODE)
    finally:
        os.umask(before)

    assert (home.stat().st_mode | (home / "trtllm_ct").stat().st_mode) & 0o022 == 0
    assert read_cached(NAME, STAMP) == CODE


def test_an_older_folder_becomes_private(home: Path) -> None:
    plant(home, mode=0o755)

    write_cached(NAME, STAMP, CODE)

    assert (home / "trtllm_ct").stat().st_mode & 0o777 == 0o700


UNSAFE: dict[str, Callable[[Path], object]] = {
    "folder that all can write": lambda file: file.parent.chmod(0o777),
    "folder that the group can write": lambda file: file.parent.chmod(0o770),
    "folder with the sticky bit": lambda file: file.parent.chmod(0o1777),
    "home that all can write": lambda file: file.parents[1].chmod(0o777),
    "file that all can write": lambda file: file.chmod(0o666),
    "file that the group can write": lambda file: file.chmod(0o660),
    "link": lambda file: (file.rename(file.with_name("x")), file.symlink_to("x")),
    "named pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "directory": lambda file: (file.unlink(), file.mkdir()),
    "huge file": lambda file: os.truncate(file, 10**11),
}


@pytest.mark.parametrize("make_unsafe", UNSAFE.values(), ids=UNSAFE)
def test_what_others_may_have_written_is_not_read_and_that_is_said_once(
    home: Path, make_unsafe: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    make_unsafe(plant(home))

    assert read_cached(NAME, STAMP) is None
    assert read_cached(NAME, STAMP) is None

    (said,) = caplog.records
    assert "Set XDG_CACHE_HOME" in said.getMessage()


@pytest.mark.parametrize("name", ["folder that all can write", "folder with the sticky bit", "home that all can write"])
def test_nothing_is_written_where_others_can_write(home: Path, name: str) -> None:
    file = plant(home)
    UNSAFE[name](file)

    write_cached("other.o", STAMP, CODE)

    assert [path.name for path in file.parent.iterdir()] == [NAME]


def test_a_sticky_folder_on_the_way_is_safe_for_what_this_user_owns_there(home: Path) -> None:
    """As /tmp is: nobody can rename or delete the files of others there."""
    home.mkdir()
    home.chmod(0o1777)

    write_cached(NAME, STAMP, CODE)

    assert read_cached(NAME, STAMP) == CODE


@pytest.mark.two_users
class TestTwoUsers:
    """One user prepares a folder, another one runs loops."""

    @pytest.fixture
    def shared_home(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A cache folder for all users, as on a shared disk, and as /tmp is in a container."""
        with TemporaryDirectory() as name:
            Path(name).chmod(0o755)
            home = Path(name) / "home"
            home.mkdir()
            home.chmod(0o1777)
            monkeypatch.setenv("XDG_CACHE_HOME", str(home))
            yield home

    def test_what_another_user_put_there_is_not_read(self, shared_home: Path) -> None:
        as_other_user(lambda: plant(shared_home))

        assert read_cached(NAME, STAMP) is None
        write_cached(NAME, STAMP, b"more")
        assert (shared_home / "trtllm_ct" / NAME).read_bytes() == CONTENT

    def test_not_even_if_its_folder_is_safe(self, shared_home: Path) -> None:
        write_cached(NAME, STAMP, CODE)
        os.chown(shared_home / "trtllm_ct" / NAME, OTHER_USER, OTHER_USER)

        assert read_cached(NAME, STAMP) is None

    def test_users_without_privileges_are_safe_from_each_other(self, shared_home: Path) -> None:
        def try_to_use() -> None:
            assert read_cached(NAME, STAMP) is None

        as_other_user(lambda: plant(shared_home, mode=0o755))
        as_other_user(try_to_use, user=OTHER_USER - 1)

    def test_a_link_of_another_user_leads_nowhere_that_is_trusted(self, shared_home: Path, tmp_path: Path) -> None:
        """What it leads to is examined."""

        def prepare() -> None:
            file = plant(shared_home / "of-another-user")
            (shared_home / "trtllm_ct").symlink_to(file.parent)

        as_other_user(prepare)

        assert read_cached(NAME, STAMP) is None


def test_nothing_is_written_with_pythondontwritebytecode(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "_keeps_files", False)

    write_cached(NAME, STAMP, CODE)

    assert not home.exists()


@pytest.mark.parametrize("place", ["package", "site-packages"])
def test_nothing_is_written_among_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folders = {"package": Path(code_cache.__file__).parent, "site-packages": tmp_path / "site-packages"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders[place]))

    write_cached(NAME, STAMP, CODE)

    assert not (folders[place] / "trtllm_ct").exists()


@pytest.mark.parametrize("home_variable", ["", "relative"])
def test_without_a_home_there_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home_variable: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", home_variable)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)

    write_cached(NAME, STAMP, CODE)

    assert list(tmp_path.iterdir()) == []


def test_another_release_of_numba_has_another_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = find_spec("numba")
    assert installed is not None
    assert installed.origin is not None
    version = Path(installed.origin).with_name("_version.py").read_text(encoding="utf-8")
    release = metadata.version("numba")
    assert release in version
    before = stamp_of(__file__)

    other = tmp_path / "__init__.py"
    other.with_name("_version.py").write_text(version.replace(release, f"{release}.1"), encoding="utf-8")
    monkeypatch.setattr(code_cache, "find_spec", lambda name: spec_from_file_location(name, other))

    assert stamp_of(__file__) != before

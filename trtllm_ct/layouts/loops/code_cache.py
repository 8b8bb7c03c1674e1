"""The files with the machine code of loops: read and written only where no other user can put anything.

What such a file holds is executed, so its content proves nothing: whoever can write it can write its checksum too.
Files are used only in a folder of this user, on a way that no other user can write to, and only if this user owns them.
There is one folder, `trtllm_ct` in the user's cache folder; nothing is written beside the source code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import llvmlite

from trtllm_ct.base.own_folders import open_own_folder, require_own
from trtllm_ct.base.regular_files import read_descriptor

__all__ = ["read_cached", "stamp_of", "write_cached"]

logger = logging.getLogger("trtllm_ct")

_MAX_BYTES = 16 * 10**6
_HASHES = 64
"""A file starts with the stamp and the SHA-256 hash of the object code."""


def stamp_of(*sources: str) -> bytes:
    """Return a hash of 32 bytes that changes with the source files and the versions of Python, numba and llvmlite."""
    stamp = hashlib.sha256(f"{sys.version} {llvmlite.__version__}".encode())
    for source in (*map(Path, sources), *_numba_version()):
        stamp.update(source.read_bytes())
    return stamp.digest()


def _numba_version() -> tuple[Path, ...]:
    """Return the file that states numba's version, none if numba is not installed.

    Importing numba takes ten times as long as loading the loops, and `importlib.metadata` as long as loading them.
    """
    numba = find_spec("numba")
    return (Path(numba.origin).with_name("_version.py"),) if numba is not None and numba.origin else ()


def read_cached(name: str, stamp: bytes) -> bytes | None:
    """Return the object code in a file of the cache.

    None if the file is missing, incomplete or out of date, or if another user may have written it.
    """
    folder = cache_folder()
    if folder is None:
        return None
    try:
        with open_own_folder(folder, create=False) as folder_descriptor:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=folder_descriptor)
            try:
                content = _read_own(descriptor, folder / name)
            finally:
                os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        _say_once(folder, f"{error.filename or folder}: {error.strerror or error}")
        return None
    code = content[_HASHES:]
    return code if content[:_HASHES] == stamp + hashlib.sha256(code).digest() else None


def write_cached(name: str, stamp: bytes, code: bytes) -> None:
    """Write the object code to a file of the cache, atomically.

    Nothing is written with PYTHONDONTWRITEBYTECODE, nor where other users can write; that is said once.
    """
    folder = cache_folder()
    if folder is None or not _keeps_files:
        return
    try:
        with open_own_folder(folder, create=True, private=True) as folder_descriptor:
            _replace(folder_descriptor, name, stamp + hashlib.sha256(code).digest() + code)
    except OSError as error:
        _say_once(folder, f"{error.filename or folder}: {error.strerror or error}")


def cache_folder() -> Path | None:
    """Return the folder of the cache; None where there is none: without a home, or inside of installed code."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path raises without a home)
    if not os.path.isabs(home):  # noqa: PTH117 (as the XDG specification says, and for `~` without a home)
        return None
    folder = Path(os.path.realpath(home)) / "trtllm_ct"
    if _is_among_sources(folder):
        _say_once(folder, f"{folder}: it is among the files of programs")
        return None
    return folder


def _read_own(descriptor: int, path: Path) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
        raise OSError(f"no file of at most {_MAX_BYTES} bytes")
    require_own(status, path)
    return read_descriptor(descriptor, status.st_size)


def _replace(folder: int, name: str, content: bytes) -> None:
    """Write a file in an open folder, under another name at first."""
    partial = f"{name}.{os.getpid()}"
    with suppress(FileNotFoundError):  # of a process that was killed
        os.unlink(partial, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, stat.S_IRUSR | stat.S_IWUSR, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise


def _is_among_sources(folder: Path) -> bool:
    """Whether a folder is inside of this package, of its source tree, or of any folder of installed packages."""
    package = Path(__file__).resolve().parents[2]
    tree = package.parent
    if {"site-packages", "dist-packages"} & set(folder.parts) or package in folder.parents:
        return True
    return (tree / "pyproject.toml").exists() and tree in folder.parents


_keeps_files = not sys.dont_write_bytecode

_said: list[str] = []
"""What this process has said about the cache: one warning is enough."""


def _say_once(folder: Path, why: str) -> None:
    if _said:
        return
    _said.append(why)
    logger.warning(
        "Machine code of loops is not kept in %s (%s): every process compiles it again, which takes seconds. "
        "Set XDG_CACHE_HOME to a folder that only this user can write to.",
        folder,
        why,
    )

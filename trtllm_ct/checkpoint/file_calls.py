"""The file-system calls of a conversion, one thin function for each.

Everything that a conversion does to its work directory and its output goes through these functions, so that tests can
let any single call fail, end the process there, or record what was synced. Callers use them as `file_calls.NAME`.

Names are looked up in `folder`, the descriptor of an open directory, so that nobody can exchange a directory on the
path. Links are never followed. Every function raises `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

__all__ = [
    "allocate",
    "close",
    "copy_range",
    "exchange",
    "free_bytes",
    "is_movable",
    "is_writable",
    "link",
    "list_names",
    "lock",
    "make_directory",
    "open_directory",
    "open_file",
    "open_way",
    "read_at",
    "remove_directory",
    "rename",
    "set_mode",
    "status",
    "status_of",
    "sync",
    "truncate",
    "unlink",
    "write",
    "write_at",
]

# From linux/fs.h; they are the same on every architecture.
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2

_NO_SUCH_CALL = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

# An overlay can't exchange some directories and reports them as being on different devices.
_NO_EXCHANGE = {*_NO_SUCH_CALL, errno.EXDEV}


def open_directory(name: str, folder: int | None = None) -> int:
    """Open a directory and return its descriptor."""
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def open_way(path: str) -> int:
    """Open the directory at an absolute path and return its descriptor; a link anywhere on the way is an error."""
    *folders, last = [part for part in path.split("/") if part] or ["."]
    folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folders:
            inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        return open_directory(last, folder)
    finally:
        os.close(folder)


def open_file(name: str, folder: int, flags: int) -> int:
    """Open a file, with the flags of `os.open`, and return its descriptor; opening a FIFO does not wait."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666, dir_fd=folder)


def close(descriptor: int) -> None:
    """Close a descriptor."""
    os.close(descriptor)


def make_directory(name: str, folder: int | None = None, mode: int = 0o777) -> None:
    """Make a directory."""
    os.mkdir(name, mode, dir_fd=folder)


def link(target: str, name: str, folder: int) -> None:
    """Make a symbolic link to the absolute path `target`."""
    os.symlink(target, name, dir_fd=folder)


def list_names(folder: int) -> list[str]:
    """Return the names in a directory, sorted."""
    return sorted(os.listdir(folder))


def status(descriptor: int) -> os.stat_result:
    """Return the status of an open file or directory."""
    return os.fstat(descriptor)


def status_of(name: str, folder: int) -> os.stat_result:
    """Return the status of a name; that of a link itself if it is one."""
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def unlink(name: str, folder: int) -> None:
    """Remove a name that is no directory."""
    os.unlink(name, dir_fd=folder)


def remove_directory(name: str, folder: int | None = None) -> None:
    """Remove an empty directory."""
    os.rmdir(name, dir_fd=folder)


def rename(name: str, new_name: str, folder: int) -> None:
    """Rename within a directory; an existing `new_name` is an error where the file system can tell."""
    try:
        _renameat2(name, new_name, folder, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
        os.rename(name, new_name, src_dir_fd=folder, dst_dir_fd=folder)


def exchange(name: str, other: str, folder: int) -> bool:
    """Exchange two names within a directory in one step; returns false where the file system has no such step."""
    try:
        _renameat2(name, other, folder, _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        return False
    return True


def is_writable(folder: int) -> bool:
    """Whether this user may make and rename names in a directory."""
    return os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True)


def is_movable(name: str, full: str, folder: int) -> bool:
    """Whether a directory can be renamed within the directory it is in; `full` is one that is not empty.

    Nothing can be renamed to `full`, so nothing is changed: an overlay says first that the directory can't be moved.
    """
    try:
        os.rename(name, full, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EBUSY}:
            return False
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    return True


def _renameat2(name: str, new_name: str, folder: int, flags: int) -> None:
    """Call renameat2, which Python does not offer; ENOSYS where the C library has none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None or sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while call(folder, os.fsencode(name), folder, os.fsencode(new_name), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), name, None, new_name)


def set_mode(descriptor: int, mode: int) -> None:
    """Set the permissions of an open file or directory."""
    os.fchmod(descriptor, mode)


def lock(descriptor: int) -> None:
    """Take an exclusive lock that the kernel releases when the process ends.

    Raises `BlockingIOError` when another process holds it.
    """
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync(descriptor: int) -> None:
    """Return when a file's bytes, or a directory's names, would survive a power cut."""
    os.fsync(descriptor)


def allocate(descriptor: int, nbytes: int) -> bool:
    """Give a file a size and reserve its blocks; returns false where the file system can't reserve blocks.

    `os.posix_fallocate` is not used: where the file system can't reserve blocks, the C library writes a byte into each.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    while call is not None:
        if call(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) == 0:
            return True
        code = ctypes.get_errno()
        if code in _NO_SUCH_CALL:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return False


def truncate(descriptor: int, nbytes: int) -> None:
    """Give a file a size."""
    os.ftruncate(descriptor, nbytes)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into a buffer at an offset; returns the bytes read, 0 at the end of the file."""
    return os.preadv(descriptor, [buffer], offset)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write at an offset; returns the bytes written."""
    return os.pwrite(descriptor, data, offset)


def copy_range(source: int, begin: int, target: int, offset: int, nbytes: int) -> int:
    """Copy bytes from one open file to another inside the kernel; returns the bytes copied, 0 at the end of the source.

    `begin` is the first byte in the source, and `offset` its place in the target.
    """
    if sys.platform != "linux" or not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.copy_file_range(source, target, nbytes, begin, offset)


def write(descriptor: int, data: bytes) -> int:
    """Write at the end of what was written; returns the bytes written."""
    return os.write(descriptor, data)


def free_bytes(descriptor: int) -> int:
    """Return the bytes that this user can still write to the file system of an open file or directory."""
    system = os.fstatvfs(descriptor)
    return system.f_bavail * system.f_frsize

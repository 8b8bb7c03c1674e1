"""`guarded_maps`: a file that shrinks while it is mapped is an error, not the end of the process.

The kernel sends SIGBUS to a thread that loads a byte of a map behind the end of its file, or one that the disk can't
deliver. Without a handler that ends the process, without a message. While files are guarded, the pages of their maps
from there on are replaced by zeros, and the thread goes on; `damaged` then names the file, and the caller throws its
results away.

The handler is Python code, which is possible because this signal is never asynchronous: it comes from the load of a
byte, in code that copies or converts bytes. Such code holds no lock but the interpreter's, and a thread without that
lock waits for it, as after any call that released it.
Files are guarded on Linux; elsewhere the signal does what it did before.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["guarded_maps"]

_PAGE = 4096
_SA_SIGINFO = 4
_ADDRESS_IN_SIGINFO = 16
_PROT_READ_WRITE = 0x1 | 0x2
_MAP_PRIVATE_FIXED_ANONYMOUS = 0x02 | 0x10 | 0x20
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Action(ctypes.Structure):
    """`struct sigaction` of the C library on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@contextmanager
def guarded_maps(paths: Collection[Path]) -> Iterator[set[Path]]:
    """Guard the maps of files, by their resolved paths; yield the set of those whose pages were replaced by zeros.

    The set grows as it happens. Guards in several threads, and inside each other, share one handler.
    """
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        yield set()
        return
    damaged: set[Path] = set()
    guard = _Guard({str(path).replace("\n", "\\012"): path for path in paths}, _inodes(paths), damaged)
    with _lock:
        _guards.append(guard)
        if len(_guards) == 1:
            _install()
    try:
        yield damaged
    finally:
        with _lock:
            _guards.remove(guard)
            if not _guards:
                _uninstall()


@dataclass(frozen=True, slots=True, eq=False)
class _Guard:
    """Guarded files by the names and by the numbers that the kernel gives them, and the damaged ones.

    A file that is renamed keeps its number; on a file system of several layers the number may be another one.
    """

    by_name: dict[str, Path]
    by_inode: dict[int, Path]
    damaged: set[Path]

    def file(self, name: str, inode: int) -> Path | None:
        """Return the guarded file that a map is of, None for any other."""
        return self.by_name.get(name) or self.by_inode.get(inode)


def _inodes(paths: Collection[Path]) -> dict[int, Path]:
    """Return the files by inode, without those that are gone: they can't be mapped any more."""
    inodes = {}
    for path in paths:
        with suppress(OSError):
            inodes[path.stat().st_ino] = path
    return inodes


_lock = Lock()
_guards: list[_Guard] = []

_before = _Action()


def _install() -> None:
    action = _Action(handler=ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)
    _c_library().sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))


def _uninstall() -> None:
    _c_library().sigaction(signal.SIGBUS, ctypes.byref(_before), None)


def _handle(_number: int, info: int, _context: int) -> None:
    """Replace the pages of a guarded map by zeros; for any other address, put the handler back that was there before.

    The thread then repeats the load: it finds zeros, or the signal comes again and the other handler takes it.
    """
    address = ctypes.c_uint64.from_address(info + _ADDRESS_IN_SIGINFO).value
    end, name, inode = _map_at(address)
    guarded = [(path, guard) for guard in tuple(_guards) if (path := guard.file(name, inode)) is not None]
    for path, guard in guarded:
        guard.damaged.add(path)
    page = address - address % _PAGE
    if not guarded or _replace(page, end - page) == _MAP_FAILED:
        _uninstall()


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_handle)


def _map_at(address: int) -> tuple[int, str, int]:
    """Return the end of the map that holds an address, and the name and inode of its file; see proc(5)."""
    for line in Path("/proc/self/maps").read_bytes().split(b"\n")[:-1]:
        bounds, _, rest = line.partition(b" ")
        begin, end = (int(bound, 16) for bound in bounds.split(b"-"))
        if begin <= address < end:
            _, _, _, inode, *name = rest.split(None, 4)
            text = (name or [b""])[0].decode(errors="surrogateescape")
            return end, text.removesuffix(" (deleted)"), int(inode)
    return address, "", 0


def _replace(address: int, nbytes: int) -> int | None:
    return _c_library().mmap(address, nbytes, _PROT_READ_WRITE, _MAP_PRIVATE_FIXED_ANONYMOUS, -1, 0)  # type: ignore[no-any-return]


def _c_library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return library

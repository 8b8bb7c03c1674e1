"""A cache of compiled loops: numba compiles each loop once per processor type, later processes load the object file.

Calling a loop through numba costs every process half a second and 40 MB, for numba's modules and the tables of its
compiler. llvmlite, the library below numba, loads an object file in 40 ms. Therefore this module caches object files:
one for each loop, combination of argument types, and processor type. They are stored beside Python's bytecode, or in
the user's cache folder where the bytecode folder is read-only. A file is compiled again when the source code or the
version of llvmlite has changed, or when the file is incomplete. Where no folder is writable, each process compiles for
itself.

Loops take numpy arrays, numbers and tuples of numbers, and return nothing. They allocate no memory: callers allocate
all buffers. Arguments are passed in numba's array layout and with its calling convention for native functions; both are
documented in numba's developer manual. The same numba that compiled an object file determined them, and the file
contains no calls into numba.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import threading
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path
from struct import Struct
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, cast

import llvmlite
import llvmlite.binding as llvm
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["inner", "kernel"]

P = ParamSpec("P")
R = TypeVar("R")

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",  # a division by 0 raises no exception
    "_nrt": False,  # loops allocate no memory, so they need no reference counts
}
_SYMBOL = "trtllm_ct_loop"
"""The name of the entry point in each object file."""

_LLVM_TYPES = {"P": "ptr", "q": "i64", "d": "double"}

_WRAPPERS = re.compile(r"^define [^\n]*@(?:cfunc\.|_ZN7cpython)[^\n]*\{\n.*?^\}\n", re.MULTILINE | re.DOTALL)
"""The wrapper functions that numba adds, which call into Python and numba."""

_FUNCTION = re.compile(r"^define (?!linkonce)[^\n@]*@([\w.$]+)\(", re.MULTILINE)

_COMPILE_LOCK = threading.RLock()

ArgumentType = tuple[str, int, bool]
"""The type of an argument: numpy's character code of the dtype, number of axes, and whether it is C-contiguous.

A number has 0 axes, and a tuple of n numbers has -n axes.
"""


def inner(loop: Callable[P, R]) -> Callable[P, R]:
    """Mark a loop that only other loops of the same file call."""
    loop.is_inner = True  # type: ignore[attr-defined]
    return loop


def kernel(loop: Callable[P, None]) -> Callable[P, None]:
    """Make a loop callable from Python, with positional arguments; it releases the GIL while it runs."""
    return cast("Callable[P, None]", functools.update_wrapper(_Kernel(loop), loop))


class _Kernel:
    """A loop that is callable from Python.

    The first call with each combination of argument types loads or compiles the machine code.
    """

    def __init__(self, loop: Callable[..., None]) -> None:
        self._loop = loop
        self._loaded: dict[tuple[ArgumentType, ...], _Loaded] = {}

    def __call__(self, *arguments: Any) -> None:
        argument_types: list[ArgumentType] = []
        values: list[float] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                argument_types.append((argument.dtype.char, argument.ndim, argument.flags.c_contiguous))
                # The first two fields of numba's array layout, memory info and parent object, are null.
                address, _ = argument.__array_interface__["data"]
                values += (0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides)
            elif isinstance(argument, tuple):
                argument_types.append(("q", -len(argument), True))
                values += argument
            else:
                argument_types.append(("d" if isinstance(argument, float) else "q", 0, True))
                values.append(argument)
        key = tuple(argument_types)
        if key not in self._loaded:
            with _COMPILE_LOCK:
                if key not in self._loaded:
                    self._loaded[key] = _load(self._loop, key)
        loaded = self._loaded[key]
        if loaded.function(loaded.parameters.pack(*values)):
            raise AssertionError(f"{self._loop.__name__} ended with an error, which loops have no way to raise")


class _Loaded(NamedTuple):
    """A loop that is loaded into memory.

    `function` takes the address of the parameters, packed as `parameters` describes, and returns 0.
    `engine` owns the machine code and must outlive `function`.
    """

    function: Callable[[bytes], int]
    parameters: Struct
    engine: llvm.ExecutionEngine


def _load(loop: Callable[..., None], argument_types: tuple[ArgumentType, ...]) -> _Loaded:
    """Load the loop for these argument types from the cache, or else compile it and write it to the cache."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, stamp, folders = _file_name(loop, argument_types), _stamp(loop), _folders(loop)
    code = next((cached for folder in folders if (cached := _read_cached(folder / name, stamp))), None)
    if code is None:
        code = _compile(loop, argument_types)
        _write_cached(code, stamp, folders, name)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)
    parameters = Struct("".join(_parameters(argument_types)))
    return _Loaded(prototype(engine.get_function_address(_SYMBOL)), parameters, engine)


def _parameters(argument_types: Iterable[ArgumentType]) -> Iterator[str]:
    """Yield the native parameters that numba passes for each argument, as format characters of `Struct`.

    `P` is an address.
    """
    for dtype, axes, _ in argument_types:
        yield "PPqqP" + 2 * axes * "q" if axes > 0 else dtype * max(-axes, 1)


def _compile(loop: Callable[..., None], argument_types: tuple[ArgumentType, ...]) -> bytes:
    """Compile the loop to an object file that includes everything that it calls, except the C library."""
    from numba import njit, types

    # Copy the functions into a new namespace, in which the inner loops are compiled functions: a compiled loop can only
    # call those.
    function = cast("FunctionType", loop)
    namespace = dict(function.__globals__)
    for name, value in function.__globals__.items():
        if getattr(value, "is_inner", False):
            namespace[name] = njit(**_OPTIONS)(FunctionType(value.__code__, namespace, name))
    dispatcher = njit(**_OPTIONS)(FunctionType(function.__code__, namespace, function.__name__))
    signature = types.void(*map(_numba_type, argument_types))
    dispatcher.compile(signature)
    text = _WRAPPERS.sub("", dispatcher.inspect_llvm(dispatcher.signatures[0]))
    (native,) = _FUNCTION.findall(text)
    object_file: bytes = _target_machine().emit_object(llvm.parse_assembly(text + _entry_point(native, argument_types)))
    return object_file


def _entry_point(native: str, argument_types: Iterable[ArgumentType]) -> str:
    """Return LLVM assembly of a function that reads its parameters from memory and calls `native` with them.

    It exists because ctypes is slow at passing thirty parameters. `native` also takes two pointers to write its return
    value (None) and its exception to; both point to memory that is never read.
    """
    llvm_types = [_LLVM_TYPES[parameter] for parameter in "".join(_parameters(argument_types))]
    loads = [
        f"%p{i} = getelementptr i64, ptr %parameters, i64 {i}\n%v{i} = load {llvm_type}, ptr %p{i}"
        for i, llvm_type in enumerate(llvm_types)
    ]
    values = ["ptr %unread", "ptr %unread", *(f"{llvm_type} %v{i}" for i, llvm_type in enumerate(llvm_types))]
    return "\n".join(
        (
            f"define i32 @{_SYMBOL}(ptr %parameters) {{",
            "%unread = alloca ptr",
            *loads,
            f"%status = call i32 @{native}({', '.join(values)})",
            "ret i32 %status",
            "}",
        )
    )


def _numba_type(argument_type: ArgumentType) -> Any:
    """Return the numba type of an argument."""
    from numba import from_dtype, types

    dtype, axes, is_contiguous = argument_type
    item = from_dtype(np.dtype(dtype))
    if axes > 0:
        return types.Array(item, axes, "C" if is_contiguous else "A")
    return types.UniTuple(item, -axes) if axes else item


def _target_machine() -> llvm.TargetMachine:
    """Return a new target machine for this processor with all its features; an execution engine takes ownership of it.

    The relocation model is the one that numba uses.
    """
    triple = llvm.get_process_triple()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if triple.startswith("x86") else "default",
        codemodel="jitdefault",
    )


def _file_name(loop: Callable[..., None], argument_types: tuple[ArgumentType, ...]) -> str:
    """Return the file name for a loop, its argument types and this processor type.

    The processor type is part of the name because the nodes of a cluster may share a folder.
    """
    processor = f"{llvm.get_process_triple()} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    tag = hashlib.sha256(f"{argument_types} {processor}".encode()).hexdigest()[:16]
    return f"{loop.__module__.rpartition('.')[2]}.{loop.__name__}.{tag}.o"


def _stamp(loop: Callable[..., None]) -> bytes:
    """Return a hash of 32 bytes that changes with the source files and with the version of llvmlite."""
    stamp = hashlib.sha256(llvmlite.__version__.encode())
    for source in (cast("FunctionType", loop).__code__.co_filename, __file__):
        stamp.update(Path(source).read_bytes())
    return stamp.digest()


def _folders(loop: Callable[..., None]) -> tuple[Path, ...]:
    """Return the cache folders in order of preference: the bytecode folder, then the user's cache folder."""
    source = cast("FunctionType", loop).__code__.co_filename
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path raises without a home)
    return Path(cache_from_source(source)).parent, Path(home) / "trtllm_ct"


def _read_cached(path: Path, stamp: bytes) -> bytes | None:
    """Return the object code in the file at `path`, or None when the file is missing, incomplete or out of date."""
    with suppress(OSError):
        content = path.read_bytes()
        code = content[64:]
        if content[:64] == stamp + hashlib.sha256(code).digest():
            return code
    return None


def _write_cached(code: bytes, stamp: bytes, folders: tuple[Path, ...], name: str) -> None:
    """Write the object code atomically to a file in the first writable folder; do nothing when there is none.

    The file starts with 64 bytes: the stamp, and the SHA-256 hash of the object code.
    """
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{name}.{os.getpid()}"
            partial.write_bytes(stamp + hashlib.sha256(code).digest() + code)
            partial.replace(folder / name)
            return

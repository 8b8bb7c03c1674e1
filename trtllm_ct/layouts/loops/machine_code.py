"""Loops as object files: numba compiles each once for a kind of processor, later processes only load machine code.

Called through numba, a compiled loop costs every process half a second and 40 MB: numba's own modules, and the tables
of its compiler. llvmlite alone, which numba is built on, loads the object file in 40 ms. So a loop keeps its own files:
one for each kind of arguments and each kind of processor, beside Python's bytecode or, where that folder is read-only,
in the user's cache folder. A file that was made by another source, by another llvmlite, or not written to its end is
made anew; where no folder can be written, each process compiles for itself.

Loops take arrays of numpy, numbers and tuples of numbers, and return nothing. They own no memory: callers make all
buffers. What a compiled loop expects of its arguments is numba's layout of arrays and calling convention of native
functions, both in its developers' manual; a file was made by the numba that chose them, and holds no call back into it.
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
    "error_model": "numpy",  # dividing by 0 is no exception
    "_nrt": False,  # no loop owns memory, and none counts who does
}
_SYMBOL = "trtllm_ct_loop"
"""What is called in each object file."""

_LLVM_TYPES = {"P": "ptr", "q": "i64", "d": "double"}

_WRAPPERS = re.compile(r"^define [^\n]*@(?:cfunc\.|_ZN7cpython)[^\n]*\{\n.*?^\}\n", re.MULTILINE | re.DOTALL)
"""Functions beside the loop that call back into Python and numba."""

_FUNCTION = re.compile(r"^define (?!linkonce)[^\n@]*@([\w.$]+)\(", re.MULTILINE)

_COMPILING = threading.RLock()

Kind = tuple[str, int, bool]
"""Of an argument: dtype in a letter of numpy's, axes, and whether its elements are one behind the other.

Numbers are arrays of no axes here, and tuples of n numbers have -n axes.
"""


def inner(loop: Callable[P, R]) -> Callable[P, R]:
    """A loop that only other loops of its file call."""
    loop.is_inner = True  # type: ignore[attr-defined]
    return loop


def kernel(loop: Callable[P, None]) -> Callable[P, None]:
    """A loop that is called from Python, by position; other threads run meanwhile."""
    return cast("Callable[P, None]", functools.update_wrapper(_Kernel(loop), loop))


class _Kernel:
    """Machine code of a loop, for each kind of arguments loaded or made when it is first called with them."""

    def __init__(self, loop: Callable[..., None]) -> None:
        self._loop = loop
        self._loaded: dict[tuple[Kind, ...], _Loaded] = {}

    def __call__(self, *arguments: Any) -> None:
        kinds: list[Kind] = []
        values: list[float] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                kinds.append((argument.dtype.char, argument.ndim, argument.flags.c_contiguous))
                # Without an owner or a parent.
                address, _ = argument.__array_interface__["data"]
                values += (0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides)
            elif isinstance(argument, tuple):
                kinds.append(("q", -len(argument), True))
                values += argument
            else:
                kinds.append(("d" if isinstance(argument, float) else "q", 0, True))
                values.append(argument)
        key = tuple(kinds)
        if key not in self._loaded:
            with _COMPILING:
                if key not in self._loaded:
                    self._loaded[key] = _load(self._loop, key)
        loaded = self._loaded[key]
        if loaded.function(loaded.parameters.pack(*values)):
            raise AssertionError(f"{self._loop.__name__} ended with an error, which loops have no way to raise")


class _Loaded(NamedTuple):
    """A loop in memory, which the engine keeps: it takes the address of its parameters, packed, and returns 0."""

    function: Callable[[bytes], int]
    parameters: Struct
    engine: llvm.ExecutionEngine


def _load(loop: Callable[..., None], kinds: tuple[Kind, ...]) -> _Loaded:
    """The loop for arguments of these kinds."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, stamp, folders = _file_name(loop, kinds), _stamp(loop), _folders(loop)
    code = next((found for folder in folders if (found := _read(folder / name, stamp))), None)
    if code is None:
        code = _compiled(loop, kinds)
        _keep(code, stamp, folders, name)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)
    parameters = Struct("".join(_parameters(kinds)))
    return _Loaded(prototype(engine.get_function_address(_SYMBOL)), parameters, engine)


def _parameters(kinds: Iterable[Kind]) -> Iterator[str]:
    """What numba makes of arguments of these kinds, as `Struct` spells it, with `P` for what an address is."""
    for dtype, axes, _ in kinds:
        yield "PPqqP" + 2 * axes * "q" if axes > 0 else dtype * max(-axes, 1)


def _compiled(loop: Callable[..., None], kinds: tuple[Kind, ...]) -> bytes:
    """An object file with the loop, and all that it calls but for the C library."""
    from numba import njit, types

    # The same functions once more, in a module of their own where those that are called are compiled ones.
    functions = cast("FunctionType", loop)
    namespace = dict(functions.__globals__)
    for name, value in functions.__globals__.items():
        if getattr(value, "is_inner", False):
            namespace[name] = njit(**_OPTIONS)(FunctionType(value.__code__, namespace, name))
    dispatcher = njit(**_OPTIONS)(FunctionType(functions.__code__, namespace, functions.__name__))
    signature = types.void(*map(_numba_type, kinds))
    dispatcher.compile(signature)
    text = _WRAPPERS.sub("", dispatcher.inspect_llvm(dispatcher.signatures[0]))
    (native,) = _FUNCTION.findall(text)
    object_file: bytes = _machine().emit_object(llvm.parse_assembly(text + _entry(native, kinds)))
    return object_file


def _entry(native: str, kinds: Iterable[Kind]) -> str:
    """A function that calls `native` with its parameters out of memory: ctypes takes long to hand over thirty of them.

    Where `native` writes that it returns None, and would write what it raises, nobody reads.
    """
    types = [_LLVM_TYPES[parameter] for parameter in "".join(_parameters(kinds))]
    loads = [
        f"%p{i} = getelementptr i64, ptr %parameters, i64 {i}\n%v{i} = load {each}, ptr %p{i}"
        for i, each in enumerate(types)
    ]
    values = ["ptr %nobodys", "ptr %nobodys", *(f"{each} %v{i}" for i, each in enumerate(types))]
    return "\n".join(
        (
            f"define i32 @{_SYMBOL}(ptr %parameters) {{",
            "%nobodys = alloca ptr",
            *loads,
            f"%status = call i32 @{native}({', '.join(values)})",
            "ret i32 %status",
            "}",
        )
    )


def _numba_type(kind: Kind) -> Any:
    from numba import from_dtype, types

    dtype, axes, in_a_row = kind
    item = from_dtype(np.dtype(dtype))
    if axes > 0:
        return types.Array(item, axes, "C" if in_a_row else "A")
    return types.UniTuple(item, -axes) if axes else item


def _machine() -> llvm.TargetMachine:
    """This processor, with all that it can do; an engine keeps its own. Relocations are those that numba asks for."""
    triple = llvm.get_process_triple()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if triple.startswith("x86") else "default",
        codemodel="jitdefault",
    )


def _file_name(loop: Callable[..., None], kinds: tuple[Kind, ...]) -> str:
    """One for each loop, kind of arguments and kind of processor: nodes of a cluster share a folder."""
    processor = f"{llvm.get_process_triple()} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    tag = hashlib.sha256(f"{kinds} {processor}".encode()).hexdigest()[:16]
    return f"{loop.__module__.rpartition('.')[2]}.{loop.__name__}.{tag}.o"


def _stamp(loop: Callable[..., None]) -> bytes:
    """32 bytes that differ when the code would: by the sources, and by the compiler."""
    made_by = hashlib.sha256(llvmlite.__version__.encode())
    for source in (cast("FunctionType", loop).__code__.co_filename, __file__):
        made_by.update(Path(source).read_bytes())
    return made_by.digest()


def _folders(loop: Callable[..., None]) -> tuple[Path, ...]:
    """Where machine code is looked for: beside bytecode first, then with the user."""
    source = cast("FunctionType", loop).__code__.co_filename
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path raises without a home)
    return Path(cache_from_source(source)).parent, Path(home) / "trtllm_ct"


def _read(path: Path, stamp: bytes) -> bytes | None:
    """The object file at `path`; None where there is none that is whole and up to date."""
    with suppress(OSError):
        content = path.read_bytes()
        code = content[64:]
        if content[:64] == stamp + hashlib.sha256(code).digest():
            return code
    return None


def _keep(code: bytes, stamp: bytes, folders: tuple[Path, ...], name: str) -> None:
    """Write the object file into the first folder that can be written, whole or not at all."""
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{name}.{os.getpid()}"
            partial.write_bytes(stamp + hashlib.sha256(code).digest() + code)
            partial.replace(folder / name)
            return

"""Compiled loops: numba compiles each loop once per processor type, later processes load the object file.

Calling a loop through numba costs every process half a second and 40 MB, for numba's modules and the tables of its
compiler. llvmlite, the library below numba, loads an object file in 40 ms. Therefore object files are cached
(`code_cache.py`): one for each loop, combination of argument types, and processor type. A file is compiled again when
the source code or a version has changed, or when the file is incomplete.

An object file is made from the LLVM assembly that numba prints, in a form that another release of numba may change. So
the functions in it are examined, and it has to compute the same as numba's own function on a small example before it is
used and kept. Where anything is in doubt, numba's own function is used.

Loops take numpy arrays, numbers and tuples of numbers, and return nothing. They allocate no memory: callers allocate
all buffers. Arguments are passed in numba's array layout and with its calling convention for native functions; both are
documented in numba's developer manual. The same numba that compiled an object file determined them, and the file
contains no calls into numba.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import logging
import re
import threading
from struct import Struct
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, cast

import llvmlite.binding as llvm
import numpy as np

from trtllm_ct.layouts.loops import code_cache, vectors
from trtllm_ct.layouts.loops.code_cache import read_cached, stamp_of, write_cached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["inner", "kernel", "operation"]

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

_SOURCES = (__file__, code_cache.__file__, vectors.__file__)
"""The files of this package that decide what an object file holds, beside that of the loop."""

_COMPILE_LOCK = threading.RLock()

logger = logging.getLogger("trtllm_ct")

ArgumentType = tuple[str, int, bool]
"""The type of an argument: numpy's character code of the dtype, number of axes, and whether it is C-contiguous.

A number has 0 axes, and a tuple of n numbers has -n axes.
"""


def inner(loop: Callable[P, R]) -> Callable[P, R]:
    """Mark a loop that only other loops call."""
    loop.is_inner = True  # type: ignore[attr-defined]
    return loop


def operation(result: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function that writes LLVM's instructions for a call of it in a loop; `lanes.py` has them.

    `result` is the name of the numba type that it returns. The function takes llvmlite's builder and the arguments of
    the call: the value of a number, and the address of an array's first element.
    """

    def decorate(emit: Callable[..., Any]) -> Callable[..., Any]:
        emit.operation_result = result  # type: ignore[attr-defined]
        return emit

    return decorate


def kernel(*example: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a loop callable from Python, with positional arguments; it releases the GIL while it runs.

    `example` are arguments on which a compiled loop is tried. Their dtypes are those of each call's arguments.
    """

    def decorate(loop: Callable[P, None]) -> Callable[P, None]:
        return cast("Callable[P, None]", functools.update_wrapper(_Kernel(loop, example), loop))

    return decorate


class _Kernel:
    """A loop that is callable from Python.

    The first call with each combination of argument types loads or compiles the machine code.
    """

    def __init__(self, loop: Callable[..., None], example: tuple[Any, ...]) -> None:
        self._loop = loop
        self._example = example
        self._loaded: dict[tuple[ArgumentType, ...], _Loaded | Callable[..., None]] = {}

    def __call__(self, *arguments: Any) -> None:
        key, values = _unpacked(arguments)
        if key not in self._loaded:
            with _COMPILE_LOCK:
                if key not in self._loaded:
                    self._loaded[key] = _load(self._loop, key, self._example)
        loaded = self._loaded[key]
        if isinstance(loaded, _Loaded):
            loaded.run(values)
        else:
            loaded(*arguments)


def _unpacked(arguments: tuple[Any, ...]) -> tuple[tuple[ArgumentType, ...], list[float]]:
    """Return the types of arguments, and the native parameters that they are passed as."""
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
    return tuple(argument_types), values


class _Loaded(NamedTuple):
    """A loop that is loaded into memory.

    `function` takes the address of the parameters, packed as `parameters` describes, and returns 0.
    `engine` owns the machine code and must outlive `function`.
    """

    function: Callable[[bytes], int]
    parameters: Struct
    engine: llvm.ExecutionEngine

    def run(self, values: list[float]) -> None:
        """Run the loop with these native parameters."""
        if self.function(self.parameters.pack(*values)):
            raise AssertionError("a loop ended with an error, which loops have no way to raise")


def _load(
    loop: Callable[..., None], argument_types: tuple[ArgumentType, ...], example: tuple[Any, ...]
) -> _Loaded | Callable[..., None]:
    """Load the loop for these argument types from the cache, or else compile it and write it to the cache.

    Returns numba's own function if there is any doubt about the machine code.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, stamp = _file_name(loop, argument_types), stamp_of(*sorted(_sources(loop)), *_SOURCES)
    code = read_cached(name, stamp)
    if code is not None:
        return _linked(code, argument_types)
    dispatcher = _compile(loop, argument_types)
    try:
        code = _object_code(dispatcher, argument_types)
        loaded = _linked(code, argument_types)
        _try_out(loaded, dispatcher, example, argument_types)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("The machine code of %s is not used, but numba's own function: %s", loop.__name__, error)
        return cast("Callable[..., None]", dispatcher)
    write_cached(name, stamp, code)
    return loaded


def _sources(function: Callable[..., Any], seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the files with the source code of a loop, and of all that it may call; `seen` are those known before."""
    files = seen | {function.__code__.co_filename}
    for value in _globals(function).values():
        if _is_called(value) and value.__code__.co_filename not in files:
            files = _sources(value, files)
    return files


def _globals(function: Callable[..., Any]) -> dict[str, Any]:
    return cast("FunctionType", function).__globals__


def _is_called(value: Any) -> bool:
    """Whether loops may call this: an inner loop, or an operation."""
    return hasattr(value, "is_inner") or hasattr(value, "operation_result")


def _linked(code: bytes, argument_types: tuple[ArgumentType, ...]) -> _Loaded:
    """Load an object file into memory."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)
    parameters = Struct("".join(_parameters(argument_types)))
    return _Loaded(prototype(engine.get_function_address(_SYMBOL)), parameters, engine)


def _try_out(
    loaded: _Loaded, dispatcher: Any, example: tuple[Any, ...], argument_types: tuple[ArgumentType, ...]
) -> None:
    """Raise `ValueError` unless a loop computes the same as numba's own function on an example."""
    if len(example) != len(argument_types):
        raise ValueError("there is no example to try it on")
    arguments, expected = (tuple(map(_as_type, example, argument_types)) for _ in range(2))
    key, values = _unpacked(arguments)
    if key != argument_types:
        raise ValueError("the example has other types")
    dispatcher(*expected)
    loaded.run(values)
    arrays = [index for index, argument in enumerate(arguments) if isinstance(argument, np.ndarray)]
    if any(arguments[index].tobytes() != expected[index].tobytes() for index in arrays):
        raise ValueError("it computes something else")


def _as_type(value: Any, argument_type: ArgumentType) -> Any:
    """Return a value of an example with the type of an argument; arrays are copied."""
    dtype, axes, is_contiguous = argument_type
    if axes < 0:
        return value
    if axes == 0:
        return float(value) if dtype == "d" else int(value)
    array = np.asarray(value).astype(dtype)
    if is_contiguous:
        return array
    # Every other element of a larger array, along its first axis: all axes of the loops but that one are contiguous.
    apart = np.zeros((2 * array.shape[0], *array.shape[1:]), dtype)[::2]
    apart[...] = array
    return apart


def _parameters(argument_types: Iterable[ArgumentType]) -> Iterator[str]:
    """Yield the native parameters that numba passes for each argument, as format characters of `Struct`.

    `P` is an address.
    """
    for dtype, axes, _ in argument_types:
        yield "PPqqP" + 2 * axes * "q" if axes > 0 else dtype * max(-axes, 1)


def _compile(loop: Callable[..., None], argument_types: tuple[ArgumentType, ...]) -> Any:
    """Return numba's own function of the loop, compiled for these argument types."""
    from numba import njit, types

    dispatcher = njit(**_OPTIONS)(_with_compiled_globals(loop, {}))
    dispatcher.compile(types.void(*map(_numba_type, argument_types)))
    return dispatcher


def _with_compiled_globals(function: Callable[..., Any], namespaces: dict[str, dict[str, Any]]) -> FunctionType:
    """Return a copy of a function in a namespace where inner loops and operations are what a compiled loop can call.

    `namespaces` are those made before, by the file of the function.
    """
    from numba import njit

    file = function.__code__.co_filename
    if file not in namespaces:
        namespace = namespaces[file] = dict(_globals(function))
        for name, value in _globals(function).items():
            if hasattr(value, "operation_result"):
                namespace[name] = _intrinsic(value)
            elif _is_called(value):
                namespace[name] = njit(**_OPTIONS)(_with_compiled_globals(value, namespaces))
    return FunctionType(function.__code__, namespaces[file], function.__name__)


def _intrinsic(emit: Any) -> Any:
    """Return numba's intrinsic for an operation."""
    from numba import types
    from numba.extending import intrinsic

    result = getattr(types, emit.operation_result)

    def typed(_: Any, *argument_types: Any) -> Any:
        def generate(context: Any, build: Any, signature: Any, values: Any) -> Any:
            arguments = [
                context.make_array(kind)(context, build, value).data if isinstance(kind, types.Array) else value
                for kind, value in zip(signature.args, values, strict=True)
            ]
            written = emit(build, *arguments)
            return context.get_dummy_value() if result is types.void else written

        return result(*argument_types), generate

    # numba passes arguments as this signature says: not as the tuple that `typed` has.
    typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
    return intrinsic(typed)


def _object_code(dispatcher: Any, argument_types: tuple[ArgumentType, ...]) -> bytes:
    """Return an object file that includes everything that a compiled loop calls, except the C library.

    Raises `ValueError` or `RuntimeError` if the assembly is not as expected.
    """
    text = _WRAPPERS.sub("", dispatcher.inspect_llvm(dispatcher.signatures[0]))
    (native,) = _FUNCTION.findall(text)
    text += _entry_point(native, argument_types)
    module = llvm.parse_assembly(text)
    module.verify()
    expected = ["ptr", "ptr", *(_LLVM_TYPES[letter] for letter in "".join(_parameters(argument_types)))]
    found = [str(argument.type) for argument in module.get_function(native).arguments]
    if found != expected:
        raise ValueError(f"its parameters are {', '.join(found)}")
    for name in _called(module, text):
        # The linker would end the process. What numba adds to it is missing where numba is not loaded.
        if name.startswith(("Py", "_Py")) or not hasattr(ctypes.CDLL(None), name):
            raise ValueError(f"it calls {name}")
    object_file: bytes = _target_machine().emit_object(module)
    return object_file


def _called(module: llvm.ModuleRef, text: str) -> Iterator[str]:
    """Yield the functions outside of a module that it calls; text of LLVM also declares some that nothing calls."""
    for function in module.functions:
        is_outside = function.is_declaration and not function.name.startswith("llvm.")
        if is_outside and len(re.findall(rf"@{re.escape(function.name)}\b", text)) > 1:
            yield function.name


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

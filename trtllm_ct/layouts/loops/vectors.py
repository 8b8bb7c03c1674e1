"""Vectors in LLVM's instructions: their types, their lanes, and tables of sixteen bytes; `lanes.py` is made of them.

Each function writes instructions with llvmlite's builder, `build`, and returns the value that they compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "LANES",
    "address_at",
    "bytes_of",
    "constant",
    "constants",
    "fields_of",
    "integer_type",
    "lanes_of",
    "limited_to",
    "looked_up",
    "reduced",
    "shuffled",
    "sixteen_bytes",
    "spread",
    "vector_type",
    "word_of_fields",
]

LANES = 8
"""The float32 numbers of a register of AVX2, and the magnitudes of a half of a histogram."""

_NEON = ("neon", "llvm.aarch64.neon.tbl1.v16i8")
_LOOK_UP = {"x86_64": ("ssse3", "llvm.x86.ssse3.pshuf.b.128"), "aarch64": _NEON, "arm64": _NEON}
"""The feature that a processor needs to look up sixteen bytes at once, and the instruction, by architecture."""


def looked_up(build: Any, table: Any, index: Any) -> Any:
    """Return the elements of a vector of sixteen bytes that the bytes of another number: at most 15, or 128 for 0."""
    from llvmlite import ir

    feature, name = _LOOK_UP.get(llvm.get_process_triple().partition("-")[0], ("", ""))
    if llvm.get_host_cpu_features().get(feature):
        function = build.module.declare_intrinsic(name, (), ir.FunctionType(table.type, [table.type, table.type]))
        return build.call(function, [table, index])
    result = ir.Constant(table.type, ir.Undefined)
    for i in range(16):
        place = build.and_(build.extract_element(index, constant(32, i)), constant(8, 15))
        result = build.insert_element(result, build.extract_element(table, place), constant(32, i))
    zeros = constants("i8", [0] * 16)
    return build.select(build.icmp_signed("<", index, zeros), zeros, result)


def fields_of(build: Any, word: Any) -> Any:
    """Return the sixteen fields of four bits of a uint64, the lowest first, as bytes."""
    wide = build.zext(bytes_of(build, word), vector_type("i16", 8))
    both = build.or_(wide, build.shl(wide, constants("i16", [4] * 8)))
    return build.and_(build.bitcast(both, vector_type("i8", 16)), constants("i8", [15] * 16))


def word_of_fields(build: Any, fields: Any) -> Any:
    """Return the uint64 with sixteen fields of four bits: the inverse of `fields_of`."""
    pairs = build.bitcast(fields, vector_type("i16", 8))
    pairs = build.or_(pairs, build.lshr(pairs, constants("i16", [4] * 8)))
    return build.bitcast(build.trunc(pairs, vector_type("i8", 8)), integer_type(64))


def bytes_of(build: Any, word: Any) -> Any:
    """Return the eight bytes of a uint64, the lowest first."""
    return build.bitcast(word, vector_type("i8", 8))


def sixteen_bytes(build: Any, address: Any) -> Any:
    """Return the sixteen bytes at an address."""
    return build.load(address_at(build, address, "i8", lanes=16), align=1)


def reduced(build: Any, name: str, lanes: Any) -> Any:
    """Return what LLVM's operation of that name makes of the integers of a vector: their sum, or the largest."""
    from llvmlite import ir

    element = lanes.type.element
    intrinsic = f"llvm.vector.reduce.{name}.v{lanes.type.count}{element}"
    return build.call(build.module.declare_intrinsic(intrinsic, (), ir.FunctionType(element, [lanes.type])), [lanes])


def address_at(build: Any, pointer: Any, element: str, first: int = 0, lanes: int = LANES) -> Any:
    """Return the address of a vector that starts at an element of an array."""
    return build.bitcast(build.gep(pointer, [constant(64, first)]), vector_type(element, lanes).as_pointer())


def limited_to(build: Any, order: str, words: Any, limit: int) -> Any:
    """Return a vector of words, and the limit in place of those that are not below or above it."""
    limits = constants("i32", [limit] * words.type.count)
    return build.select(build.icmp_unsigned(order, words, limits), words, limits)


def spread(build: Any, number: Any, lanes: int = LANES) -> Any:
    """Return a vector that has a number in each lane."""
    from llvmlite import ir

    one = build.insert_element(ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined), number, constant(32, 0))
    return lanes_of(build, one, [0] * lanes)


def lanes_of(build: Any, vector: Any, lanes: Iterable[int]) -> Any:
    """Return a vector of the lanes of another."""
    return shuffled(build, vector, vector, lanes)


def shuffled(build: Any, one: Any, other: Any, lanes: Iterable[int]) -> Any:
    """Return a vector of the lanes of two others, which are counted through both."""
    return build.shuffle_vector(one, other, constants("i32", lanes))


def vector_type(element: str, lanes: int) -> Any:
    """Return the type of a vector; `element` is LLVM's name of that of its lanes: float, double, i8, i16, ..."""
    from llvmlite import ir

    elements = {"float": ir.FloatType(), "double": ir.DoubleType()}
    return ir.VectorType(elements.get(element) or ir.IntType(int(element[1:])), lanes)


def constants(element: str, values: Iterable[float]) -> Any:
    """Return a vector of these numbers; `element` is as in `vector_type`."""
    from llvmlite import ir

    numbers = list(values)
    return ir.Constant(vector_type(element, len(numbers)), numbers)


def integer_type(bits: int) -> Any:
    """Return the type of integers of so many bits."""
    from llvmlite import ir

    return ir.IntType(bits)


def constant(bits: int, value: int) -> Any:
    """Return an integer of so many bits."""
    from llvmlite import ir

    return ir.Constant(integer_type(bits), value)

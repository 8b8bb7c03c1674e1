"""Operations on SIMD registers, written in LLVM's instructions: numba has no vectors of its own.

Loops call these functions like inner loops. Arguments are numbers, and arrays of one row, contiguous, whose elements
the operation loads or stores, as aligned as these are. LLVM compiles the vectors for any processor: one instruction has
eight lanes with AVX2, and four with SSE and Neon. Looking bytes up in a table is an instruction of its own on each kind
of processor; elsewhere it is sixteen loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm

from trtllm_ct.layouts.loops.machine_code import operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "AT_ONCE",
    "add_e2m1_errors",
    "add_scaled_bytes",
    "dot_with_bytes",
    "e4m3_error_of_codes",
    "e4m3_of_codes",
    "floats_of_bytes",
    "highest_byte",
    "least_lane",
    "looked_up_bytes",
    "looked_up_fields",
]

LANES = 8
"""The magnitudes of int4 codes above 0, and the candidates of a group."""

AT_ONCE = 16
"""The groups, and the values of each, that are rounded by one operation."""

_NEON = ("neon", "llvm.aarch64.neon.tbl1.v16i8")
_LOOK_UP = {"x86_64": ("ssse3", "llvm.x86.ssse3.pshuf.b.128"), "aarch64": _NEON, "arm64": _NEON}
"""The feature that a processor needs to look up sixteen bytes at once, and the instruction, by architecture."""


@operation("uint64")
def highest_byte(build: Any, word: Any) -> Any:
    """Return the position of the highest byte of a uint64 that is not 0, counted from 1; 0 for a word of 0."""
    zeros = build.ctlz(word, _number(1, 0))
    return build.lshr(build.sub(_number(64, 71), zeros), _number(64, 3))


@operation("void")
def floats_of_bytes(build: Any, word: Any, result_M: Any) -> None:
    """Store the eight bytes of a uint64 as float32 [8]."""
    build.store(build.uitofp(_bytes(build, word), _vector("float", LANES)), _at(build, result_M, "float"), align=4)


@operation("void")
def add_scaled_bytes(build: Any, word: Any, factor: Any, sum_M: Any) -> None:
    """Add the eight bytes of a uint64 times a float64 to float64 [8]."""
    numbers = build.uitofp(_bytes(build, word), _vector("double", LANES))
    place = _at(build, sum_M, "double")
    total = build.fadd(build.load(place, align=8), build.fmul(numbers, _spread(build, factor)))
    build.store(total, place, align=8)


@operation("void")
def add_e2m1_errors(build: Any, value_G: Any, groups: Any, scale_G: Any, inverse_G: Any, error_G: Any) -> None:
    """Add the squared errors of sixteen values to those of sixteen groups, float32 [16], one after the other.

    Values are rounded to the nearest number of E2M1 times the scale of the group, float32 [16], ties to even;
    `inverse_G` are the inverses of scales. `value_G` is the first value of the groups, float32 [16]; the next one is
    `groups` elements further.
    """
    word = _vector("i32", AT_ONCE)
    scale, inverse = (build.load(_at(build, each, "float", lanes=AT_ONCE), align=4) for each in (scale_G, inverse_G))
    place = _at(build, error_G, "float", lanes=AT_ONCE)
    total = build.load(place, align=4)
    for row in range(AT_ONCE):
        start = build.gep(value_G, [build.mul(groups, _number(64, row))])
        bits = build.bitcast(build.load(_at(build, start, "float", lanes=AT_ONCE), align=4), word)
        magnitude = build.bitcast(build.and_(bits, _constants("i32", [0x7FFFFFFF] * AT_ONCE)), scale.type)
        number = build.fmul(magnitude, inverse)
        # Next to 2^22 times the power of two below a number, float32 has the steps that E2M1 has next to that number.
        power = _limited(build, ">", build.bitcast(number, word), 0x3F800000)
        power = build.and_(power, _constants("i32", [0x7F800000] * AT_ONCE))
        far = build.bitcast(build.add(power, _constants("i32", [22 << 23] * AT_ONCE)), scale.type)
        rounded = build.bitcast(build.fsub(build.fadd(number, far), far), word)
        nearest = build.bitcast(_limited(build, "<", rounded, 0x40C00000), scale.type)
        error = build.fsub(magnitude, build.fmul(nearest, scale))
        total = build.fadd(total, build.fmul(error, error))
    build.store(total, place, align=4)


@operation("int32")
def dot_with_bytes(build: Any, word: Any, factor_M: Any) -> Any:
    """Return the sum of the eight bytes of a uint64, each times its element of int32 [8]."""
    from llvmlite import ir

    numbers = build.zext(_bytes(build, word), _vector("i32", LANES))
    products = build.mul(numbers, build.load(_at(build, factor_M, "i32"), align=4))
    kind = ir.FunctionType(ir.IntType(32), [products.type])
    return build.call(build.module.declare_intrinsic("llvm.vector.reduce.add.v8i32", (), kind), [products])


@operation("uint64")
def least_lane(build: Any, error_MC: Any, count_M: Any) -> Any:
    """Return the first c with the least sum over m of `error_MC`, float32 [8, 8], times `count_M`, float32 [8].

    Sums are float32; products are added in pairs, then sums of pairs, and so on. They are not NaN.
    """
    from llvmlite import ir

    sums = []
    for m in range(LANES):
        errors = build.load(_at(build, error_MC, "float", m * LANES), align=4)
        count = build.load(build.gep(count_M, [_number(64, m)]), align=4)
        sums.append(build.fmul(errors, _spread(build, count)))
    while len(sums) > 1:
        sums = [build.fadd(one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
    error_C = least = sums[0]
    # After each step the least of twice as many lanes is in all of them.
    for apart in (4, 2, 1):
        other = _lanes(build, least, [c ^ apart for c in range(LANES)])
        least = build.select(build.fcmp_ordered("<", least, other), least, other)
    equal = build.bitcast(build.fcmp_ordered("==", error_C, least), ir.IntType(LANES))
    return build.zext(build.cttz(equal, _number(1, 1)), ir.IntType(64))


@operation("float32")
def e4m3_error_of_codes(build: Any, word: Any, scale: Any, step: Any, inverse: Any) -> Any:
    """Return the squared error of codes with a scale, rounded to E4M3 with another one, `step`.

    The eight bytes of `word`, a uint64, are the numbers of codes with magnitudes from 1 to 8; `inverse` is that of
    `step`. Numbers are float32 and positive. Ties go to the even number, and the largest number is 448.
    """
    lanes = _vector("i32", LANES)
    magnitude = build.fmul(_constants("float", range(1, LANES + 1)), _spread(build, scale))
    number = build.fmul(magnitude, _spread(build, inverse))
    bits = build.bitcast(number, lanes)
    odd = build.and_(build.lshr(bits, _constants("i32", [20] * LANES)), _constants("i32", [1] * LANES))
    nearest = build.add(build.add(bits, odd), _constants("i32", [0x7FFFF] * LANES))
    normal = build.bitcast(build.and_(nearest, _constants("i32", [0xFFF00000] * LANES)), number.type)
    far = _constants("float", [2**14] * LANES)
    subnormal = build.fsub(build.fadd(number, far), far)
    is_normal = build.fcmp_ordered(">=", number, _constants("float", [2**-6] * LANES))
    rounded = build.bitcast(build.select(is_normal, normal, subnormal), lanes)
    limited = build.bitcast(_limited(build, "<", rounded, 0x43E00000), number.type)  # 448
    error = build.fsub(magnitude, build.fmul(limited, _spread(build, step)))
    total = build.fmul(build.fmul(error, error), build.uitofp(_bytes(build, word), number.type))
    for apart in (4, 2, 1):
        total = build.fadd(total, _lanes(build, total, [c ^ apart for c in range(LANES)]))
    return build.extract_element(total, _number(32, 0))


@operation("void")
def e4m3_of_codes(build: Any, scale: Any, inverse: Any, result_S: Any) -> None:
    """Store the E4M3 numbers that are nearest to the codes from -8 to 7 times a scale and an inverse, uint8 [16].

    Both are float32 and positive. Ties go to the even number, and the largest number is 448.
    """
    word = _vector("i32", LANES)
    scaled = build.fmul(_constants("float", range(1, LANES + 1)), _spread(build, scale))
    magnitude = build.fmul(scaled, _spread(build, inverse))
    bits = build.bitcast(magnitude, word)
    odd = build.and_(build.lshr(bits, _constants("i32", [20] * LANES)), _constants("i32", [1] * LANES))
    rebiased = build.add(build.add(bits, odd), _constants("i32", [0x7FFFF - (120 << 23)] * LANES))
    normal = build.lshr(rebiased, _constants("i32", [20] * LANES))
    normal = _limited(build, "<", normal, 126)
    # The last bit of 2^14 is the step of subnormal numbers: the addition rounds.
    step = build.bitcast(build.fadd(magnitude, _constants("float", [2**14] * LANES)), word)
    subnormal = build.sub(step, _constants("i32", [0x46800000] * LANES))
    is_normal = build.fcmp_ordered(">=", magnitude, _constants("float", [2**-6] * LANES))
    of_magnitudes = build.trunc(build.select(is_normal, normal, subnormal), _vector("i8", LANES))
    # Code 0 is -8, and code 8 is 0.
    zero = _constants("i8", [0] * LANES)
    of_codes = build.shuffle_vector(of_magnitudes, zero, _constants("i32", [7, 6, 5, 4, 3, 2, 1, 0, 8, *range(7)]))
    of_codes = build.or_(of_codes, _constants("i8", [128] * 8 + [0] * 8))
    build.store(of_codes, _at(build, result_S, "i8", lanes=16), align=1)


@operation("uint64")
def looked_up_fields(build: Any, word: Any, table: Any) -> Any:
    """Return sixteen fields of four bits, a uint64: those of another, `table`, that the fields of `word` number."""
    pairs = build.bitcast(_looked_up(build, _fields(build, table), _fields(build, word)), _vector("i16", 8))
    pairs = build.or_(pairs, build.lshr(pairs, _constants("i16", [4] * 8)))
    return _word(build, build.trunc(pairs, _vector("i8", 8)))


@operation("void")
def looked_up_bytes(build: Any, word: Any, table_S: Any, result_I: Any) -> None:
    """Store the bytes of `table_S`, uint8 [16], that the fields of four bits of a uint64 number, as uint8 [16]."""
    table = build.load(_at(build, table_S, "i8", lanes=16), align=1)
    build.store(_looked_up(build, table, _fields(build, word)), _at(build, result_I, "i8", lanes=16), align=1)


def _looked_up(build: Any, table: Any, index: Any) -> Any:
    """Return the elements of a vector of sixteen bytes that the bytes of another number, each at most 15."""
    from llvmlite import ir

    feature, name = _LOOK_UP.get(llvm.get_process_triple().partition("-")[0], ("", ""))
    if llvm.get_host_cpu_features().get(feature):
        function = build.module.declare_intrinsic(name, (), ir.FunctionType(table.type, [table.type, table.type]))
        return build.call(function, [table, index])
    result = ir.Constant(table.type, ir.Undefined)
    for i in range(16):
        element = build.extract_element(table, build.extract_element(index, _number(32, i)))
        result = build.insert_element(result, element, _number(32, i))
    return result


def _fields(build: Any, word: Any) -> Any:
    """Return the sixteen fields of four bits of a uint64, the lowest first, as bytes."""
    wide = build.zext(_bytes(build, word), _vector("i16", 8))
    both = build.or_(wide, build.shl(wide, _constants("i16", [4] * 8)))
    return build.and_(build.bitcast(both, _vector("i8", 16)), _constants("i8", [15] * 16))


def _bytes(build: Any, word: Any) -> Any:
    return build.bitcast(word, _vector("i8", 8))


def _word(build: Any, lanes: Any) -> Any:
    from llvmlite import ir

    return build.bitcast(lanes, ir.IntType(64))


def _at(build: Any, pointer: Any, element: str, first: int = 0, lanes: int = LANES) -> Any:
    """Return the address of a vector that starts at an element of an array."""
    return build.bitcast(build.gep(pointer, [_number(64, first)]), _vector(element, lanes).as_pointer())


def _limited(build: Any, order: str, words: Any, limit: int) -> Any:
    """Return a vector of words, and the limit in place of those that are not below or above it."""
    limits = _constants("i32", [limit] * words.type.count)
    return build.select(build.icmp_unsigned(order, words, limits), words, limits)


def _spread(build: Any, number: Any) -> Any:
    """Return a vector that has a number in each lane."""
    from llvmlite import ir

    one = build.insert_element(ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined), number, _number(32, 0))
    return _lanes(build, one, [0] * LANES)


def _lanes(build: Any, vector: Any, lanes: Sequence[int]) -> Any:
    """Return a vector of the lanes of another."""
    return build.shuffle_vector(vector, vector, _constants("i32", lanes))


def _vector(element: str, lanes: int) -> Any:
    from llvmlite import ir

    elements = {"float": ir.FloatType(), "double": ir.DoubleType()}
    return ir.VectorType(elements.get(element) or ir.IntType(int(element[1:])), lanes)


def _constants(element: str, values: Iterable[float]) -> Any:
    from llvmlite import ir

    numbers = list(values)
    return ir.Constant(_vector(element, len(numbers)), numbers)


def _number(bits: int, value: int) -> Any:
    from llvmlite import ir

    return ir.Constant(ir.IntType(bits), value)

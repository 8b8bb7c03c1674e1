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
    from collections.abc import Iterable

__all__ = [
    "AT_ONCE",
    "SCALES_AT_ONCE",
    "add_e2m1_errors",
    "add_e4m3_estimates",
    "add_histogram_of_word",
    "add_scaled_bytes",
    "dot_with_bytes",
    "e4m3_error_of_codes",
    "e4m3_of_codes",
    "floats_of_bytes",
    "highest_byte",
    "histogram_of_word",
    "least_lane",
    "least_of_eight",
    "least_of_twelve",
    "looked_up_bytes",
    "looked_up_fields",
    "mapped_codes",
    "mapped_numbers",
    "numbers_of_codes",
]

LANES = 8
"""The float32 numbers of a register of AVX2, and the magnitudes of a half of a histogram."""

AT_ONCE = 16
"""The groups, and the values of each, that are rounded by one operation."""

SCALES_AT_ONCE = 24
"""The scales that are compared by one operation: three registers, so that additions need not wait for each other."""

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


@operation("uint64")
def numbers_of_codes(build: Any, word: Any, magnitude_I: Any, sign_I: Any, number_X: Any, place: Any) -> Any:
    """Store the magnitudes of sixteen codes and then their signs, uint8 from `place` on; return the largest magnitude.

    `magnitude_I` and `sign_I`, uint8 [16], are those of the codes that the fields of `word`, a uint64, may be.
    """
    fields, start = _fields(build, word), build.gep(number_X, [place])
    magnitudes, signs = (_looked_up(build, _sixteen_bytes(build, table), fields) for table in (magnitude_I, sign_I))
    for first, found in ((0, magnitudes), (16, signs)):
        build.store(found, _at(build, start, "i8", first, lanes=16), align=1)
    return build.zext(_reduced(build, "umax", magnitudes), _integer(64))


@operation("void")
def histogram_of_word(
    build: Any, byte_X: Any, first: Any, counted_XI: Any, above_I: Any, below_I: Any, result_I: Any
) -> None:
    """Store how often each magnitude occurs in a word, sixteen bytes.

    The word is eight bytes of `byte_X` from `first` on. `counted_XI`, uint8 [256, 16], are the numbers of codes in each
    byte; a magnitude belongs to two codes, `above_I` and `below_I`, uint8 [16], where 128 is none. The first magnitude
    is 1.
    """
    counts = _counts(build, byte_X, first, counted_XI, above_I, below_I)
    build.store(counts, _at(build, result_I, "i8", lanes=16), align=1)


@operation("void")
def add_histogram_of_word(
    build: Any, byte_X: Any, first: Any, counted_XI: Any, above_I: Any, below_I: Any, result_I: Any
) -> None:
    """Add what `histogram_of_word` stores to the bytes at `result_I`."""
    counts = _counts(build, byte_X, first, counted_XI, above_I, below_I)
    counts = build.add(counts, _sixteen_bytes(build, result_I))
    build.store(counts, _at(build, result_I, "i8", lanes=16), align=1)


def _counts(build: Any, byte_X: Any, first: Any, counted_XI: Any, above_I: Any, below_I: Any) -> Any:
    total = None
    for x in range(8):
        byte = build.load(build.gep(byte_X, [build.add(first, _number(64, x))]))
        row = build.shl(build.zext(byte, _integer(64)), _number(64, 4))
        counts = _sixteen_bytes(build, build.gep(counted_XI, [row]))
        total = build.add(total, counts) if total else counts
    above, below = _sixteen_bytes(build, above_I), _sixteen_bytes(build, below_I)
    return build.add(_looked_up(build, total, above), _looked_up(build, total, below))


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


@operation("void")
def add_e4m3_estimates(build: Any, number_M: Any, weight_M: Any, inverse_C: Any, error_C: Any) -> None:
    """Add the weighted squared errors of numbers, rounded to E4M3 with each of 24 scales, to `error_C`, float32 [24].

    `number_M` and `weight_M`, float32 [16], are the numbers and the weights of their errors, `inverse_C`, float32 [24],
    the inverses of scales. Numbers times these are normal. Errors are added one number after the other.
    """
    firsts = range(0, SCALES_AT_ONCE, LANES)
    inverses = [build.load(_at(build, inverse_C, "float", c), align=4) for c in firsts]
    totals = [build.load(_at(build, error_C, "float", c), align=4) for c in firsts]
    for b in range(AT_ONCE):
        value, weight = (
            _spread(build, build.load(build.gep(each, [_number(64, b)]), align=4)) for each in (number_M, weight_M)
        )
        for v, inverse in enumerate(inverses):
            number = build.fmul(value, inverse)
            # Where two numbers of E4M3 are equally near, either will do: the error is the same.
            bits = build.add(build.bitcast(number, _vector("i32", LANES)), _constants("i32", [0x80000] * LANES))
            nearest = build.bitcast(build.and_(bits, _constants("i32", [0xFFF00000] * LANES)), number.type)
            error = build.fsub(number, nearest)
            totals[v] = build.fadd(totals[v], build.fmul(weight, build.fmul(error, error)))
    for c, total in zip(firsts, totals, strict=True):
        build.store(total, _at(build, error_C, "float", c), align=4)


@operation("int32")
def dot_with_bytes(build: Any, word: Any, factor_M: Any) -> Any:
    """Return the sum of the eight bytes of a uint64, each times its element of int32 [8]."""
    numbers = build.zext(_bytes(build, word), _vector("i32", LANES))
    return _reduced(build, "add", build.mul(numbers, build.load(_at(build, factor_M, "i32"), align=4)))


@operation("uint64")
def least_of_eight(
    build: Any, number_X: Any, place: Any, record_C: Any, first: Any, record_X: Any, factor_X: Any
) -> Any:
    """Return which of eight candidates has the least error for sixteen magnitudes; of several, the first one.

    `number_X` has from `place` on the magnitudes, uint8, up to 15. `record_C` has from `first` on the places of the
    candidates' records in `record_X`. A record has two tables of sixteen bytes, by magnitude. The error of a candidate
    is the sum of both tables' sums times its factors, between -2^27 and 2^27. `factor_X`, int16, has from four times
    `first` on sixteen numbers for each four candidates: their factors for the first table's sums, then those for the
    other one's. Each is there twice, for the sums of the first eight magnitudes and of the others.
    """
    one, other = (_products_of_four(build, number_X, place, record_C, first, c, record_X, factor_X) for c in (0, 4))
    return _least_of(build, _errors_of_eight(build, one, other))


@operation("uint64")
def least_of_twelve(
    build: Any, number_X: Any, place: Any, record_C: Any, first: Any, record_X: Any, factor_X: Any
) -> Any:
    """Return which of twelve candidates has the least error, as `least_of_eight` does."""
    one, other, last = (
        _products_of_four(build, number_X, place, record_C, first, c, record_X, factor_X) for c in (0, 4, 8)
    )
    of_last = build.add(_lanes(build, last, range(4)), _lanes(build, last, range(4, 8)))
    return _least_of(build, _errors_of_eight(build, one, other), _numbered(build, of_last, 8))


def _errors_of_eight(build: Any, one: Any, other: Any) -> Any:
    """Return the numbered errors of eight candidates, by the products of four and of four others."""
    first, second = (_shuffled(build, one, other, [*range(at, at + 4), *range(at + 8, at + 12)]) for at in (0, 4))
    return _numbered(build, build.add(first, second), 0)


def _numbered(build: Any, errors: Any, first: int) -> Any:
    """Return errors times sixteen, with the numbers of candidates in the last four bits."""
    count = errors.type.count
    shifted = build.shl(errors, _constants("i32", [4] * count))
    return build.add(shifted, _constants("i32", range(first, first + count)))


def _least_of(build: Any, errors: Any, more: Any = None) -> Any:
    """Return the number of the least of eight numbered errors, and of four more."""
    low, high = (_lanes(build, errors, range(at, at + 4)) for at in (0, 4))
    least = _smaller(build, low, high)
    least = _smaller(build, least, more) if more else least
    for apart in (2, 1):
        least = _smaller(build, least, _lanes(build, least, [c ^ apart for c in range(4)]))
    number = build.zext(build.extract_element(least, _number(32, 0)), _integer(64))
    return build.and_(number, _number(64, 15))


def _smaller(build: Any, one: Any, other: Any) -> Any:
    """Return the smaller one of two signed integers in each lane."""
    return build.select(build.icmp_signed("<", one, other), one, other)


def _products_of_four(
    build: Any, number_X: Any, place: Any, record_C: Any, first: Any, more: int, record_X: Any, factor_X: Any
) -> Any:
    """Return eight products: the sums of the first tables of four records times their factors, then of the others.

    A register holds sixteen numbers of 16 bits. Those of one candidate are its four sums, each followed by three zeros:
    of the first table for the first eight magnitudes and for the others, then of the other table.
    """
    magnitudes, sums = _sixteen_bytes(build, build.gep(number_X, [place])), []
    magnitudes = _lanes(build, magnitudes, [*range(16), *range(16)])
    for c in range(4):
        record = build.load(build.gep(record_C, [build.add(first, _number(64, more + c))]))
        record = build.gep(record_X, [build.zext(record, _integer(64))])
        tables = build.load(_at(build, record, "i8", lanes=32), align=1)
        of_halves = _sums_of_bytes(build, _looked_up_in_both(build, tables, magnitudes))
        sums.append(build.bitcast(of_halves, _vector("i16", 16)))
    while len(sums) > 1:  # two candidates have one zero after each sum, four have none
        sums = [_even_lanes(build, one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
    start = build.gep(factor_X, [build.shl(build.add(first, _number(64, more)), _number(64, 2))])
    return _sums_of_pairs(build, sums[0], build.load(_at(build, start, "i16", lanes=16), align=2))


def _even_lanes(build: Any, one: Any, other: Any) -> Any:
    """Return the even lanes of two vectors of sixteen: of both first halves, then of both others."""
    lanes = [first + c for half in (0, 8) for first in (half, half + 16) for c in range(0, 8, 2)]
    return _shuffled(build, one, other, lanes)


def _sums_of_pairs(build: Any, one: Any, other: Any) -> Any:
    """Return the sums of each two products of sixteen signed numbers of 16 bits, as eight of 32 bits."""
    products = build.mul(*(build.sext(each, _vector("i32", 16)) for each in (one, other)))
    return build.add(*(_lanes(build, products, range(odd, 16, 2)) for odd in (0, 1)))


def _sums_of_bytes(build: Any, lanes: Any) -> Any:
    """Return the sums of each eight of 32 bytes, as a vector of four i64."""
    from llvmlite import ir

    words = _vector("i64", 4)
    if _has_avx2():
        kind = ir.FunctionType(words, [lanes.type, lanes.type])
        function = build.module.declare_intrinsic("llvm.x86.avx2.psad.bw", (), kind)
        return build.call(function, [lanes, _constants("i8", [0] * 32)])
    total = build.bitcast(lanes, words)
    for bits, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        masks = _constants("i64", [mask] * 4)
        total = build.add(build.and_(total, masks), build.and_(build.lshr(total, _constants("i64", [bits] * 4)), masks))
    return total


def _looked_up_in_both(build: Any, tables: Any, index: Any) -> Any:
    """Return the bytes of two tables, one in each half of a vector of 32 bytes, that the bytes of each half number."""
    from llvmlite import ir

    if _has_avx2():
        kind = ir.FunctionType(tables.type, [tables.type, tables.type])
        return build.call(build.module.declare_intrinsic("llvm.x86.avx2.pshuf.b", (), kind), [tables, index])
    one, other = (
        _looked_up(build, *(_lanes(build, each, range(first, first + 16)) for each in (tables, index)))
        for first in (0, 16)
    )
    return _shuffled(build, one, other, range(32))


def _has_avx2() -> bool:
    """Whether loops may have instructions of AVX2."""
    return bool(llvm.get_host_cpu_features().get("avx2"))


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
def e4m3_error_of_codes(build: Any, word: Any, first: Any, scale: Any, step: Any, inverse: Any) -> Any:
    """Return the squared error of codes with a scale, rounded to E4M3 with another one, `step`.

    The eight bytes of `word`, a uint64, are the numbers of codes with magnitudes from `first` on; `inverse` is that of
    `step`. Numbers are float32 and positive. Ties go to the even number, and the largest number is 448.
    """
    lanes = _vector("i32", LANES)
    magnitudes = build.fadd(_constants("float", range(LANES)), _spread(build, first))
    magnitude = build.fmul(magnitudes, _spread(build, scale))
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
    counts = build.uitofp(_bytes(build, word), number.type)
    total = build.fmul(build.fmul(error, error), counts)
    for apart in (4, 2, 1):
        total = build.fadd(total, _lanes(build, total, [c ^ apart for c in range(LANES)]))
    return build.extract_element(total, _number(32, 0))


@operation("void")
def e4m3_of_codes(build: Any, scale: Any, inverse: Any, magnitude_I: Any, sign_I: Any, result_I: Any) -> None:
    """Store the E4M3 numbers that are nearest to sixteen numbers times a scale and an inverse, uint8 [16].

    `magnitude_I`, uint8 [16], are the magnitudes of the numbers, and `sign_I` is 8 where they are negative. Scale and
    inverse are float32 and positive. Ties go to the even number, and the largest number is 448.
    """
    magnitudes = build.uitofp(_sixteen_bytes(build, magnitude_I), _vector("float", 16))
    number = build.fmul(build.fmul(magnitudes, _spread(build, scale, 16)), _spread(build, inverse, 16))
    bits = build.bitcast(number, _vector("i32", 16))
    odd = build.and_(build.lshr(bits, _constants("i32", [20] * 16)), _constants("i32", [1] * 16))
    rebiased = build.add(build.add(bits, odd), _constants("i32", [0x7FFFF - (120 << 23)] * 16))
    normal = _limited(build, "<", build.lshr(rebiased, _constants("i32", [20] * 16)), 126)
    # The last bit of 2^14 is the step of subnormal numbers: the addition rounds.
    step = build.bitcast(build.fadd(number, _constants("float", [2**14] * 16)), bits.type)
    subnormal = build.sub(step, _constants("i32", [0x46800000] * 16))
    is_normal = build.fcmp_ordered(">=", number, _constants("float", [2**-6] * 16))
    codes = build.trunc(build.select(is_normal, normal, subnormal), _vector("i8", 16))
    signs = build.shl(_sixteen_bytes(build, sign_I), _constants("i8", [4] * 16))
    build.store(build.or_(codes, signs), _at(build, result_I, "i8", lanes=16), align=1)


@operation("uint64")
def looked_up_fields(build: Any, word: Any, table: Any) -> Any:
    """Return sixteen fields of four bits, a uint64: those of another, `table`, that the fields of `word` number."""
    return _word_of_fields(build, _looked_up(build, _fields(build, table), _fields(build, word)))


@operation("uint64")
def mapped_codes(build: Any, word: Any, code_X: Any, first: Any, magnitude_I: Any, sign_I: Any) -> Any:
    """Return sixteen codes of four bits, a uint64, for those of `word`: the one of the magnitude, with the sign.

    `magnitude_I` and `sign_I`, uint8 [16], are those of the sixteen codes that `word` may have. `code_X`, uint8, has
    the new codes of magnitudes from `first` on.
    """
    addresses = (build.gep(code_X, [first]), magnitude_I, sign_I)
    code, magnitude, sign = (_sixteen_bytes(build, address) for address in addresses)
    codes = build.or_(_looked_up(build, code, magnitude), sign)
    return _word_of_fields(build, _looked_up(build, codes, _fields(build, word)))


@operation("uint64")
def mapped_numbers(build: Any, number_X: Any, place: Any, code_X: Any, first: Any) -> Any:
    """Return sixteen codes of four bits, a uint64, for numbers that `numbers_of_codes` stored from `place` on.

    `code_X`, uint8, has the codes of magnitudes from `first` on; their fourth bit is the sign.
    """
    magnitudes, signs = (
        _sixteen_bytes(build, _at(build, build.gep(number_X, [place]), "i8", at, 16)) for at in (0, 16)
    )
    codes = _looked_up(build, _sixteen_bytes(build, build.gep(code_X, [first])), magnitudes)
    return _word_of_fields(build, build.or_(codes, signs))


@operation("void")
def looked_up_bytes(build: Any, word: Any, table_S: Any, result_I: Any) -> None:
    """Store the bytes of `table_S`, uint8 [16], that the fields of four bits of a uint64 number, as uint8 [16]."""
    table = _sixteen_bytes(build, table_S)
    build.store(_looked_up(build, table, _fields(build, word)), _at(build, result_I, "i8", lanes=16), align=1)


def _looked_up(build: Any, table: Any, index: Any) -> Any:
    """Return the elements of a vector of sixteen bytes that the bytes of another number: at most 15, or 128 for 0."""
    from llvmlite import ir

    feature, name = _LOOK_UP.get(llvm.get_process_triple().partition("-")[0], ("", ""))
    if llvm.get_host_cpu_features().get(feature):
        function = build.module.declare_intrinsic(name, (), ir.FunctionType(table.type, [table.type, table.type]))
        return build.call(function, [table, index])
    result = ir.Constant(table.type, ir.Undefined)
    for i in range(16):
        place = build.and_(build.extract_element(index, _number(32, i)), _number(8, 15))
        result = build.insert_element(result, build.extract_element(table, place), _number(32, i))
    zeros = _constants("i8", [0] * 16)
    return build.select(build.icmp_signed("<", index, zeros), zeros, result)


def _fields(build: Any, word: Any) -> Any:
    """Return the sixteen fields of four bits of a uint64, the lowest first, as bytes."""
    wide = build.zext(_bytes(build, word), _vector("i16", 8))
    both = build.or_(wide, build.shl(wide, _constants("i16", [4] * 8)))
    return build.and_(build.bitcast(both, _vector("i8", 16)), _constants("i8", [15] * 16))


def _word_of_fields(build: Any, fields: Any) -> Any:
    """Return the uint64 with sixteen fields of four bits: the inverse of `_fields`."""
    pairs = build.bitcast(fields, _vector("i16", 8))
    pairs = build.or_(pairs, build.lshr(pairs, _constants("i16", [4] * 8)))
    return build.bitcast(build.trunc(pairs, _vector("i8", 8)), _integer(64))


def _bytes(build: Any, word: Any) -> Any:
    return build.bitcast(word, _vector("i8", 8))


def _sixteen_bytes(build: Any, address: Any) -> Any:
    return build.load(_at(build, address, "i8", lanes=16), align=1)


def _reduced(build: Any, name: str, lanes: Any) -> Any:
    """Return what LLVM's operation of that name makes of the integers of a vector: their sum, or the largest."""
    from llvmlite import ir

    element = lanes.type.element
    intrinsic = f"llvm.vector.reduce.{name}.v{lanes.type.count}{element}"
    return build.call(build.module.declare_intrinsic(intrinsic, (), ir.FunctionType(element, [lanes.type])), [lanes])


def _at(build: Any, pointer: Any, element: str, first: int = 0, lanes: int = LANES) -> Any:
    """Return the address of a vector that starts at an element of an array."""
    return build.bitcast(build.gep(pointer, [_number(64, first)]), _vector(element, lanes).as_pointer())


def _limited(build: Any, order: str, words: Any, limit: int) -> Any:
    """Return a vector of words, and the limit in place of those that are not below or above it."""
    limits = _constants("i32", [limit] * words.type.count)
    return build.select(build.icmp_unsigned(order, words, limits), words, limits)


def _spread(build: Any, number: Any, lanes: int = LANES) -> Any:
    """Return a vector that has a number in each lane."""
    from llvmlite import ir

    one = build.insert_element(ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined), number, _number(32, 0))
    return _lanes(build, one, [0] * lanes)


def _lanes(build: Any, vector: Any, lanes: Iterable[int]) -> Any:
    """Return a vector of the lanes of another."""
    return _shuffled(build, vector, vector, lanes)


def _shuffled(build: Any, one: Any, other: Any, lanes: Iterable[int]) -> Any:
    """Return a vector of the lanes of two others, which are counted through both."""
    return build.shuffle_vector(one, other, _constants("i32", lanes))


def _vector(element: str, lanes: int) -> Any:
    from llvmlite import ir

    elements = {"float": ir.FloatType(), "double": ir.DoubleType()}
    return ir.VectorType(elements.get(element) or ir.IntType(int(element[1:])), lanes)


def _constants(element: str, values: Iterable[float]) -> Any:
    from llvmlite import ir

    numbers = list(values)
    return ir.Constant(_vector(element, len(numbers)), numbers)


def _integer(bits: int) -> Any:
    from llvmlite import ir

    return ir.IntType(bits)


def _number(bits: int, value: int) -> Any:
    from llvmlite import ir

    return ir.Constant(_integer(bits), value)

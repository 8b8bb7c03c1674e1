"""Operations on SIMD registers, written in LLVM's instructions: numba has no vectors of its own.

Loops call these functions like inner loops. Arguments are numbers, and arrays of one row, contiguous, whose elements
the operation loads or stores, as aligned as these are. LLVM compiles the vectors for any processor: one instruction has
eight lanes with AVX2, and four with SSE and Neon. Looking bytes up in a table is an instruction of its own on each kind
of processor; elsewhere it is sixteen loads.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm

from trtllm_ct.layouts.loops.machine_code import operation
from trtllm_ct.layouts.loops.vectors import (
    LANES,
    address_at,
    bytes_of,
    constant,
    constants,
    fields_of,
    integer_type,
    lanes_of,
    limited_to,
    looked_up,
    reduced,
    shuffled,
    sixteen_bytes,
    spread,
    vector_type,
    word_of_fields,
)

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

AT_ONCE = 16
"""The groups, and the values of each, that are rounded by one operation."""

SCALES_AT_ONCE = 24
"""The scales that are compared by one operation: three registers, so that additions need not wait for each other."""


@operation("uint64")
def highest_byte(build: Any, word: Any) -> Any:
    """Return the position of the highest byte of a uint64 that is not 0, counted from 1; 0 for a word of 0."""
    zeros = build.ctlz(word, constant(1, 0))
    return build.lshr(build.sub(constant(64, 71), zeros), constant(64, 3))


@operation("void")
def floats_of_bytes(build: Any, word: Any, result_M: Any) -> None:
    """Store the eight bytes of a uint64 as float32 [8]."""
    build.store(
        build.uitofp(bytes_of(build, word), vector_type("float", LANES)), address_at(build, result_M, "float"), align=4
    )


@operation("uint64")
def numbers_of_codes(build: Any, word: Any, magnitude_I: Any, sign_I: Any, number_X: Any, place: Any) -> Any:
    """Store the magnitudes of sixteen codes and then their signs, uint8 from `place` on; return the largest magnitude.

    `magnitude_I` and `sign_I`, uint8 [16], are those of the codes that the fields of `word`, a uint64, may be.
    """
    fields, start = fields_of(build, word), build.gep(number_X, [place])
    magnitudes, signs = (looked_up(build, sixteen_bytes(build, table), fields) for table in (magnitude_I, sign_I))
    for first, found in ((0, magnitudes), (16, signs)):
        build.store(found, address_at(build, start, "i8", first, lanes=16), align=1)
    return build.zext(reduced(build, "umax", magnitudes), integer_type(64))


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
    build.store(counts, address_at(build, result_I, "i8", lanes=16), align=1)


@operation("void")
def add_histogram_of_word(
    build: Any, byte_X: Any, first: Any, counted_XI: Any, above_I: Any, below_I: Any, result_I: Any
) -> None:
    """Add what `histogram_of_word` stores to the bytes at `result_I`."""
    counts = _counts(build, byte_X, first, counted_XI, above_I, below_I)
    counts = build.add(counts, sixteen_bytes(build, result_I))
    build.store(counts, address_at(build, result_I, "i8", lanes=16), align=1)


def _counts(build: Any, byte_X: Any, first: Any, counted_XI: Any, above_I: Any, below_I: Any) -> Any:
    total = None
    for x in range(8):
        byte = build.load(build.gep(byte_X, [build.add(first, constant(64, x))]))
        row = build.shl(build.zext(byte, integer_type(64)), constant(64, 4))
        counts = sixteen_bytes(build, build.gep(counted_XI, [row]))
        total = build.add(total, counts) if total else counts
    above, below = sixteen_bytes(build, above_I), sixteen_bytes(build, below_I)
    return build.add(looked_up(build, total, above), looked_up(build, total, below))


@operation("void")
def add_scaled_bytes(build: Any, word: Any, factor: Any, sum_M: Any) -> None:
    """Add the eight bytes of a uint64 times a float64 to float64 [8]."""
    numbers = build.uitofp(bytes_of(build, word), vector_type("double", LANES))
    place = address_at(build, sum_M, "double")
    total = build.fadd(build.load(place, align=8), build.fmul(numbers, spread(build, factor)))
    build.store(total, place, align=8)


@operation("void")
def add_e2m1_errors(build: Any, value_G: Any, groups: Any, scale_G: Any, inverse_G: Any, error_G: Any) -> None:
    """Add the squared errors of sixteen values to those of sixteen groups, float32 [16], one after the other.

    Values are rounded to the nearest number of E2M1 times the scale of the group, float32 [16], ties to even;
    `inverse_G` are the inverses of scales. `value_G` is the first value of the groups, float32 [16]; the next one is
    `groups` elements further.
    """
    word = vector_type("i32", AT_ONCE)
    scale, inverse = (
        build.load(address_at(build, each, "float", lanes=AT_ONCE), align=4) for each in (scale_G, inverse_G)
    )
    place = address_at(build, error_G, "float", lanes=AT_ONCE)
    total = build.load(place, align=4)
    for row in range(AT_ONCE):
        start = build.gep(value_G, [build.mul(groups, constant(64, row))])
        bits = build.bitcast(build.load(address_at(build, start, "float", lanes=AT_ONCE), align=4), word)
        magnitude = build.bitcast(build.and_(bits, constants("i32", [0x7FFFFFFF] * AT_ONCE)), scale.type)
        number = build.fmul(magnitude, inverse)
        # Next to 2^22 times the power of two below a number, float32 has the steps that E2M1 has next to that number.
        power = limited_to(build, ">", build.bitcast(number, word), 0x3F800000)
        power = build.and_(power, constants("i32", [0x7F800000] * AT_ONCE))
        far = build.bitcast(build.add(power, constants("i32", [22 << 23] * AT_ONCE)), scale.type)
        rounded = build.bitcast(build.fsub(build.fadd(number, far), far), word)
        nearest = build.bitcast(limited_to(build, "<", rounded, 0x40C00000), scale.type)
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
    inverses = [build.load(address_at(build, inverse_C, "float", c), align=4) for c in firsts]
    totals = [build.load(address_at(build, error_C, "float", c), align=4) for c in firsts]
    for b in range(AT_ONCE):
        value, weight = (
            spread(build, build.load(build.gep(each, [constant(64, b)]), align=4)) for each in (number_M, weight_M)
        )
        for v, inverse in enumerate(inverses):
            number = build.fmul(value, inverse)
            # Where two numbers of E4M3 are equally near, either will do: the error is the same.
            bits = build.add(build.bitcast(number, vector_type("i32", LANES)), constants("i32", [0x80000] * LANES))
            nearest = build.bitcast(build.and_(bits, constants("i32", [0xFFF00000] * LANES)), number.type)
            error = build.fsub(number, nearest)
            totals[v] = build.fadd(totals[v], build.fmul(weight, build.fmul(error, error)))
    for c, total in zip(firsts, totals, strict=True):
        build.store(total, address_at(build, error_C, "float", c), align=4)


@operation("int32")
def dot_with_bytes(build: Any, word: Any, factor_M: Any) -> Any:
    """Return the sum of the eight bytes of a uint64, each times its element of int32 [8]."""
    numbers = build.zext(bytes_of(build, word), vector_type("i32", LANES))
    return reduced(build, "add", build.mul(numbers, build.load(address_at(build, factor_M, "i32"), align=4)))


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
    of_last = build.add(lanes_of(build, last, range(4)), lanes_of(build, last, range(4, 8)))
    return _least_of(build, _errors_of_eight(build, one, other), _numbered(build, of_last, 8))


def _errors_of_eight(build: Any, one: Any, other: Any) -> Any:
    """Return the numbered errors of eight candidates, by the products of four and of four others."""
    first, second = (shuffled(build, one, other, [*range(at, at + 4), *range(at + 8, at + 12)]) for at in (0, 4))
    return _numbered(build, build.add(first, second), 0)


def _numbered(build: Any, errors: Any, first: int) -> Any:
    """Return errors times sixteen, with the numbers of candidates in the last four bits."""
    count = errors.type.count
    shifted = build.shl(errors, constants("i32", [4] * count))
    return build.add(shifted, constants("i32", range(first, first + count)))


def _least_of(build: Any, errors: Any, more: Any = None) -> Any:
    """Return the number of the least of eight numbered errors, and of four more."""
    low, high = (lanes_of(build, errors, range(at, at + 4)) for at in (0, 4))
    least = _smaller(build, low, high)
    least = _smaller(build, least, more) if more else least
    for apart in (2, 1):
        least = _smaller(build, least, lanes_of(build, least, [c ^ apart for c in range(4)]))
    number = build.zext(build.extract_element(least, constant(32, 0)), integer_type(64))
    return build.and_(number, constant(64, 15))


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
    magnitudes, sums = sixteen_bytes(build, build.gep(number_X, [place])), []
    magnitudes = lanes_of(build, magnitudes, [*range(16), *range(16)])
    for c in range(4):
        record = build.load(build.gep(record_C, [build.add(first, constant(64, more + c))]))
        record = build.gep(record_X, [build.zext(record, integer_type(64))])
        tables = build.load(address_at(build, record, "i8", lanes=32), align=1)
        of_halves = _sums_of_bytes(build, _looked_up_in_both(build, tables, magnitudes))
        sums.append(build.bitcast(of_halves, vector_type("i16", 16)))
    while len(sums) > 1:  # two candidates have one zero after each sum, four have none
        sums = [_even_lanes(build, one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
    start = build.gep(factor_X, [build.shl(build.add(first, constant(64, more)), constant(64, 2))])
    return _sums_of_pairs(build, sums[0], build.load(address_at(build, start, "i16", lanes=16), align=2))


def _even_lanes(build: Any, one: Any, other: Any) -> Any:
    """Return the even lanes of two vectors of sixteen: of both first halves, then of both others."""
    lanes = [first + c for half in (0, 8) for first in (half, half + 16) for c in range(0, 8, 2)]
    return shuffled(build, one, other, lanes)


def _sums_of_pairs(build: Any, one: Any, other: Any) -> Any:
    """Return the sums of each two products of sixteen signed numbers of 16 bits, as eight of 32 bits."""
    products = build.mul(*(build.sext(each, vector_type("i32", 16)) for each in (one, other)))
    return build.add(*(lanes_of(build, products, range(odd, 16, 2)) for odd in (0, 1)))


def _sums_of_bytes(build: Any, lanes: Any) -> Any:
    """Return the sums of each eight of 32 bytes, as a vector of four i64."""
    from llvmlite import ir

    words = vector_type("i64", 4)
    if _has_avx2():
        kind = ir.FunctionType(words, [lanes.type, lanes.type])
        function = build.module.declare_intrinsic("llvm.x86.avx2.psad.bw", (), kind)
        return build.call(function, [lanes, constants("i8", [0] * 32)])
    total = build.bitcast(lanes, words)
    for bits, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        masks = constants("i64", [mask] * 4)
        total = build.add(build.and_(total, masks), build.and_(build.lshr(total, constants("i64", [bits] * 4)), masks))
    return total


def _looked_up_in_both(build: Any, tables: Any, index: Any) -> Any:
    """Return the bytes of two tables, one in each half of a vector of 32 bytes, that the bytes of each half number."""
    from llvmlite import ir

    if _has_avx2():
        kind = ir.FunctionType(tables.type, [tables.type, tables.type])
        return build.call(build.module.declare_intrinsic("llvm.x86.avx2.pshuf.b", (), kind), [tables, index])
    one, other = (
        looked_up(build, *(lanes_of(build, each, range(first, first + 16)) for each in (tables, index)))
        for first in (0, 16)
    )
    return shuffled(build, one, other, range(32))


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
        errors = build.load(address_at(build, error_MC, "float", m * LANES), align=4)
        count = build.load(build.gep(count_M, [constant(64, m)]), align=4)
        sums.append(build.fmul(errors, spread(build, count)))
    while len(sums) > 1:
        sums = [build.fadd(one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
    error_C = least = sums[0]
    # After each step the least of twice as many lanes is in all of them.
    for apart in (4, 2, 1):
        other = lanes_of(build, least, [c ^ apart for c in range(LANES)])
        least = build.select(build.fcmp_ordered("<", least, other), least, other)
    equal = build.bitcast(build.fcmp_ordered("==", error_C, least), ir.IntType(LANES))
    return build.zext(build.cttz(equal, constant(1, 1)), ir.IntType(64))


@operation("float32")
def e4m3_error_of_codes(build: Any, word: Any, first: Any, scale: Any, step: Any, inverse: Any) -> Any:
    """Return the squared error of codes with a scale, rounded to E4M3 with another one, `step`.

    The eight bytes of `word`, a uint64, are the numbers of codes with magnitudes from `first` on; `inverse` is that of
    `step`. Numbers are float32 and positive. Ties go to the even number, and the largest number is 448.
    """
    lanes = vector_type("i32", LANES)
    magnitudes = build.fadd(constants("float", range(LANES)), spread(build, first))
    magnitude = build.fmul(magnitudes, spread(build, scale))
    number = build.fmul(magnitude, spread(build, inverse))
    bits = build.bitcast(number, lanes)
    odd = build.and_(build.lshr(bits, constants("i32", [20] * LANES)), constants("i32", [1] * LANES))
    nearest = build.add(build.add(bits, odd), constants("i32", [0x7FFFF] * LANES))
    normal = build.bitcast(build.and_(nearest, constants("i32", [0xFFF00000] * LANES)), number.type)
    far = constants("float", [2**14] * LANES)
    subnormal = build.fsub(build.fadd(number, far), far)
    is_normal = build.fcmp_ordered(">=", number, constants("float", [2**-6] * LANES))
    rounded = build.bitcast(build.select(is_normal, normal, subnormal), lanes)
    limited = build.bitcast(limited_to(build, "<", rounded, 0x43E00000), number.type)  # 448
    error = build.fsub(magnitude, build.fmul(limited, spread(build, step)))
    counts = build.uitofp(bytes_of(build, word), number.type)
    total = build.fmul(build.fmul(error, error), counts)
    for apart in (4, 2, 1):
        total = build.fadd(total, lanes_of(build, total, [c ^ apart for c in range(LANES)]))
    return build.extract_element(total, constant(32, 0))


@operation("void")
def e4m3_of_codes(build: Any, scale: Any, inverse: Any, magnitude_I: Any, sign_I: Any, result_I: Any) -> None:
    """Store the E4M3 numbers that are nearest to sixteen numbers times a scale and an inverse, uint8 [16].

    `magnitude_I`, uint8 [16], are the magnitudes of the numbers, and `sign_I` is 8 where they are negative. Scale and
    inverse are float32 and positive. Ties go to the even number, and the largest number is 448.
    """
    magnitudes = build.uitofp(sixteen_bytes(build, magnitude_I), vector_type("float", 16))
    number = build.fmul(build.fmul(magnitudes, spread(build, scale, 16)), spread(build, inverse, 16))
    bits = build.bitcast(number, vector_type("i32", 16))
    odd = build.and_(build.lshr(bits, constants("i32", [20] * 16)), constants("i32", [1] * 16))
    rebiased = build.add(build.add(bits, odd), constants("i32", [0x7FFFF - (120 << 23)] * 16))
    normal = limited_to(build, "<", build.lshr(rebiased, constants("i32", [20] * 16)), 126)
    # The last bit of 2^14 is the step of subnormal numbers: the addition rounds.
    step = build.bitcast(build.fadd(number, constants("float", [2**14] * 16)), bits.type)
    subnormal = build.sub(step, constants("i32", [0x46800000] * 16))
    is_normal = build.fcmp_ordered(">=", number, constants("float", [2**-6] * 16))
    codes = build.trunc(build.select(is_normal, normal, subnormal), vector_type("i8", 16))
    signs = build.shl(sixteen_bytes(build, sign_I), constants("i8", [4] * 16))
    build.store(build.or_(codes, signs), address_at(build, result_I, "i8", lanes=16), align=1)


@operation("uint64")
def looked_up_fields(build: Any, word: Any, table: Any) -> Any:
    """Return sixteen fields of four bits, a uint64: those of another, `table`, that the fields of `word` number."""
    return word_of_fields(build, looked_up(build, fields_of(build, table), fields_of(build, word)))


@operation("uint64")
def mapped_codes(build: Any, word: Any, code_X: Any, first: Any, magnitude_I: Any, sign_I: Any) -> Any:
    """Return sixteen codes of four bits, a uint64, for those of `word`: the one of the magnitude, with the sign.

    `magnitude_I` and `sign_I`, uint8 [16], are those of the sixteen codes that `word` may have. `code_X`, uint8, has
    the new codes of magnitudes from `first` on.
    """
    addresses = (build.gep(code_X, [first]), magnitude_I, sign_I)
    code, magnitude, sign = (sixteen_bytes(build, address) for address in addresses)
    codes = build.or_(looked_up(build, code, magnitude), sign)
    return word_of_fields(build, looked_up(build, codes, fields_of(build, word)))


@operation("uint64")
def mapped_numbers(build: Any, number_X: Any, place: Any, code_X: Any, first: Any) -> Any:
    """Return sixteen codes of four bits, a uint64, for numbers that `numbers_of_codes` stored from `place` on.

    `code_X`, uint8, has the codes of magnitudes from `first` on; their fourth bit is the sign.
    """
    magnitudes, signs = (
        sixteen_bytes(build, address_at(build, build.gep(number_X, [place]), "i8", at, 16)) for at in (0, 16)
    )
    codes = looked_up(build, sixteen_bytes(build, build.gep(code_X, [first])), magnitudes)
    return word_of_fields(build, build.or_(codes, signs))


@operation("void")
def looked_up_bytes(build: Any, word: Any, table_S: Any, result_I: Any) -> None:
    """Store the bytes of `table_S`, uint8 [16], that the fields of four bits of a uint64 number, as uint8 [16]."""
    table = sixteen_bytes(build, table_S)
    build.store(looked_up(build, table, fields_of(build, word)), address_at(build, result_I, "i8", lanes=16), align=1)

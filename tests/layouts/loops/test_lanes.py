"""Operations on SIMD registers compute what their documentation says, with the instructions of each processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from trtllm_ct.layouts.loops import lanes, machine_code
from trtllm_ct.layouts.loops.lanes import (
    add_histogram_of_word,
    add_scaled_bytes,
    dot_with_bytes,
    e4m3_of_codes,
    floats_of_bytes,
    highest_byte,
    histogram_of_word,
    least_lane,
    least_of_eight,
    least_of_twelve,
    looked_up_bytes,
    looked_up_fields,
    mapped_codes,
    mapped_numbers,
    numbers_of_codes,
)
from trtllm_ct.layouts.loops.machine_code import kernel
from trtllm_ct.layouts.loops.requantize_int4_kernels import number_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORDS = st.integers(0, 2**64 - 1)


@kernel(
    *([1, 2], [0] * 4, [1] * 8, [[float(m * c) for c in range(8)] for m in range(8)]),
    *([0.5] * 8, 2.0, [0.0] * 8, list(range(32))),
)
def all_operations(
    word: NDArray[np.uint64],
    words: NDArray[np.uint64],
    factor_M: NDArray[np.int32],
    error_MC: NDArray[np.float32],
    count_M: NDArray[np.float32],
    scale: float,
    sum_M: NDArray[np.float64],
    byte_S: NDArray[np.uint8],
) -> None:
    """Compute with a word, and write what has one value to `words`."""
    words[0] = highest_byte(word[0])
    words[1] = np.uint64(np.int64(dot_with_bytes(word[0], factor_M)))
    floats_of_bytes(word[0], count_M)
    words[2] = least_lane(error_MC, count_M)
    words[3] = looked_up_fields(word[0], word[1])
    add_scaled_bytes(word[0], scale, sum_M)
    looked_up_bytes(word[0], byte_S[:16], byte_S[16:])


@kernel([1.0], [1.0], list(range(16)), [8] * 8 + [0] * 8, [[0] * 16])
def e4m3(
    scale_N: NDArray[np.float32],
    inverse_N: NDArray[np.float32],
    magnitude_I: NDArray[np.uint8],
    sign_I: NDArray[np.uint8],
    code_NI: NDArray[np.uint8],
) -> None:
    """Write a row of codes for each scale."""
    for n in range(scale_N.shape[0]):
        e4m3_of_codes(scale_N[n], inverse_N[n], magnitude_I, sign_I, code_NI[n])


@kernel(
    *([5, 7], 3, *([table.tolist() for table in number_tables()[i]] for i in (0, 1, 3, 4, 5)), list(range(16))),
    *([0] * 3, [0] * 16, [0] * 48),
)
def of_numbers(
    word: NDArray[np.uint64],
    zero: int,
    magnitude_ZI: NDArray[np.uint8],
    sign_ZI: NDArray[np.uint8],
    counted_XI: NDArray[np.uint8],
    above_ZI: NDArray[np.uint8],
    below_ZI: NDArray[np.uint8],
    code_X: NDArray[np.uint8],
    words: NDArray[np.uint64],
    count_I: NDArray[np.uint8],
    number_X: NDArray[np.uint8],
) -> None:
    """Write the histogram of two words, the numbers of the first one, the largest magnitude, and its new codes."""
    byte_X = word.view(np.uint8)
    histogram_of_word(byte_X, np.uint64(0), counted_XI, above_ZI[zero], below_ZI[zero], count_I)
    add_histogram_of_word(byte_X, np.uint64(8), counted_XI, above_ZI[zero], below_ZI[zero], count_I)
    words[0] = numbers_of_codes(word[0], magnitude_ZI[zero], sign_ZI[zero], number_X, np.uint64(16))
    words[1] = mapped_codes(word[0], code_X, np.uint64(0), magnitude_ZI[zero], sign_ZI[zero])
    words[2] = mapped_numbers(number_X, np.uint64(16), code_X, np.uint64(0))


@kernel([1] * 32, [64, 0] * 16, [3] * 128, [-5] * 128, [0] * 2)
def least(
    number_X: NDArray[np.uint8],
    record_C: NDArray[np.uint16],
    record_X: NDArray[np.uint8],
    factor_X: NDArray[np.int16],
    words: NDArray[np.uint64],
) -> None:
    """Write the best of the first twelve candidates, and of eight from the sixteenth on."""
    words[0] = least_of_twelve(number_X, np.uint64(16), record_C, np.uint64(0), record_X, factor_X)
    words[1] = least_of_eight(number_X, np.uint64(16), record_C, np.uint64(16), record_X, factor_X)


def fields(word: int) -> list[int]:
    return [(word >> 4 * i) & 15 for i in range(16)]


@given(WORDS, WORDS, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_every_operation_on_any_word(word: int, other: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    factors = random.integers(-(2**20), 2**20, 8).astype(np.int32)
    errors = random.random((8, 8)).astype(np.float32)
    counts, sums = np.zeros(8, np.float32), random.random(8)
    stored = np.concatenate([random.integers(0, 256, 16), np.zeros(16)]).astype(np.uint8)
    words, before = np.zeros(4, np.uint64), sums.copy()
    number_of = np.array([(word >> 8 * i) & 255 for i in range(8)])

    all_operations(np.array([word, other], np.uint64), words, factors, errors, counts, 1.5, sums, stored)

    assert int(words[0]) == max((i + 1 for i in range(8) if number_of[i]), default=0)
    assert int(words[1].view(np.int64)) == int(number_of @ factors)
    assert counts.tolist() == number_of.tolist()
    of_lanes = number_of.astype(float) @ errors.astype(float)
    assert np.isclose(of_lanes[int(words[2])], of_lanes.min(), rtol=1e-6, atol=0)
    assert fields(int(words[3])) == [fields(other)[field] for field in fields(word)]
    assert np.allclose(sums, before + 1.5 * number_of, rtol=1e-15)
    assert stored[16:].tolist() == [stored[field] for field in fields(word)]


def test_of_equal_lanes_the_first_one_is_taken() -> None:
    words = np.zeros(4, np.uint64)
    errors = np.full((8, 8), 3, np.float32)
    errors[:, 0] = 4

    all_operations(
        *(np.array([2**64 - 1, 0], np.uint64), words, np.zeros(8, np.int32), errors, np.zeros(8, np.float32), 1.0),
        *(np.zeros(8), np.zeros(32, np.uint8)),
    )

    assert words[2] == 1


def test_codes_are_rounded_to_e4m3_as_torch_does() -> None:
    """Scales from those whose codes are all below the smallest number to those whose codes are beyond the largest."""
    scales = np.exp2(np.arange(-14, 7, 0.01)).astype(np.float32)
    codes = np.zeros((len(scales), 16), np.uint8)

    magnitudes = np.abs(np.arange(-12, 4))
    e4m3(scales, np.ones_like(scales), magnitudes.astype(np.uint8), np.repeat([8, 0], [12, 4]).astype(np.uint8), codes)

    numbers = np.clip(scales[:, None] * np.arange(-12, 4, dtype=np.float32), -448, 448)
    expected = torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(codes, expected)


@given(WORDS, WORDS, st.integers(0, 15), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_numbers_are_differences_to_the_zero_point(word: int, other: int, zero: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 8, 16).astype(np.uint8)
    words, counts, stored = np.zeros(3, np.uint64), np.zeros(16, np.uint8), np.zeros(48, np.uint8)
    tables = [number_tables()[i] for i in (0, 1, 3, 4, 5)]
    numbers, more = (np.array(fields(each)) - zero for each in (word, other))

    of_numbers(np.array([word, other], np.uint64), zero, *tables, codes, words, counts, stored)

    magnitudes = np.abs(np.concatenate([numbers, more]))
    assert counts.tolist() == [int((magnitudes == m).sum()) for m in range(1, 17)]
    assert stored.tolist() == [0] * 16 + [abs(number) for number in numbers] + [
        8 * int(number < 0) for number in numbers
    ]
    assert int(words[0]) == np.abs(numbers).max()
    assert fields(int(words[1])) == [int(codes[abs(number)]) + 8 * int(number < 0) for number in numbers]
    assert words[2] == words[1]


@pytest.mark.parametrize("has_avx2", [True, False], ids=["as it is", "without AVX2"])
def test_the_first_candidate_with_the_least_error_is_taken(has_avx2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "read_cached", lambda *_: None)
    monkeypatch.setattr(machine_code, "write_cached", lambda *_: None)
    if not has_avx2:
        monkeypatch.setattr(lanes, "_has_avx2", lambda: False)
    loop, random = kernel(*least._example)(least.__wrapped__), np.random.default_rng(0)
    for limit in (2, 3, 2**15) * 100:
        numbers = random.integers(0, 16, 32).astype(np.uint8)
        records = random.integers(0, 4, 32)
        tables = random.integers(0, 181, (4, 2, 16)).astype(np.uint8)
        factors = random.integers(1 - limit, limit, (8, 2, 4)).astype(np.int16)
        words = np.zeros(2, np.uint64)

        loop(numbers, (32 * records).astype(np.uint16), tables.ravel(), factors.repeat(2), words)

        sums = tables[:, :, numbers[16:]].sum(-1, dtype=np.int64)
        errors = (sums[records] * np.swapaxes(factors, 1, 2).reshape(32, 2)).sum(-1)
        assert words.tolist() == [errors[:12].argmin(), errors[16:24].argmin()]


@pytest.mark.parametrize(
    ("triple", "feature", "instruction"),
    [
        ("x86_64-unknown-linux-gnu", "ssse3", "pshufb"),
        ("aarch64-unknown-linux-gnu", "neon", "tbl"),
        ("arm64-apple-darwin22.0.0", "neon", "tbl"),
    ],
)
def test_processors_look_up_bytes_with_one_instruction(
    triple: str, feature: str, instruction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    monkeypatch.setattr(llvm, "get_process_triple", lambda: triple)
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {feature: True})
    module = ir.Module()
    word: Any = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(word, [word, word]), "f")
    build = ir.IRBuilder(function.append_basic_block())
    build.ret(lanes.looked_up_fields(build, *function.args))

    machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, features=f"+{feature}")

    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    assert instruction in assembly

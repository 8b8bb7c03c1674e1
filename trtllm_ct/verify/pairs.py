"""One weight on both sides: compared in chunks of rows, so that memory does not grow with its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any

from trtllm_ct.verify.comparison import Comparison, compare_native, compare_rounded, equal_bits, equal_elements
from trtllm_ct.verify.requantized import compare_rounded_codes
from trtllm_ct.verify.source.coded import Coded
from trtllm_ct.verify.source.numbers import to_numbers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.engine.requantization import Form
    from trtllm_ct.verify.native import NativeWeight

__all__ = ["Pair", "Span", "native_pair", "plain_pair", "rounded_pair", "spans"]

Rows = Callable[[int, int], "NDArray[np.float64]"]
Span = tuple[int, int]

# Bytes that are decoded at once: they stay in the cache of a core from one step to the next.
_CHUNK_BYTES = 1 << 19
_FLOAT64_BYTES = 8
# Elements that one thread compares before the next one is chosen.
_SPAN = 1 << 22
# A delivered layout may have scales for blocks of so many rows, and pairs of rows in one byte.
_BLOCK_ROWS = 128
_PAIR_ROWS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A tensor on both sides. `compare` compares rows `begin` to `end`; `block` rows belong together.

    An element has `itemsize` bytes when it is compared.
    """

    shape: tuple[int, ...]
    compare: Callable[[int, int], Comparison]
    block: int = 1
    itemsize: int = _FLOAT64_BYTES

    @property
    def rows(self) -> int:
        """The length of the first axis, 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def chunk(self) -> int:
        """The rows that are compared at once; all of them for a scalar or a vector."""
        if len(self.shape) < 2:
            return max(1, self.rows)
        fitting = max(_PAIR_ROWS, _CHUNK_BYTES // max(1, self.itemsize * prod(self.shape[1:])))
        whole = fitting // _BLOCK_ROWS * _BLOCK_ROWS if fitting >= _BLOCK_ROWS else 1 << (fitting.bit_length() - 1)
        return -(-whole // self.block) * self.block

    def over(self, span: Span) -> Comparison:
        """Return the comparison of the rows of a span, chunk by chunk."""
        begin, end = span
        starts = range(begin, end, self.chunk) if end > begin else (begin,)
        parts = [self.compare(start, min(start + self.chunk, end)).below(start) for start in starts]
        return reduce(Comparison.joined, parts)


def spans(pair: Pair) -> Iterator[Span]:
    """Yield ranges of rows that cover a pair; each is the work of one thread for some milliseconds."""
    chunks = max(1, _SPAN // max(1, pair.chunk * prod(pair.shape[1:])))
    step = pair.chunk * chunks
    for begin in range(0, max(1, pair.rows), step):
        yield begin, min(begin + step, pair.rows)


def native_pair(delivered: NativeWeight, source: Callable[[int, int], Coded] | Rows, block: int) -> Pair:
    """Return the pair of a weight that is quantized on both sides; `source` returns its rows, coded or in float64.

    Rows with the same codes and scales are equal. Only others are multiplied, and their values compared.
    """

    def compare(begin: int, end: int) -> Comparison:
        got, want = delivered.coded(begin, end), source(begin, end)
        factors, exact = delivered.column_factors, False
        if isinstance(want, Coded):
            if factors is None and got.equals(want):
                return equal_elements(got.first(), got.codes.shape)
            exact = factors is None and want.is_exact_in_float32
            want = want.values()
        numbers = got.values() if factors is None else got.values() * factors
        return compare_native(numbers, want, exact=exact)

    return Pair(shape=delivered.shape, compare=compare, block=block, itemsize=1)


def rounded_pair(delivered: NativeWeight, source: Callable[[int, int], Coded] | Rows, block: int, form: Form) -> Pair:
    """Return the pair of a weight that was rounded to a form on request; see `native_pair`."""

    def compare(begin: int, end: int) -> Comparison:
        want = source(begin, end)
        exact = want.values() if isinstance(want, Coded) else want
        return compare_rounded_codes(delivered.coded(begin, end), exact, form.element)

    return Pair(shape=delivered.shape, compare=compare, block=block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor as it is stored: its dtype, its shape, and its rows as bits."""

    dtype: DType
    shape: tuple[int, ...]
    rows: Callable[[int, int], NDArray[Any]]

    def numbers(self, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows in float64."""
        return to_numbers(self.rows(begin, end), self.dtype)


def plain_pair(delivered: Stored, source: Stored | Rows, *, uncertainty: float = 0.0, block: int = 1) -> Pair:
    """Return the pair of an unquantized tensor; `source` is as it is stored, or it computes the exact rows."""

    def compare(begin: int, end: int) -> Comparison:
        got = delivered.rows(begin, end)
        exact = source
        if isinstance(exact, Stored):
            if exact.dtype is delivered.dtype:
                stored = exact.rows(begin, end)
                equal = equal_bits(got, stored.reshape(got.shape), delivered.dtype)
                if equal is not None:
                    return equal
            want = exact.numbers(begin, end)
        else:
            want = exact(begin, end)
        numbers = to_numbers(got, delivered.dtype)
        return compare_rounded(numbers, want.reshape(numbers.shape), delivered.dtype, uncertainty=uncertainty)

    copied = isinstance(source, Stored) and source.dtype is delivered.dtype
    itemsize = delivered.dtype.itemsize if copied else _FLOAT64_BYTES
    return Pair(shape=delivered.shape, compare=compare, block=block, itemsize=itemsize)

"""Ranges of rows that threads compare: each row once, and never a part of a block."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import hypothesis.strategies as st
from hypothesis import given

from trtllm_ct.verify.pairs import Pair, spans

if TYPE_CHECKING:
    from trtllm_ct.verify.comparison import Comparison


def never(begin: int, end: int) -> Comparison:
    raise AssertionError("nothing is compared here")


@given(
    rows=st.integers(0, 200_000), columns=st.sampled_from([1, 64, 4096, 70_000]), block=st.sampled_from([1, 48, 128])
)
def test_spans_follow_each_other_and_begin_with_a_block(rows: int, columns: int, block: int) -> None:
    pair = Pair(shape=(rows, columns), compare=never, block=block)

    ranges = list(spans(pair))

    assert ranges[0][0] == 0
    assert ranges[-1][1] == rows
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        assert begin == end
    assert all(begin % pair.chunk == 0 and begin % block == 0 for begin, _ in ranges)

from __future__ import annotations

import math
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import arrays, on_tensors
from torch import Tensor

from trtllm_ct.layouts import folds
from trtllm_ct.layouts.folds import Fold

fold = on_tensors(folds.fold)

HADAMARD = torch.tensor([[1, 1], [1, -1]])


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_fold(weight: Tensor, factor: Tensor, axis: int, *, normalized: bool) -> Tensor:
    """Slow reference: build the block-diagonal factor for the whole axis, and compute each sum by itself."""
    size = len(factor)
    whole = torch.zeros(weight.shape[axis], weight.shape[axis], dtype=torch.float64)
    for i in range(len(whole)):
        for j in range(len(whole)):
            if i // size == j // size:
                whole[i, j] = factor[i % size, j % size] / (math.sqrt(size) if normalized else 1)
    result = torch.zeros_like(weight)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            if axis == 1:
                result[n, k] = sum(weight[n, i] * whole[i, k] for i in range(weight.shape[1]))
            else:
                result[n, k] = sum(whole[n, i] * weight[i, k] for i in range(weight.shape[0]))
    return result


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(1, 3),
    size=st.integers(1, 4),
    other_length=st.integers(1, 5),
    axis=st.sampled_from([0, 1]),
    normalized=st.booleans(),
    tile=st.sampled_from([1, 7, 1 << 22]),
    seed=st.integers(0, 2**31),
)
def test_folding_equals_the_slow_reference(
    blocks: int, size: int, other_length: int, axis: Literal[0, 1], normalized: bool, tile: int, seed: int
) -> None:
    """Blocks of any size along either axis, with any tile size."""
    shape = (other_length, blocks * size) if axis == 1 else (blocks * size, other_length)
    weight, factor = random_matrix(*shape, seed=seed), random_matrix(size, size, seed=seed + 1)
    want = slow_fold(weight, factor, axis, normalized=normalized)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "_TILE_ELEMENTS", tile)
        fold(weight, factor, axis, normalized=normalized)

    torch.testing.assert_close(weight, want, atol=1e-12, rtol=1e-12)


def test_a_hadamard_matrix_and_its_transpose_cancel_exactly() -> None:
    """Sums of dyadic numbers and the division by sqrt(16) = 4 are exact, so that nothing is rounded."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    codes = torch.randint(-8, 8, (3, 16), generator=torch.Generator().manual_seed(0)) * 0.0078125
    weight = codes.double()

    fold(weight, hadamard, 1, normalized=True)
    assert not torch.equal(weight, codes.double())
    fold(weight, hadamard.T, 1, normalized=True)

    assert torch.equal(weight, codes.double())


@pytest.mark.parametrize(
    ("transposed", "permutation", "want"),
    [
        (False, None, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        (True, None, [[1, 4, 7], [2, 5, 8], [3, 6, 9]]),
        # Rows and columns 2, 0, 1 of the stored matrix.
        (False, [2, 0, 1], [[9, 7, 8], [3, 1, 2], [6, 4, 5]]),
        (True, [2, 0, 1], [[9, 3, 6], [7, 1, 4], [8, 2, 5]]),
    ],
)
def test_a_permutation_reorders_rows_and_columns_before_the_matrix_is_transposed(
    transposed: bool, permutation: list[int] | None, want: list[list[int]]
) -> None:
    stored = {"R.weight": torch.arange(1.0, 10).reshape(3, 3).bfloat16()}
    if permutation is not None:
        stored["R.perm"] = torch.tensor(permutation)
    name = "R.perm" if permutation is not None else None
    fold_ = Fold(matrix="R.weight", permutation=name, axis=1, transposed=transposed, normalized=False)

    factor = fold_.factor(arrays(stored))

    assert factor.dtype == "f8"
    assert factor.tolist() == want
    assert fold_.sources == (("R.weight",) if permutation is None else ("R.weight", "R.perm"))


def test_weights_with_one_element_or_no_rows() -> None:
    single, empty = torch.tensor([[3.0]], dtype=torch.float64), torch.empty(0, 2, dtype=torch.float64)
    fold(single, torch.tensor([[-1.0]], dtype=torch.float64), 0, normalized=True)
    fold(empty, HADAMARD.double(), 1, normalized=True)
    assert single.tolist() == [[-3.0]]
    assert empty.shape == (0, 2)

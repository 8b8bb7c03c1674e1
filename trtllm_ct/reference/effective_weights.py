"""Transforms that run beside a Linear, by running them: what weight and bias does the whole amount to?

The planner folds matrices into weights. This is the other way to the same numbers: unit vectors go in, pass the
transforms and the Linear in the order in which the library's hooks run, and what comes out are the columns of the
weight that would do it alone. Source: compressed-tensors 0.20 `transform/factory/base.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from trtllm_ct.config.quantization_config import Transform

__all__ = ["effective_bias", "effective_table", "effective_weight"]

_CHUNK = 256


def effective_weight(weight: Tensor, transforms: Sequence[Transform], stored: Mapping[str, Tensor]) -> Tensor:
    """The weight [N, K] of the plain Linear that equals this one with its transforms, in float64.

    `stored` holds their tensors by local name. Memory: the result and 256 vectors.
    """
    columns = weight.shape[1]
    # Hooks on an input are prepended: the last one that is registered runs first.
    before = [_matrix(each, stored) for each in reversed(transforms) if each.location == "input"]
    after = [_matrix(each, stored) for each in transforms if each.location == "output"]
    result = torch.empty_like(weight, dtype=torch.float64)
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        x = torch.zeros(stop - start, columns, dtype=torch.float64)
        x[:, start:stop].fill_diagonal_(1)
        y = _through(_through(x, before) @ weight.double().T, after)
        result[:, start:stop] = y.T
    return result


def effective_bias(bias: Tensor, transforms: Sequence[Transform], stored: Mapping[str, Tensor]) -> Tensor:
    """The bias [N] of that Linear: what comes out when zero goes in."""
    after = [_matrix(each, stored) for each in transforms if each.location == "output"]
    return _through(bias.double()[None], after)[0]


def effective_table(table: Tensor, transforms: Sequence[Transform], stored: Mapping[str, Tensor]) -> Tensor:
    """The table [V, H] of the plain embedding that equals this one with the transforms of its output."""
    return _through(table.double(), [_matrix(each, stored) for each in transforms])


def _matrix(transform: Transform, stored: Mapping[str, Tensor]) -> Tensor:
    """The matrix that vectors are multiplied with from the right."""
    matrix = stored[f"{transform.module}.weight"].double()
    if transform.type == "random-matrix":
        return matrix
    if transform.randomize:
        order = stored[f"{transform.module}.perm"]
        matrix = matrix.index_select(0, order).index_select(1, order)
    matrix = matrix / math.sqrt(len(matrix))
    return matrix.T if transform.inverse else matrix


def _through(vectors: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Vectors [M, n] multiplied with each matrix in turn, block by block where a matrix is smaller."""
    for matrix in matrices:
        vectors = (vectors.reshape(len(vectors), -1, len(matrix)) @ matrix).reshape(vectors.shape)
    return vectors

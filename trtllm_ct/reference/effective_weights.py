"""Compute the weight and bias that a Linear has together with its online transforms.

The planner folds transform matrices into weights. This module gets the same numbers in another way, by running the
transforms. Unit vectors pass through the transforms and the Linear in the order in which the library's hooks run. The
outputs are the columns of the effective weight: a plain Linear with this weight computes the same without transforms.
Source: compressed-tensors 0.20 `transform/factory/base.py`.
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

_VECTORS_PER_CHUNK = 256


def effective_weight(weight: Tensor, transforms: Sequence[Transform], stored: Mapping[str, Tensor]) -> Tensor:
    """The weight [N, K], in float64, of the plain Linear that equals this Linear with its transforms.

    `stored` holds the tensors of the transforms by local name. Memory: the result and 256 vectors.
    """
    columns = weight.shape[1]
    # Input hooks are prepended when they are registered: the hook that is registered last runs first.
    before = [_matrix(transform, stored) for transform in reversed(transforms) if transform.location == "input"]
    after = [_matrix(transform, stored) for transform in transforms if transform.location == "output"]
    result = torch.empty_like(weight, dtype=torch.float64)
    for start in range(0, columns, _VECTORS_PER_CHUNK):
        stop = min(start + _VECTORS_PER_CHUNK, columns)
        unit_vectors = torch.zeros(stop - start, columns, dtype=torch.float64)
        unit_vectors[:, start:stop].fill_diagonal_(1)
        outputs = _apply(_apply(unit_vectors, before) @ weight.double().T, after)
        result[:, start:stop] = outputs.T
    return result


def effective_bias(bias: Tensor, transforms: Sequence[Transform], stored: Mapping[str, Tensor]) -> Tensor:
    """The bias [N], in float64, of the plain Linear that equals this Linear with its transforms: its output for zero.

    `stored` holds the tensors of the transforms by local name.
    """
    after = [_matrix(transform, stored) for transform in transforms if transform.location == "output"]
    return _apply(bias.double()[None], after)[0]


def effective_table(table: Tensor, transforms: Sequence[Transform], stored: Mapping[str, Tensor]) -> Tensor:
    """The table [V, H], in float64, of the plain embedding that equals this embedding with its output transforms."""
    return _apply(table.double(), [_matrix(transform, stored) for transform in transforms])


def _matrix(transform: Transform, stored: Mapping[str, Tensor]) -> Tensor:
    """The float64 matrix M of a transform: it maps a row vector v to v @ M."""
    matrix = stored[f"{transform.module}.weight"].double()
    if transform.type == "random-matrix":
        return matrix
    if transform.randomize:
        order = stored[f"{transform.module}.perm"]
        matrix = matrix.index_select(0, order).index_select(1, order)
    matrix = matrix / math.sqrt(len(matrix))
    return matrix.T if transform.inverse else matrix


def _apply(vectors: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply vectors [M, n] with each matrix in turn; a matrix smaller than n multiplies block by block."""
    for matrix in matrices:
        vectors = (vectors.reshape(len(vectors), -1, len(matrix)) @ matrix).reshape(vectors.shape)
    return vectors

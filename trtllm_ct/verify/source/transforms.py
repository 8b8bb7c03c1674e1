"""Online transforms of a source, applied to the weights beside them.

A Linear whose input passes through M computes x M W^T, so it equals a plain Linear with the weight W M^T. One whose
output passes through A computes x W^T A, so its weight is A^T W and its bias b A. A matrix that is smaller than the
vector is applied block by block. The hook of an input that was registered last runs first; those of outputs run in
their order. A Hadamard matrix H is stored without its factor, and its inverse is its transpose.
Source: compressed-tensors 0.20 `transform/factory/{base,hadamard,matrix_multiply}.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from trtllm_ct.config.match import matches
from trtllm_ct.verify.source.names import OTHER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.verify.source.files import SourceTensor
    from trtllm_ct.verify.source.modules import Module, Modules

__all__ = ["Rotation", "rotation_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The matrices that a module's input, output and table rows pass through, each list next to the weight first."""

    inputs: tuple[NDArray[np.float64], ...] = ()
    outputs: tuple[NDArray[np.float64], ...] = ()
    rows: tuple[NDArray[np.float64], ...] = ()

    @property
    def block(self) -> int:
        """The number of rows of the weight that belong together."""
        return max((len(matrix) for matrix in self.outputs), default=1)

    def weight(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return rows of the weight of the plain module; `weight` has whole blocks of rows."""
        for matrix in self.inputs:
            weight = _applied(weight, matrix.T)
        for matrix in self.outputs:
            weight = _applied(weight.T, matrix).T
        for matrix in self.rows:
            weight = _applied(weight, matrix)
        return weight

    def bias(self, bias: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the bias of the plain module."""
        for matrix in self.outputs:
            bias = _applied(bias[None], matrix)[0]
        return bias


def rotation_of(module: Module, shape: tuple[int, int], transforms: Iterable[Transform], modules: Modules) -> Rotation:
    """Return the transforms of a module of the text model, whose weight has `shape`."""
    if module.key.startswith(OTHER):
        return Rotation()
    table = module.key == "embed_tokens"
    class_name = "Embedding" if table else "Linear"
    sides: dict[str, list[NDArray[np.float64]]] = {"input": [], "output": []}
    names = modules.names.variants(module.name, module.key)
    for transform in transforms:
        if transform.location in sides and _targets(transform, names, class_name):
            length = shape[0 if transform.location == "output" and not table else 1]
            sides[transform.location].append(_matrix(transform, module, transform.head_dim or length, modules))
    if table:
        return Rotation(rows=tuple(sides["output"]))
    return Rotation(inputs=tuple(sides["input"]), outputs=tuple(sides["output"]))


def _targets(transform: Transform, names: Iterable[str], class_name: str) -> bool:
    """Whether a transform is applied to a module with these names."""
    names = tuple(names)

    def named_by(entries: Iterable[str]) -> bool:
        return any(matches(name, entry, (class_name,)) for name in names for entry in entries)

    return named_by(transform.targets) and not named_by(transform.ignore)


def _matrix(transform: Transform, module: Module, size: int, modules: Modules) -> NDArray[np.float64]:
    """Return the matrix that vectors are multiplied with; it may be stored at another module that shares it."""
    matrices = modules.matrices
    stored: Mapping[str, SourceTensor] = matrices.get((module.name, transform.module)) or next(
        tensors
        for (_, leaf), tensors in matrices.items()
        if leaf == transform.module and tensors["weight"].shape[0] == size
    )
    matrix = stored["weight"].all_numbers()
    if not transform.hadamard:
        return matrix
    if transform.permuted:
        order = stored["perm"].whole()
        matrix = matrix[order][:, order]
    matrix = matrix / sqrt(len(matrix))
    return matrix.T if transform.inverse else matrix


def _applied(vectors: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return row vectors times a matrix, block by block."""
    blocks = vectors.reshape(len(vectors), -1, len(matrix)) @ matrix
    result: NDArray[np.float64] = blocks.reshape(vectors.shape)
    return result

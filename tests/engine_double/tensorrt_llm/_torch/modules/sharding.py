"""Imitates the tensor-parallel part of `_torch/modules/linear.py`: which slice of a tensor a rank takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorrt_llm._double import RELEASE

from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    import torch
    from tensorrt_llm._torch.modules.linear import Linear
    from torch import Tensor

__all__ = ["TensorParallelMode", "bounds", "copy_weight", "cut_shard", "load_weight_shard"]


class TensorParallelMode(StrEnum):
    """Which dimension of a weight [N, K] is cut."""

    COLUMN = "column"
    ROW = "row"

    @classmethod
    def split_dim(cls, mode: TensorParallelMode) -> int:
        return 1 if mode == cls.ROW else 0

    @classmethod
    def flip(cls, mode: TensorParallelMode) -> TensorParallelMode:
        return cls.ROW if mode == cls.COLUMN else cls.COLUMN


def copy_weight(dst: Tensor, src: Tensor) -> None:
    """Cast silently, then broadcast whatever can be broadcast."""
    dst.data.copy_(src.to(dst.dtype))


def bounds(features: int, alignment: int, size: int, rank: int) -> tuple[int, int]:
    """Whole blocks of `alignment`, distributed as evenly as possible (newest releases)."""
    assert features % alignment == 0, f"{features} features must be divisible by the alignment {alignment}"
    each, more = divmod(features // alignment, size)
    first = rank * each + min(rank, more)
    return first * alignment, (first + each + (rank < more)) * alignment


def load_weight_shard(
    weight: Tensor,
    tensor_parallel_size: int = 1,
    tensor_parallel_rank: int = 0,
    tensor_parallel_mode: TensorParallelMode | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Ceiling division of the tensor's own width; not along a dimension of 1, nor 1-D tensors in row mode."""
    weight = weight.to(device)
    if not _is_cut(weight, tensor_parallel_size, tensor_parallel_mode):
        return weight
    assert tensor_parallel_mode is not None
    dim = TensorParallelMode.split_dim(tensor_parallel_mode)
    width = -(-weight.shape[dim] // tensor_parallel_size)
    first = tensor_parallel_rank * width
    return weight.narrow(dim, min(first, weight.shape[dim]), max(min(width, weight.shape[dim] - first), 0))


def cut_shard(module: Linear, weight: Tensor, spans: tuple[int, int], mode: TensorParallelMode | None = None) -> Tensor:
    """Return this rank's slice of a tensor in which one element covers `spans` (rows, columns) of the weight.

    A Linear that allocates at once has `tp_sharding` in the newest releases, and is sliced at the method's alignment.
    All others are sliced by the tensor's own width, whatever its elements cover: fused Linears, and every Linear of a
    decoder, because `_torch/models/modeling_auto.py` sets `skip_create_weights_in_init`.
    """
    mode = mode or module.tp_mode
    size, rank = module.tp_size, module.tp_rank
    if not RELEASE.spread_shards:
        return load_weight_shard(weight, size, rank, mode)
    if not _is_cut(weight, size, mode):
        return weight
    assert mode is not None
    dim = TensorParallelMode.split_dim(mode)
    if module.tp_sharding is None:
        first, last = bounds(weight.shape[dim], 1, size, rank)
    else:
        first, last = module.tp_sharding[0] // spans[dim], -(-module.tp_sharding[1] // spans[dim])
    return weight.narrow(dim, first, last - first)


def _is_cut(weight: Tensor, size: int, mode: TensorParallelMode | None) -> bool:
    """Whether a tensor has a dimension of more than one element that is cut."""
    if mode is None or size <= 1:
        return False
    dim = TensorParallelMode.split_dim(mode)
    return dim < weight.dim() and weight.shape[dim] != 1

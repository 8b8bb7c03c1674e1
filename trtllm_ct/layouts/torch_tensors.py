"""Tensors of torch from arrays, and arrays from tensors, over the same memory.

This is for code that hands tensors to users of torch: the loader, the plug-in, the reference engine and the functions
of sparse files. Everything else works on arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.stored_array import StoredArray, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["array_of", "is_tensor", "tensor_of", "tensors_of"]


def tensor_of(array: StoredArray) -> Tensor:
    """Return a tensor of the same dtype and shape, on the CPU; it shares the memory of an array of several elements."""
    import torch

    dtype, flat = array.dtype.torch_dtype, array.elements.reshape(-1)
    if not flat.size:
        return torch.empty(array.shape, dtype=dtype)
    # numpy gives any stride to an axis of length 1, and torch can view only some of these as another dtype.
    tensor: Tensor = torch.from_numpy(flat if flat.size > 1 else flat.copy())
    return tensor.view(dtype).view(array.shape)


def tensors_of(arrays: Mapping[str, StoredArray]) -> dict[str, Tensor]:
    """Return a tensor for each array, see `tensor_of`."""
    return {name: tensor_of(array) for name, array in arrays.items()}


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor of torch."""
    import torch

    return isinstance(value, torch.Tensor)


def array_of(tensor: Tensor) -> StoredArray:
    """Return the elements of a tensor; they are copied only if they are not contiguous, or not in CPU memory.

    Raises `KeyError` for a dtype that safetensors does not have.
    """
    import torch

    dtype = DType.from_torch(tensor.dtype)
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.stride() != (1,):  # An axis of one element may have any stride.
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    data: NDArray[Any] = flat.view(torch.uint8).numpy()
    return StoredArray(data.view(numpy_dtype(dtype)).reshape(tuple(tensor.shape)), dtype)

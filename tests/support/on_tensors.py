"""The functions of `layouts/` and `formats/` as functions of torch tensors, so that tests can compare them with torch.

`tensor_module(packing).pack_codes(codes, ...)` passes the elements of tensors and makes a tensor of the result. Dtypes
of torch stand for those of the package. An argument that is returned itself is returned itself here too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.checkpoint import reader, writer
from trtllm_ct.formats import base, codecs
from trtllm_ct.formats.sparse import bitmask, bitmask_24, pieces
from trtllm_ct.layouts import scales
from trtllm_ct.layouts.stored_array import StoredArray
from trtllm_ct.layouts.torch_tensors import array_of, tensor_of
from trtllm_ct.pipeline import stacking, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    from trtllm_ct.base.schemes import Element, Packing, QuantArgs
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.checkpoint.write_plan import StackPart
    from trtllm_ct.formats.base import StoredWeight, WeightFormat
    from trtllm_ct.formats.sparse.base import SparseTensor
    from trtllm_ct.plan.ops import Operation
    from trtllm_ct.plan.plan import ModulePlan, Plan
    from trtllm_ct.plan.stored import View

__all__ = [
    "LIBRARY",
    "NATIVE",
    "SPARSE_24_BITMASK",
    "SPARSE_BITMASK",
    "Codes",
    "Scaling",
    "ShardedWriter",
    "TensorReader",
    "TensorWriter",
    "arrays",
    "decode",
    "encode",
    "on_tensors",
    "restore",
    "run",
    "stack_experts",
    "stream_delivered",
    "tensor_module",
    "tensors",
    "view_of",
]


def arrays(stored: Mapping[str, Tensor | StoredArray]) -> dict[str, StoredArray]:
    """The elements of tensors by name."""
    return {name: array_of(tensor) if isinstance(tensor, Tensor) else tensor for name, tensor in stored.items()}


def tensors(stored: Mapping[str, StoredArray]) -> dict[str, Tensor]:
    """Tensors by name."""
    return {name: tensor_of(array) for name, array in stored.items()}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """`layouts.scales.Scaling` with tensors."""

    scale: Tensor
    zero_point: Tensor | None = None
    group_columns: int | None = None
    block_rows: int = 1
    group_index: Tensor | None = None
    divisor: Tensor | None = None

    @classmethod
    def of(cls, scaling: scales.Scaling) -> Scaling:
        """The same scaling with tensors."""
        zero_point, index = scaling.zero_point, scaling.group_index
        return cls(
            scale=tensor_of(scaling.scale),
            zero_point=None if zero_point is None else torch.from_numpy(zero_point),
            group_columns=scaling.group_columns,
            block_rows=scaling.block_rows,
            group_index=None if index is None else torch.from_numpy(index),
            divisor=None if scaling.divisor == 1 else torch.tensor([scaling.divisor]),
        )

    @property
    def arrays(self) -> scales.Scaling:
        """The same with arrays."""
        return scales.Scaling(
            scale=array_of(self.scale),
            zero_point=None if self.zero_point is None else array_of(self.zero_point).elements,
            group_columns=self.group_columns,
            block_rows=self.block_rows,
            group_index=None if self.group_index is None else array_of(self.group_index).elements,
            divisor=1.0 if self.divisor is None else float(self.divisor),
        )


@dataclass(frozen=True, kw_only=True)
class Codes:
    """`formats.base.Codes` with tensors; the divisor is one float32 element."""

    values: Tensor
    packing: Packing | None
    shape: tuple[int, int]
    scale: Tensor
    element: Element = base.Codes.__dataclass_fields__["element"].default
    zero_point: Tensor | None = None
    zero_point_packing: Packing | None = None
    divisor: Tensor | None = None
    group_index: Tensor | None = None

    @classmethod
    def of(cls, codes: base.Codes) -> Codes:
        """The same codes with tensors."""
        values = {field.name: getattr(codes, field.name) for field in fields(codes)}
        made = {name: tensor_of(value) if isinstance(value, StoredArray) else value for name, value in values.items()}
        if codes.divisor is not None:
            made["divisor"] = torch.tensor([codes.divisor])
        return cls(**made)

    @property
    def arrays(self) -> base.Codes:
        """The same codes with arrays."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        made = {name: array_of(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if self.divisor is not None:
            made["divisor"] = float(self.divisor)
        return base.Codes(**made)

    @property
    def plain_zero_point(self) -> Tensor | None:
        """The zero point as int8 (rows, groups)."""
        plain = self.arrays.plain_zero_point
        return None if plain is None else torch.from_numpy(plain)


def decode(weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
    """The codes that the format of a weight decodes from its stored tensors."""
    return Codes.of(weight.format.decode(weight, arrays(stored)))


def encode(entry: WeightFormat, codes: Codes | base.Codes, args: QuantArgs) -> dict[str, Tensor]:
    """The tensors that a format stores for codes."""
    return tensors(entry.encode(codes.arrays if isinstance(codes, Codes) else codes, args))


def on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays as a function of tensors."""
    signature = inspect.signature(function)

    @wraps(function)
    def run(*positional: Any, **named: Any) -> Any:
        bound = signature.bind(*positional, **named)
        given: list[tuple[Any, Tensor]] = []
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor):
                made = _argument(value, str(signature.parameters[name].annotation))
                given.append((made, value))
                bound.arguments[name] = made
            elif isinstance(value, torch.dtype):
                bound.arguments[name] = DType.from_torch(value)
            elif isinstance(value, Scaling):
                bound.arguments[name] = value.arrays
        return _result(function(*bound.args, **bound.kwargs), given)

    return run


def _argument(tensor: Tensor, annotation: str) -> Any:
    """A tensor as the parameter wants it: with its dtype, as bits, or as numbers."""
    array = StoredArray(_strided(tensor), DType.from_torch(tensor.dtype))
    if "StoredArray" in annotation:
        return array
    is_number = tensor.is_floating_point() and "uint8" not in annotation
    return array.numbers if is_number else array.elements.view(bool) if tensor.dtype == torch.bool else array.elements


def _strided(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The elements with the strides of the tensor."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    wanted = array_of(torch.empty(0, dtype=tensor.dtype)).elements.dtype
    return tensor.detach().view(integers).numpy().view(wanted)


def _result(result: Any, given: list[tuple[Any, Tensor]]) -> Any:
    for made, tensor in given:
        if made is result:
            return tensor
    if isinstance(result, StoredArray):
        return tensor_of(result)
    if isinstance(result, np.ndarray | np.generic):
        made = torch.from_numpy(np.asarray(result).reshape(-1))
        return made.view(np.shape(result))
    if isinstance(result, tuple):
        return tuple(_result(part, given) for part in result)
    return result


class _TensorModule:
    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return on_tensors(value) if inspect.isfunction(value) else value


def tensor_module(module: ModuleType) -> Any:
    """A module whose functions take and return tensors."""
    return _TensorModule(module)


class _OnTensors:
    """A format, a sparse format or a codec whose methods take and return tensors."""

    def __init__(self, entry: Any) -> None:
        self.entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self.entry, name)


class _SparseFormat(_OnTensors):
    def holds(self, dense: Tensor) -> bool:
        holds: bool = self.entry.holds(array_of(dense))
        return holds

    def encode(self, dense: Tensor) -> dict[str, Tensor]:
        return tensors(self.entry.encode(array_of(dense)))

    def decode(self, sparse: SparseTensor, stored: Mapping[str, Tensor]) -> Tensor:
        return tensor_of(self.entry.decode(sparse, arrays(stored)))


class _Codec(_OnTensors):
    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        return Codes.of(self.entry.decode(weight, arrays(stored)))

    def dequantize(self, weight: StoredWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensor_of(self.entry.dequantize(weight, arrays(stored), DType.from_torch(dtype)))


def restore(sparse: SparseTensor, stored: Mapping[str, Tensor]) -> Tensor:
    """The dense tensor of these pieces."""
    return tensor_of(pieces.restore(sparse, arrays(stored)))


SPARSE_BITMASK, SPARSE_24_BITMASK = map(_SparseFormat, (bitmask.SPARSE_BITMASK, bitmask_24.SPARSE_24_BITMASK))
NATIVE, LIBRARY = map(_Codec, (codecs.NATIVE, codecs.LIBRARY))


def run(operation: Operation, name: str, module: Any) -> Tensor:
    """The tensor that an operation delivers."""
    return tensor_of(operation.run(name, module))


def view_of(view: View, stored: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a view makes of stored ones."""
    return tensor_of(view.of(arrays(stored)))


def stream_delivered(plan: Plan, catalog: Catalog, **options: Any) -> Iterator[tuple[ModulePlan, dict[str, Tensor]]]:
    """Each module with the tensors that are delivered for it."""
    for module, delivered in stream.stream_delivered(plan, catalog, **options):
        yield module, tensors(delivered)


def stack_experts(weights: dict[str, Tensor], stacks: Mapping[str, StackPart]) -> None:
    """Replace experts by stacks, in place."""
    stacked = arrays(weights)
    stacking.stack_experts(stacked, stacks)
    kept = {name: weights[name] if name in weights else tensor_of(array) for name, array in stacked.items()}
    weights.clear()
    weights.update(kept)


class TensorReader(reader.TensorReader):
    """Reads tensors of torch."""

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Any:
        """The tensor `name`."""
        return tensor_of(super().read(name, begin, end))


class TensorWriter(writer.TensorWriter):
    """Writes tensors of torch."""

    def write(self, name: str, tensor: Any, row: int | None = None) -> None:
        """Write a tensor, or some of its rows."""
        super().write(name, _stored(tensor), row)


class ShardedWriter(writer.ShardedWriter):
    """Writes tensors of torch into shards."""

    def write(self, name: str, tensor: Any, row: int | None = None) -> None:
        """Write a tensor, or some of its rows."""
        super().write(name, _stored(tensor), row)


def _stored(tensor: Tensor | StoredArray) -> StoredArray:
    if isinstance(tensor, StoredArray):
        return tensor
    return StoredArray(_strided(tensor), DType.from_torch(tensor.dtype)) if tensor.numel() else array_of(tensor)

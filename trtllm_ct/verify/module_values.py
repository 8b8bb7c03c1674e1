"""The values, the bytes and the scheme of one module of a directory, whatever it is stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.verify.native import NativeWeight
from trtllm_ct.verify.source.decoders import decoder_for, has_weight, plain_tensors
from trtllm_ct.verify.source.files import EveryNth, Transposed
from trtllm_ct.verify.source.numbers import to_numbers
from trtllm_ct.verify.source.sparse import SparseTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.verify.matching import DirectoryMatch
    from trtllm_ct.verify.source.files import SourceTensor
    from trtllm_ct.verify.source.modules import Module

__all__ = ["CheckpointSide", "ConvertedSide", "Values", "bytes_of", "has_values"]

_OF_LINEAR = frozenset({"bias", "k_scale", "v_scale"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A tensor of numbers: its shape, and rows of it in float64, of which `block` belong together."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], NDArray[np.float64]]
    block: int = 1


@dataclass(frozen=True, slots=True)
class CheckpointSide:
    """The modules of a checkpoint, matched with themselves."""

    match: DirectoryMatch

    def scheme(self, module: Module) -> str:
        """Return format and scheme of a module, or its dtype."""
        scheme = self.match.scheme_of(module)
        return f"{decoder_for(module.tensors)}: {scheme.label()}" if scheme else _plain(module)

    def values(self, module: Module) -> Iterator[tuple[str, Values]]:
        """Yield the weight of a module, with its transforms applied, and its other plain tensors, by local name."""
        if has_weight(module.tensors):
            exact = self.match.exact_weight(module)
            if exact is not None:
                yield "weight", Values(shape=exact.shape, rows=exact.rows, block=exact.block)
        yield from _plain_values(module)


@dataclass(frozen=True, slots=True)
class ConvertedSide:
    """The modules of a converted directory, matched with those of its source."""

    match: DirectoryMatch

    def scheme(self, module: Module) -> str:
        """Return the mode of a module, or its dtype."""
        layer = self.match.layer_of(module.key, module.name)
        if layer is None:
            return _plain(module)
        return f"{layer.quant_algo} g{layer.group_size}" if layer.group_size else str(layer.quant_algo)

    def values(self, module: Module) -> Iterator[tuple[str, Values]]:
        """Yield the weight of a module and its other plain tensors, by local name."""
        layer = self.match.layer_of(module.key, module.name)
        source = self.match.source.by_key.get(module.key)
        exact = self.match.exact_weight(source) if layer is not None and source is not None else None
        if layer is not None and exact is not None and len(exact.shape) == 2:
            yield "weight", _native(module, layer, (exact.shape[0], exact.shape[1]))
            # All others belong to the mode, and so to the weight.
            yield from ((local, values) for local, values in _plain_values(module) if local in _OF_LINEAR)
            return
        if layer is None and "weight" in module.tensors:
            yield "weight", _numbers(module, "weight")
        yield from _plain_values(module)


def _native(module: Module, layer: LayerQuantConfig, shape: tuple[int, int]) -> Values:
    """Return a weight in a native layout; raises `PlanError` for tensors that don't belong to it."""
    tensors = {local: tensor for local, tensor in module.tensors.items() if local not in _OF_LINEAR}
    tensors.pop("weight_scale_inv" if "weight_scale" in tensors else "", None)
    native = NativeWeight(name=module.name, tensors=tensors, layer=layer, shape=shape)
    native.check()

    def rows(begin: int, end: int) -> NDArray[np.float64]:
        factors, values = native.column_factors, native.coded(begin, end).values()
        return values if factors is None else values * factors

    return Values(shape=shape, rows=rows)


def has_values(module: Module) -> bool:
    """Whether a module has numbers to compare: not if it stores nothing but scales of inputs or of the KV cache."""
    return has_weight(module.tensors) or bool(plain_tensors(module.tensors))


def _plain_values(module: Module) -> Iterator[tuple[str, Values]]:
    for local in plain_tensors(module.tensors):
        yield local, _numbers(module, local)


def _numbers(module: Module, local: str) -> Values:
    dtype = module.tensors[local].dtype
    shape = module.plain_shape(local)
    return Values(shape=shape, rows=lambda begin, end: to_numbers(module.plain_rows(local, begin, end), dtype))


def _plain(module: Module) -> str:
    """Return the dtype of a plain module, by torch's name."""
    tensor = module.tensors.get("weight") or next(iter(module.tensors.values()))
    return f"plain {tensor.dtype.torch_name}"


def bytes_of(module: Module) -> int:
    """Return the stored bytes of a module: its share, where several modules are stored in one tensor."""
    return sum(_stored_bytes(tensor) // module.parts for tensor in module.tensors.values())


def _stored_bytes(tensor: SourceTensor) -> int:
    if isinstance(tensor, SparseTensor):
        return _stored_bytes(tensor.bitmask) + _stored_bytes(tensor.compressed)
    if isinstance(tensor, EveryNth):
        return _stored_bytes(tensor.matrix) // tensor.step
    return _stored_bytes(tensor.matrix) if isinstance(tensor, Transposed) else tensor.size * tensor.dtype.itemsize

"""Modules as the planner plans them, from tensors in memory: in the first mode that holds them, or dequantized."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import oracles
import torch
from builders import quantization_block
from stored_schemes import SCHEMES, Scheme, Writer, int_weights
from stored_weights import specs_of

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.engine.holdings import holdings
from trtllm_ct.layouts.packing import packed_words
from trtllm_ct.pipeline.weight_mapper import CompressedTensorsWeightMapper
from trtllm_ct.plan import deliver
from trtllm_ct.plan.assign import candidates_of
from trtllm_ct.plan.equalize import Part
from trtllm_ct.plan.models.sites import Site
from trtllm_ct.plan.plan import ModulePlan
from trtllm_ct.plan.stored import StoredModule, Whole
from trtllm_ct.plan.weights import WeightReader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["PADDED", "Planned", "delivered", "plain_module", "planned", "raw_bytes"]

Planned = tuple[ModulePlan, dict[str, "Tensor"]]
"""The plan of module `m`, and its stored tensors by full name."""

PADDED = "int3-g64-asym-padded"
"""Codes of three bits as releases up to 0.17.1 pack them, ten to a word."""

_MORE = {
    "int3-g64-asym": Scheme(weights=int_weights(3, group_size=64, symmetric=False)),
    "int8-g64-asym": Scheme(weights=int_weights(8, group_size=64, symmetric=False)),
    "int4-tensor-asym": Scheme(weights=int_weights(4, "tensor", symmetric=False)),
}
_DTYPES = deliver.Dtypes(model=DType.BF16, dequantized=DType.BF16, cast_plain=False)


@cache
def planned(name: str, shape: tuple[int, int], *, native: bool = False, bias: bool = False) -> Planned:
    """A weight of a scheme of `SCHEMES`, or of one with more zero points; dequantized too where no mode holds it."""
    tensors, scheme = _stored(name, shape)
    if bias:
        tensors["bias"] = torch.arange(shape[0], dtype=torch.bfloat16)
    site, stored = Site(module="m", class_name="Linear", shape=shape), _module(tensors)
    config = CompressedTensorsConfigReader().read(quantization_block({"group_0": scheme.group}))
    faults = FaultCollector()
    weight = WeightReader(config, faults).read(stored, site)
    assert weight is not None, faults.faults
    held = holdings(candidates_of([Part(site, stored, weight)], {})["m"].weight) if native else ()
    made = (
        deliver.native(stored, weight, held[0], _DTYPES, site) if held else deliver.dequantized(stored, weight, _DTYPES)
    )
    made += deliver.plain(stored, ["bias"] if bias else [], _DTYPES)
    plan = ModulePlan(name="m", class_name="Linear", views=stored.views, deliveries=made, weight=weight.stored)
    return plan, _by_full_name(tensors)


def plain_module(rows: int, dtype: DType = DType.F32) -> Planned:
    """A float32 weight of three columns with a bias; cast where `dtype` is float16."""
    tensors = {"weight": torch.arange(3.0 * rows).reshape(rows, 3), "bias": torch.arange(float(rows))}
    stored = _module(tensors)
    made = deliver.plain(stored, tensors, replace(_DTYPES, model=dtype, cast_plain=dtype is DType.F16))
    plan = ModulePlan(name="m", class_name="Linear", views=stored.views, deliveries=made)
    return plan, _by_full_name(tensors)


def delivered(plan: ModulePlan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a plan delivers; fails where that is not what it announces."""
    tensors = CompressedTensorsWeightMapper().map_module(plan, stored)
    for delivery in plan.deliveries:
        tensor = tensors[delivery.name]
        assert delivery.spec == TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)), delivery.name
    return tensors


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _stored(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Scheme]:
    known = SCHEMES | _MORE
    scheme = known[name.removesuffix("-padded")]
    tensors, _ = Writer(torch.bfloat16, torch.Generator().manual_seed(1)).store(scheme, shape)
    if name == PADDED:
        rows, groups = tensors["weight_scale"].shape
        for local, axis, codes in (("weight_packed", 1, shape), ("weight_zero_point", 0, (rows, groups))):
            values = oracles.unpack(tensors[local], packed_words(3, axis), codes)
            tensors[local] = oracles.pack(values, packed_words(3, axis, dense=False))
    return tensors, scheme


def _module(tensors: Mapping[str, Tensor]) -> StoredModule:
    return StoredModule("m", {local: Whole(name=f"m.{local}", spec=spec) for local, spec in specs_of(tensors).items()})


def _by_full_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"m.{local}": tensor for local, tensor in tensors.items()}

"""An FP8 KV cache, simulated where attention reads keys and values.

The simulation is an attention function of transformers, not a `Cache`: keys and values pass it in every call, after
the rotary embedding, whether or not there is a cache and whichever class of cache `generate` chooses. The cache itself
keeps the unrounded values; rounding is element by element, so rounding what comes out equals rounding what went in.
A model that is built without the simulation never sees this function.

Scales lie where ModelOpt puts them: `...k_proj.k_scale` and `...v_proj.v_scale`, multipliers of one float32 element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtllm_ct.base.dtypes import DType
from trtllm_ct.reference.activations import round_to_fp8
from trtllm_ct.reference.rules import describe, has_dtype, is_one_element

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["attach_kv_scales", "is_kv_scale", "kv_scale_names", "register_fp8_attention"]

_NAME = "trtllm_ct_fp8_kv_cache"
_SCALES = (("k_proj", "k_scale"), ("v_proj", "v_scale"))


def register_fp8_attention() -> str:
    """Make the simulation known to transformers; returns the name to ask for as `attn_implementation`.

    Its masks are those of `sdpa`, to which it hands the rounded keys and values.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _fp8_kv_attention)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    return _NAME


def is_kv_scale(name: str) -> bool:
    """Whether a tensor's full name is that of a KV-cache scale."""
    return any(name.endswith(f".{projection}.{local}") for projection, local in _SCALES)


def kv_scale_names(model: nn.Module) -> list[str]:
    """Names of all scales that the model's attention modules can have."""
    return [
        f"{module_name}.{projection}.{local}"
        for module_name, module in model.named_modules()
        if all(isinstance(getattr(module, projection, None), nn.Module) for projection, _ in _SCALES)
        for projection, local in _SCALES
    ]


def attach_kv_scales(model: nn.Module, scales: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """Register the delivered scales as buffers of their projections, under their own names.

    With no scale at all each is 1, which is what the engine assumes. Otherwise every attention module must have both.
    """
    names = kv_scale_names(model)
    for name in names:
        owner, _, local = name.rpartition(".")
        if not scales:
            model.get_submodule(owner).register_buffer(local, torch.ones(()), persistent=False)
        elif name not in scales:
            faults.add(
                where=name,
                expected="a scale for keys and one for values in every layer",
                found="none, though other layers have them",
                remedy="Deliver the KV-cache scales of all layers, or of none.",
            )
        elif _is_usable(name, scales[name], faults):
            model.get_submodule(owner).register_buffer(local, scales[name])
    for name in sorted(scales.keys() - set(names)):
        faults.add(
            where=name,
            expected="an attention module with k_proj and v_proj",
            found="no such module in this architecture",
            remedy="Check that config.json belongs to these weights.",
        )


def _is_usable(name: str, scale: Tensor, faults: FaultCollector) -> bool:
    usable = (
        has_dtype(scale, [DType.F32]) and is_one_element(scale) and bool(scale.isfinite().all() and scale.gt(0).all())
    )
    if not usable:
        faults.add(
            where=name,
            expected="one positive finite float32 element",
            found=f"{describe(scale)}" + (f" = {scale.item()}" if scale.numel() == 1 else ""),
            remedy="A KV-cache scale multiplies the float8 value; calibrate the checkpoint again.",
        )
    return usable


def _fp8_kv_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`sdpa`, with keys and values [batch, heads, tokens, head_dim] as they come back from a float8 cache."""
    from transformers import AttentionInterface

    key = round_to_fp8(key, module.get_buffer("k_proj.k_scale"))
    value = round_to_fp8(value, module.get_buffer("v_proj.v_scale"))
    attended: tuple[Tensor, Tensor | None] = AttentionInterface()["sdpa"](
        module, query, key, value, *arguments, **options
    )
    return attended

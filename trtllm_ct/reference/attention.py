"""Simulate an FP8 KV cache at the point where attention reads keys and values.

The simulation is an attention function of transformers, not a `Cache`. Keys and values pass through it in every call,
after the rotary embedding, with or without a cache and with any cache class that `generate` chooses. The cache itself
keeps the unrounded values: rounding is elementwise, so rounding on read gives the same values as rounding on write.
A model that is built without the simulation never calls this function.

Scales have the names that ModelOpt gives them: `...k_proj.k_scale` and `...v_proj.v_scale`. They are multipliers with
one float32 element.
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

__all__ = ["attach_kv_scales", "is_kv_scale", "kv_scale_names", "register_fp8_attention", "shares_keys"]

_NAME = "trtllm_ct_fp8_kv_cache"
_SCALES = (("k_proj", "k_scale"), ("v_proj", "v_scale"))


def register_fp8_attention() -> str:
    """Register the simulation with transformers; return its name, to be passed as `attn_implementation`.

    The simulation calls `sdpa` with the rounded keys and values, so it uses the masks of `sdpa` too.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _fp8_kv_attention)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    return _NAME


def is_kv_scale(name: str) -> bool:
    """Whether `name`, the full name of a tensor, is the name of a KV-cache scale."""
    return any(name.endswith(f".{projection}.{local}") for projection, local in _SCALES)


def kv_scale_names(model: nn.Module) -> list[str]:
    """The full names of all KV-cache scales that the model's attention modules can have."""
    return [
        f"{module_name}.{projection}.{local}"
        for module_name, module in model.named_modules()
        if all(isinstance(getattr(module, projection, None), nn.Module) for projection, _ in _SCALES)
        for projection, local in _SCALES
    ]


def shares_keys(model: nn.Module) -> bool:
    """Whether some attention has no keys of its own, but takes those of another layer, whose scale it lacks."""
    return any(
        isinstance(getattr(module, "q_proj", None), nn.Module) and getattr(module, "k_proj", None) is None
        for module in model.modules()
    )


def attach_kv_scales(model: nn.Module, scales: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """Register the delivered scales as buffers of their projections, under their delivered names.

    If no scale is delivered, every scale is 1, which is what the engine assumes. Otherwise every attention module must
    have both scales. Adds a fault for a missing scale, an unusable scale and a scale without an attention module.
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
    """Whether a scale is one positive finite float32 element; adds a fault if not."""
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
    """Run `sdpa` on keys and values [batch, heads, tokens, head_dim] that are rounded as by a float8 cache."""
    from transformers import AttentionInterface

    key = round_to_fp8(key, module.get_buffer("k_proj.k_scale"))
    value = round_to_fp8(value, module.get_buffer("v_proj.v_scale"))
    attended: tuple[Tensor, Tensor | None] = AttentionInterface()["sdpa"](
        module, query, key, value, *arguments, **options
    )
    return attended

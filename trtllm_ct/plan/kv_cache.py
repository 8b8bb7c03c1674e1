"""KV-cache scales: which are stored, which a target takes, and under which names.

compressed-tensors keeps them on the attention module (`self_attn.k_scale`), engines read them beside the projections
(`self_attn.k_proj.k_scale`): one float32 element each, multiplying the stored fp8 value.
Sources: compressed-tensors 0.20 `quantization/lifecycle/initialize.py`; TensorRT-LLM `_torch/modules/linear.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.plan.deliver import kv_scale
from trtllm_ct.schemes import NumberType, Strategy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.config.model import QuantizationConfig
    from trtllm_ct.errors import FaultCollector
    from trtllm_ct.plan.model import Delivery, ModulePlan
    from trtllm_ct.plan.stored import StoredModule
    from trtllm_ct.plan.target import Target

__all__ = ["check_complete", "deliveries", "is_attention", "refuse_unsupported"]

_SCALES = ("k_scale", "v_scale")
_ATTENTION_TENSORS = frozenset({"k_scale", "v_scale", "k_zero_point", "v_zero_point"})


def is_attention(module: StoredModule) -> bool:
    """Whether these are the KV-cache parameters of an attention module."""
    return module.name.endswith("self_attn") and module.specs.keys() <= _ATTENTION_TENSORS


def refuse_unsupported(config: QuantizationConfig, target: Target, faults: FaultCollector) -> None:
    """A KV-cache scheme other than fp8, symmetric, static, per tensor. A plain target drops any of them."""
    args = config.kv_cache_scheme
    if args is None or not target.kv_cache_algos:
        return
    if (args.type, args.num_bits, args.symmetric, args.dynamic) == (NumberType.FLOAT, 8, True, False) and (
        args.strategy is Strategy.TENSOR
    ):
        return
    faults.add(
        where=f"{config.origin}.kv_cache_scheme",
        expected="fp8, symmetric, static, one scale per tensor",
        found=args.label(),
        remedy="Quantize the KV cache again as fp8 per tensor, or remove kv_cache_scheme to serve a 16-bit cache.",
    )


def deliveries(
    module: StoredModule, config: QuantizationConfig, target: Target, faults: FaultCollector
) -> tuple[tuple[Delivery, ...], dict[str, str]]:
    """The KV scales of one attention module as delivered, and what is ignored with the reason."""
    if config.kv_cache_scheme is None:
        return (), dict.fromkeys(module.specs, "kv_cache_scheme is null: the KV cache is not quantized")
    if not target.kv_cache_algos:
        return (), dict.fromkeys(module.specs, f"target {target.name} leaves the KV cache alone")
    for local in _SCALES:
        spec = module.specs.get(local)
        if spec is not None and spec.numel != 1:
            faults.add(
                where=module.full_name(local),
                expected="one element",
                found=str(spec),
                remedy="Quantize the KV cache again with strategy tensor.",
            )
    found = tuple(kv_scale(module, local) for local in _SCALES if local in module.specs)
    zero_points = module.specs.keys() - set(_SCALES)
    return found, dict.fromkeys(zero_points, "the scheme is symmetric")


def check_complete(modules: Iterable[ModulePlan], layers: int, faults: FaultCollector) -> None:
    """Both scales in every layer, or a fault for each that is missing: engines would leave theirs uninitialised."""
    delivered = {delivery.name for module in modules for delivery in module.deliveries}
    for layer in range(layers):
        for letter in "kv":
            name = f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"
            if name not in delivered:
                faults.add(
                    where=f"model.layers.{layer}.self_attn.{letter}_scale",
                    expected="the scale that kv_cache_scheme promises",
                    found="no such tensor",
                    remedy="Download the checkpoint again, or remove kv_cache_scheme to serve a 16-bit cache.",
                )

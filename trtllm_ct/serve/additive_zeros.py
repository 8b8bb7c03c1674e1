"""The Linear for asymmetric int4 (W4A16_GPTQ), put into engines that have the GEMM for it and no method that uses it.

The engine's grouped int4 GEMM computes `x @ (codes * scales + zeros)`, but its AWQ method never hands it any zeros.
A class derived from that method when it is there adds one parameter, `weight_zero`: additive, in the module's dtype,
cut, joined and transposed as the scales are. It gets to Linears by the one function that chooses their methods.
Nothing here imports the engine; its module `_torch.modules.linear` is an argument.
It has not run on a GPU yet.

Sources: TensorRT-LLM `_torch/modules/linear.py` (W4A16_AWQ_LinearMethod, get_quant_method, Linear.load_shard) of late
2025 to September 2026, `_torch/custom_ops/torch_custom_ops.py` (finegrained_mixed_dtype_gemm) and its unit test, which
adds zeros to scaled codes; pull request 19442, which gives the engine a method of its own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, FaultCollector, PayloadError, PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.serve.patch_switch import NO_PATCH, patch_allowed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

__all__ = ["can_install_additive_zeros", "has_own_additive_zeros", "install_additive_zeros", "uninstall_additive_zeros"]

_BASE = "W4A16_AWQ_LinearMethod"
_METHODS = (
    "create_weights",
    "apply",
    "load_weights_vanilla",
    "load_weights_fused_qkv_linear",
    "load_weights_fused_gate_up_linear",
)
_REPORT = f"Set {NO_PATCH}=1: asymmetric int4 is dequantized then. Please report the release of TensorRT-LLM."
_GEMM = "finegrained_mixed_dtype_gemm"
_GEMM_ARGUMENTS = ("input", "weight", "scales", "group_size", "has_zero_point", "output_dtype", "bias", "zeros")
_SHARD_ARGUMENTS = ("label", "device", "name", "scale_span")

Weights = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Selection:
    """In place of the engine's `get_quant_method`: `method` for asymmetric int4, the engine's choice for all else."""

    stock: Callable[..., Any]
    method: type

    def __call__(self, quant_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if getattr(quant_config, "quant_algo", None) == QuantAlgo.W4A16_GPTQ:
            return self.method()
        return self.stock(quant_config, *args, **kwargs)


def install_additive_zeros(linear_module: Any) -> bool:
    """Give the engine a Linear method for W4A16_GPTQ; False where it has one of its own, which then serves.

    Must run in every process that builds a model, before it does; a second call changes nothing. Raises `PlanError`
    that names what the engine lacks, or the switch that forbids it.
    """
    if isinstance(linear_module.get_quant_method, _Selection):
        return True
    if has_own_additive_zeros(linear_module):
        return False
    faults = FaultCollector()
    if not patch_allowed():
        faults.add(
            where=NO_PATCH,
            expected=f"leave to give TensorRT-LLM a Linear method for {QuantAlgo.W4A16_GPTQ}, which this plan needs",
            found=f"{NO_PATCH} set",
            remedy=f"Unset {NO_PATCH}, or plan again with it set: asymmetric int4 is dequantized then.",
        )
    _find_missing_parts(linear_module, faults)
    faults.raise_if_any(PlanError)
    linear_module.get_quant_method = _Selection(
        stock=linear_module.get_quant_method, method=_method_class(linear_module)
    )
    return True


def uninstall_additive_zeros(linear_module: Any) -> None:
    """Give the engine its own choice back. Models that exist keep their methods.

    Where somebody has put another function over ours since, that one stays, and ours under it.
    """
    selection = linear_module.get_quant_method
    if isinstance(selection, _Selection):
        linear_module.get_quant_method = selection.stock


def has_own_additive_zeros(linear_module: Any) -> bool:
    """Whether the engine itself chooses a method for W4A16_GPTQ; found by asking it."""
    select = linear_module.get_quant_method
    if isinstance(select, _Selection):
        select = select.stock
    asked = linear_module.QuantConfig(
        quant_algo=linear_module.QuantAlgo.W4A16_GPTQ, group_size=128, has_zero_point=True
    )
    try:
        chosen = type(select(asked))
    except (ValueError, NotImplementedError):
        return False
    return chosen is not getattr(linear_module, _BASE, None)


def can_install_additive_zeros(linear_module: Any) -> bool:
    """Whether `install_additive_zeros` would succeed where the engine has no method of its own."""
    faults = FaultCollector()
    _find_missing_parts(linear_module, faults)
    return patch_allowed() and not faults.faults


def _find_missing_parts(linear_module: Any, faults: FaultCollector) -> None:
    """A fault for everything that the method builds on and the engine doesn't have as we know it."""
    base: Any = getattr(linear_module, _BASE, None)
    linear: Any = getattr(linear_module, "Linear", None)
    missing = [f"{_BASE}.{name}" for name in _METHODS if not callable(getattr(base, name, None))]
    if hasattr(linear, "load_shard"):
        known = inspect.signature(linear.load_shard).parameters
        missing += [f"argument {name} of Linear.load_shard" for name in _SHARD_ARGUMENTS if name not in known]
    elif not callable(getattr(linear_module, "load_weight_shard", None)):
        missing.append("Linear.load_shard or load_weight_shard")
    gemm = _gemm_arguments()
    missing += [f"argument {name} of trtllm::{_GEMM}" for name in _GEMM_ARGUMENTS if name not in gemm]
    for part in missing:
        faults.add(
            where=linear_module.__name__,
            expected=f"{part}, on which the Linear method for {QuantAlgo.W4A16_GPTQ} is built",
            found="none",
            remedy=_REPORT,
        )


def _gemm_arguments() -> frozenset[str]:
    """The names of the GEMM's arguments, none where it isn't registered."""
    import torch

    packet = getattr(torch.ops.trtllm, _GEMM, None)
    if packet is None:
        return frozenset()
    return frozenset(argument.name for argument in packet.default._schema.arguments)  # noqa: SLF001 (no other way)


def _method_class(linear_module: Any) -> type:
    """The engine's AWQ method with additive zeros.

    The base loads codes, scales and bias in its own way; the zeros follow, and are held against what it did.
    """
    import torch

    base: Any = getattr(linear_module, _BASE)

    class AdditiveZerosLinearMethod(base):  # type: ignore[misc] # the class exists at run time only
        """int4 with a scale and an additive zero for each group: W = code * scale + zero."""

        def create_weights(self, module: Any, *args: Any, **kwargs: Any) -> None:
            super().create_weights(module, *args, **kwargs)
            _require_half(module.weight_scale.dtype)
            module.weight_zero = torch.nn.Parameter(torch.empty_like(module.weight_scale), requires_grad=False)

        def apply(self, module: Any, values: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
            return _multiply(module, values, bias)

        def load_weights_vanilla(self, module: Any, weights: Weights, *args: Any, **kwargs: Any) -> None:
            # The base demands a scale of the input here, and reads none in fused Linears; there is none in this mode.
            super().load_weights_vanilla(module, [_with_unit_input_scale(each) for each in weights], *args, **kwargs)
            module.pre_quant_scale = None
            _load_zeros(linear_module, module, weights)

        def load_weights_fused_qkv_linear(self, module: Any, weights: Weights, *args: Any, **kwargs: Any) -> None:
            super().load_weights_fused_qkv_linear(module, weights, *args, **kwargs)
            _load_zeros(linear_module, module, weights)

        def load_weights_fused_gate_up_linear(self, module: Any, weights: Weights, *args: Any, **kwargs: Any) -> None:
            super().load_weights_fused_gate_up_linear(module, weights, *args, **kwargs)
            _load_zeros(linear_module, module, weights)

    return AdditiveZerosLinearMethod


def _require_half(dtype: torch.dtype) -> None:
    import torch

    if dtype in {torch.float16, torch.bfloat16}:
        return
    raise PlanError(
        Fault(
            where=f"Linear of {QuantAlgo.W4A16_GPTQ}",
            expected="float16 or bfloat16, which its GEMM computes in",
            found=str(dtype),
            remedy="Choose one of these as the model's dtype.",
        )
    )


def _multiply(module: Any, values: Tensor, bias: Tensor | None) -> Tensor:
    """`values @ W.T + bias`, [tokens, N] in the module's dtype.

    Values are handed over as they come, in the module's dtype: the GEMM refuses others, and rounding them here would
    hide that the model computes in another one.
    """
    import torch

    output: Tensor = getattr(torch.ops.trtllm, _GEMM)(
        input=values.contiguous(),
        weight=module.weight,
        scales=module.weight_scale,
        group_size=module.quant_config.group_size,
        has_zero_point=True,
        output_dtype=module.dtype,
        bias=None if bias is None else bias.contiguous(),
        zeros=module.weight_zero,
    )
    return output


def _with_unit_input_scale(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a `pre_quant_scale` [K] of ones; the base's own message stands where there is no weight."""
    import torch

    if "weight" not in weights:
        return dict(weights)
    return {**weights, "pre_quant_scale": torch.ones(weights["weight"].shape[1])}


def _load_zeros(linear_module: Any, module: Any, weights: Weights) -> None:
    """Fill `weight_zero` [K / g, N] from `weight_zero` [N, K / g] of each shard.

    The scales are cut in the same way once more: only if they are what the base has loaded do the zeros belong to them.
    """
    import torch

    _require_zeros(weights)
    scales = _as_loaded(linear_module, module, weights, "weight_scale").to(module.weight_scale.dtype)
    if not torch.equal(scales, module.weight_scale.detach()):
        raise PayloadError(
            Fault(
                where=f"weight_scale of a Linear {tuple(weights[0]['weight'].shape)}, rank {module.tp_rank}",
                expected="scales laid out as groups by rows, cut as this package cuts the zeros",
                found="others in TensorRT-LLM's Linear",
                remedy=_REPORT,
            )
        )
    module.weight_zero.data.copy_(_as_loaded(linear_module, module, weights, "weight_zero"))


def _require_zeros(weights: Sequence[Mapping[str, Any]]) -> None:
    """Each shard has zeros of the shape of its scales: copying would broadcast anything else in silence."""
    faults = FaultCollector()
    for shard, each in enumerate(weights):
        scale, zero = each["weight_scale"], each.get("weight_zero")
        if zero is None or zero.shape != scale.shape:
            faults.add(
                where=f"weight_zero of shard {shard} of {len(weights)}",
                expected=f"one additive zero for each scale, {tuple(scale.shape)}",
                found="none" if zero is None else str(tuple(zero.shape)),
                remedy="Load the directory with this package's checkpoint loader, which makes them.",
            )
    faults.raise_if_any(PayloadError)


def _as_loaded(linear_module: Any, module: Any, weights: Weights, name: str) -> Tensor:
    """This rank's part of one [N, K / g] tensor of all shards, joined and transposed as the GEMM reads it: [K / g, N].

    Releases of 2026 cut by a method of the Linear, older ones by a function.
    """
    import torch

    device = module.weight_scale.device
    if hasattr(module, "load_shard"):
        keys = getattr(module.weights_loading_config.weight_mode, "shard_keys", None) or [None] * len(weights)
        span = module.quant_config.group_size if module.tp_mode == "row" else 1
        parts = [
            module.load_shard(each, name, device=device, name=key, scale_span=span)
            for each, key in zip(weights, keys, strict=True)
        ]
    else:
        cut = (module.tp_size, module.tp_rank, module.tp_mode, device)
        parts = [linear_module.load_weight_shard(each[name], *cut) for each in weights]
    # GPUs that share the host's memory leave parts on the CPU.
    return torch.cat(parts).T.contiguous().to(device)

"""A Linear method for asymmetric int4 (W4A16_GPTQ), for engines that have the GEMM but no method that uses its zeros.

The engine's grouped int4 GEMM computes `x @ (codes * scales + zeros)`, but the engine's AWQ method never passes zeros.
This module derives a class from that AWQ method at run time and adds one parameter, `weight_zero`: an additive zero
for each scale, in the dtype of the scales. It is sliced, fused and transposed in the same way as the scales.
The class is installed by replacing `get_quant_method`, the one function that chooses the method of a Linear.
This module does not import the engine: the engine's module `_torch.modules.linear` is passed as an argument.
The method has not run on a GPU yet.

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
    """A replacement for the engine's `get_quant_method`.

    It returns an instance of `method` for W4A16_GPTQ, and the result of `stock`, the engine's function, otherwise.
    """

    stock: Callable[..., Any]
    method: type

    def __call__(self, quant_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if getattr(quant_config, "quant_algo", None) == QuantAlgo.W4A16_GPTQ:
            return self.method()
        return self.stock(quant_config, *args, **kwargs)


def install_additive_zeros(linear_module: Any) -> bool:
    """Install a Linear method for W4A16_GPTQ in the engine; return False if the engine has its own, which stays.

    Call it in every process that builds a model, before the model is built. A second call changes nothing.
    Raises `PlanError` when `TRTLLM_CT_NO_PATCH` forbids it, or when the engine lacks a part that the method needs; the
    faults name each missing part.
    """
    if isinstance(linear_module.get_quant_method, _Selection):
        return True
    if has_own_additive_zeros(linear_module):
        return False
    faults = FaultCollector()
    if not patch_allowed():
        faults.add(
            where=NO_PATCH,
            expected=f"permission to install a Linear method for {QuantAlgo.W4A16_GPTQ}, which this plan needs",
            found=f"{NO_PATCH} set",
            remedy=f"Unset {NO_PATCH}, or plan again with it set: asymmetric int4 is dequantized then.",
        )
    _add_missing_parts(linear_module, faults)
    faults.raise_if_any(PlanError)
    linear_module.get_quant_method = _Selection(
        stock=linear_module.get_quant_method, method=_method_class(linear_module)
    )
    return True


def uninstall_additive_zeros(linear_module: Any) -> None:
    """Restore the engine's own `get_quant_method`. Models that were already built keep their methods.

    If another library has wrapped this package's replacement meanwhile, nothing is changed.
    """
    selection = linear_module.get_quant_method
    if isinstance(selection, _Selection):
        linear_module.get_quant_method = selection.stock


def has_own_additive_zeros(linear_module: Any) -> bool:
    """Whether the engine itself has a Linear method for W4A16_GPTQ.

    Calls the engine's `get_quant_method` with such a config. An error, or the AWQ method as its answer, means no.
    """
    select = linear_module.get_quant_method
    if isinstance(select, _Selection):
        select = select.stock
    config = linear_module.QuantConfig(
        quant_algo=linear_module.QuantAlgo.W4A16_GPTQ, group_size=128, has_zero_point=True
    )
    try:
        chosen = type(select(config))
    except (ValueError, NotImplementedError):
        return False
    return chosen is not getattr(linear_module, _BASE, None)


def can_install_additive_zeros(linear_module: Any) -> bool:
    """Whether `install_additive_zeros` would succeed on an engine that has no method of its own."""
    faults = FaultCollector()
    _add_missing_parts(linear_module, faults)
    return patch_allowed() and not faults.faults


def _add_missing_parts(linear_module: Any, faults: FaultCollector) -> None:
    """Add a fault for each method, argument or function that the Linear method needs and the engine lacks."""
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
    """The names of the GEMM's arguments; empty when the operator isn't registered."""
    import torch

    packet = getattr(torch.ops.trtllm, _GEMM, None)
    if packet is None:
        return frozenset()
    return frozenset(argument.name for argument in packet.default._schema.arguments)  # noqa: SLF001 (no other way)


def _method_class(linear_module: Any) -> type:
    """Derive the Linear method with additive zeros from the engine's AWQ method.

    The base class loads codes, scales and bias in its own way. The zeros are loaded afterwards, see `_load_zeros`.
    """
    import torch

    base: Any = getattr(linear_module, _BASE)

    class AdditiveZerosLinearMethod(base):  # type: ignore[misc] # the base class exists at run time only
        """int4 with a scale and an additive zero per group: W = code * scale + zero."""

        def create_weights(self, module: Any, *args: Any, **kwargs: Any) -> None:
            super().create_weights(module, *args, **kwargs)
            _require_half(module.weight_scale.dtype)
            module.weight_zero = torch.nn.Parameter(torch.empty_like(module.weight_scale), requires_grad=False)

        def apply(self, module: Any, values: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
            return _multiply(module, values, bias)

        def load_weights_vanilla(self, module: Any, weights: Weights, *args: Any, **kwargs: Any) -> None:
            # The base class demands a `pre_quant_scale` for Linears that aren't fused. This mode has none, so the base
            # class gets ones, and its parameter is dropped afterwards.
            scaled = [_with_unit_input_scale(tensors) for tensors in weights]
            super().load_weights_vanilla(module, scaled, *args, **kwargs)
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
    """Return `values @ W.T + bias`, [tokens, N] in the module's dtype.

    `values` are passed on without a cast. The GEMM refuses any dtype but the module's, and a cast here would hide that
    the model computes in another dtype.
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
    """Return a copy of a shard's tensors with a `pre_quant_scale` [K] of ones.

    A shard without `weight` is copied unchanged, so that the base class reports the missing weight itself.
    """
    import torch

    if "weight" not in weights:
        return dict(weights)
    return {**weights, "pre_quant_scale": torch.ones(weights["weight"].shape[1])}


def _load_zeros(linear_module: Any, module: Any, weights: Weights) -> None:
    """Fill the module's `weight_zero` [K / g, N] from `weight_zero` [N, K / g] of each shard.

    To prove that zeros and scales are laid out alike, the scales are sliced here as well and compared with the scales
    that the base class loaded. Raises `PayloadError` when they differ, or when a shard has no zeros of the right shape.
    """
    import torch

    _require_zeros(weights)
    scales = _rank_slice(linear_module, module, weights, "weight_scale").to(module.weight_scale.dtype)
    if not torch.equal(scales, module.weight_scale.detach()):
        raise PayloadError(
            Fault(
                where=f"weight_scale of a Linear {tuple(weights[0]['weight'].shape)}, rank {module.tp_rank}",
                expected="scales laid out as groups by rows, cut as this package cuts the zeros",
                found="others in TensorRT-LLM's Linear",
                remedy=_REPORT,
            )
        )
    module.weight_zero.data.copy_(_rank_slice(linear_module, module, weights, "weight_zero"))


def _require_zeros(weights: Sequence[Mapping[str, Any]]) -> None:
    """Raise `PayloadError` unless each shard has zeros of the shape of its scales.

    Without this check, copying would silently broadcast zeros of another shape.
    """
    faults = FaultCollector()
    for shard, tensors in enumerate(weights):
        scale, zero = tensors["weight_scale"], tensors.get("weight_zero")
        if zero is None or zero.shape != scale.shape:
            faults.add(
                where=f"weight_zero of shard {shard} of {len(weights)}",
                expected=f"one additive zero for each scale, {tuple(scale.shape)}",
                found="none" if zero is None else str(tuple(zero.shape)),
                remedy="Load the directory with this package's checkpoint loader, which makes them.",
            )
    faults.raise_if_any(PayloadError)


def _rank_slice(linear_module: Any, module: Any, weights: Weights, name: str) -> Tensor:
    """Return this rank's slice of the tensor `name`, [N, K / g] in each shard, as the GEMM reads it: [K / g, N].

    The slices of all shards are concatenated along N and transposed. Releases of 2026 slice with the method
    `Linear.load_shard`, older ones with the function `load_weight_shard`.
    """
    import torch

    device = module.weight_scale.device
    if hasattr(module, "load_shard"):
        keys = getattr(module.weights_loading_config.weight_mode, "shard_keys", None) or [None] * len(weights)
        span = module.quant_config.group_size if module.tp_mode == "row" else 1
        parts = [
            module.load_shard(tensors, name, device=device, name=key, scale_span=span)
            for tensors, key in zip(weights, keys, strict=True)
        ]
    else:
        sharding = (module.tp_size, module.tp_rank, module.tp_mode, device)
        parts = [linear_module.load_weight_shard(tensors[name], *sharding) for tensors in weights]
    # On GPUs that share the host's memory, the engine leaves the slices on the CPU.
    return torch.cat(parts).T.contiguous().to(device)

"""Imitates `_torch/modules/linear.py`: the base of Linear methods, the unquantized one and those of FP8.

Methods store what the original stores, in its dtypes, and multiply in float32 from that.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.modules.sharding import copy_weight, cut_shard
from torch import Tensor
from torch.nn import Parameter, functional

if TYPE_CHECKING:
    from tensorrt_llm._torch.modules.linear import Linear

__all__ = [
    "FP8BlockScalesLinearMethod",
    "FP8QDQLinearMethod",
    "FP8RowwiseLinearMethod",
    "FP8Values",
    "LinearMethodBase",
    "UnquantizedLinearMethod",
    "frozen",
    "requantize",
    "require_half",
    "still",
]

Weights = list[dict[str, Tensor]]
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def frozen(*shape: int, dtype: torch.dtype) -> Parameter:
    """Return uninitialized memory; while a model is loaded it is NaN, or all ones for integers."""
    return Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def still(output: Tensor, *scales: Tensor | None) -> Tensor:
    """Unchanged, unless a scale that cancels out of the simulated product was never loaded, or isn't finite."""
    for scale in scales:
        if scale is not None:
            output = output * (scale / scale)
    return output


def require_half(dtype: torch.dtype, kernel: str) -> None:
    """Raise as the checks of `thop/` do for a model that doesn't compute in half or bfloat16."""
    if dtype not in {torch.float16, torch.bfloat16}:
        raise NotImplementedError(f"{kernel} only supports input tensor with dtypes fp16/bf16")


def quantize_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Return the values after rounding to FP8 with this scale."""
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale


def requantize(shards: list[Tensor], scales: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Requantize shards to the largest of their scales: dequantize and divide in the module's dtype, then round."""
    largest = torch.stack(scales).max()
    parts = [(shard.to(dtype) * scale / largest).to(FP8) for shard, scale in zip(shards, scales, strict=True)]
    return torch.cat(parts), largest


class FP8Values:
    """Attention's output, which it has divided by a scale and written as FP8; the Linear multiplies by its own.

    Values are float32, and rounded only where activations are simulated.
    """

    def __init__(self, values: Tensor, inverse_scale: Tensor | None) -> None:
        scaled = values if inverse_scale is None else values * inverse_scale
        self._scaled = quantize_fp8(scaled, torch.ones(())) if RELEASE.quantize_activations else scaled

    def rescaled(self, scale: Tensor | None) -> Tensor:
        """Return the values as a GEMM with this scale of its activations takes them; None is 1."""
        return self._scaled if scale is None else self._scaled * scale


class LinearMethodBase:
    """Class `LinearMethodBase`; `load_weights` calls one of three methods, which are the same for most algorithms."""

    def alignment(self, module: Linear) -> int:
        """The newest releases slice at multiples of this number of features."""
        return 1

    def create_weights(
        self, module: Linear, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
    ) -> None:
        self.allocate(module, in_features, out_features, dtype)
        module.register_parameter("bias", frozen(out_features, dtype=dtype) if bias else None)

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Create all parameters except the bias."""
        raise NotImplementedError

    def load_weights(
        self, module: Linear, weights: Weights, weight_mode: str, allow_partial_loading: bool = False
    ) -> None:
        assert not allow_partial_loading, "allow_partial_loading is not supported"
        getattr(self, f"load_weights_{weight_mode}")(module, weights)

    def load_weights_vanilla(self, module: Linear, weights: Weights) -> None:
        self.load_shards(module, weights)

    def load_weights_fused_qkv_linear(self, module: Linear, weights: Weights) -> None:
        self.load_shards(module, weights)

    def load_weights_fused_gate_up_linear(self, module: Linear, weights: Weights) -> None:
        self.load_shards(module, weights)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        """Load all tensors of all shards."""
        raise NotImplementedError

    def dequantize(self, module: Linear) -> Tensor:
        """The weight [N, K] in float32."""
        raise NotImplementedError

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        return functional.linear(input.float(), self.dequantize(module), None if bias is None else bias.float())

    def post_load_weights(self, module: Linear) -> None:
        """Older releases call it after all modules of a model are loaded."""

    def transform_weights(self, module: Linear) -> None:
        """The newest release's name of `post_load_weights`, the second of three stages."""

    @staticmethod
    def shards(module: Linear, weights: Weights, name: str, spans: tuple[int, int] = (1, 1)) -> list[Tensor]:
        """Return this rank's slice of one tensor of every shard; raises when the weight is missing."""
        assert name != "weight" or all(name in each for each in weights), "weight"
        return [cut_shard(module, each[name].to("cpu"), spans) for each in weights]

    def load_bias(self, module: Linear, weights: Weights) -> None:
        if module.bias is not None:
            copy_weight(module.bias, torch.cat(self.shards(module, weights, "bias")))


def load_kv_scales(module: Linear, weights: Weights) -> None:
    """`k_scale` and `v_scale` of a fused qkv Linear become `kv_scales`, which only an NVFP4 cache reads.

    The maximum over the parts is taken. Since early 2026 a `k_scale` without a `v_scale` raises AssertionError.
    """
    default = "1" if RELEASE.kv_scales_by_default else "0"
    if len(weights) != 3 or os.environ.get("TRTLLM_LOAD_KV_SCALES", default) != "1":
        return
    given = {name: [each[name].reshape([]) for each in weights if name in each] for name in ("k_scale", "v_scale")}
    assert not RELEASE.kv_scales_by_default or not given["k_scale"] or given["v_scale"], (
        "k_scale and v_scale must be loaded together"
    )
    for at, scales in enumerate(given.values(), start=1):
        if scales:
            module.kv_scales.data[at] = torch.stack(scales).float().max() * RELEASE.kv_scale_factor


class UnquantizedLinearMethod(LinearMethodBase):
    """Any float weight, cast to the module's dtype."""

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        module.weight = frozen(out_features, in_features, dtype=dtype)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        copy_weight(module.weight, torch.cat(self.shards(module, weights, "weight")))
        self.load_bias(module, weights)

    def dequantize(self, module: Linear) -> Tensor:
        return module.weight.float()


class FP8QDQLinearMethod(LinearMethodBase):
    """One scale per Linear: shards of a fused one are requantized, and the largest input scale is taken."""

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        module.weight = frozen(out_features, in_features, dtype=FP8)
        module.weight_scale = frozen(dtype=torch.float32)
        module.input_scale = frozen(dtype=torch.float32)
        module.inv_input_scale = frozen(dtype=torch.float32)
        module.kv_scales = Parameter(torch.ones(3), requires_grad=False)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        shards = self.shards(module, weights, "weight")
        scales = [_scalar(each, "weight_scale") for each in weights]
        if len(weights) == 1:
            copy_weight(module.weight, shards[0])
            copy_weight(module.weight_scale, scales[0])
        else:
            weight, scale = requantize(shards, scales, module.dtype)
            copy_weight(module.weight, weight)
            copy_weight(module.weight_scale, scale)
        self._load_input_scale(module, weights)
        load_kv_scales(module, weights)
        self.load_bias(module, weights)

    def _load_input_scale(self, module: Linear, weights: Weights) -> None:
        """Dynamic when no shard has one; when only some have, the maximum includes uninitialized memory."""
        if any("input_scale" in each for each in weights):
            copy_weight(module.input_scale, torch.stack([_scalar(each, "input_scale") for each in weights]).max())
            module.inv_input_scale.data = 1 / module.input_scale
        else:
            module.input_scale = module.inv_input_scale = None

    def dequantize(self, module: Linear) -> Tensor:
        return module.weight.float() * module.weight_scale

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        """FP8 input is attention's, and is multiplied by the stored scale even where activations shall be dynamic."""
        if isinstance(input, FP8Values):
            input, scale = input.rescaled(module.input_scale), module.input_scale  # noqa: A001
        else:
            scale = None if module.force_dynamic_quantization else module.input_scale
            if RELEASE.quantize_activations:
                input = quantize_fp8(input, input.abs().max() / FP8_MAX if scale is None else scale)  # noqa: A001
        return still(super().apply(module, input, bias), scale)


def _scalar(weights: dict[str, Tensor], name: str) -> Tensor:
    """Return one element in float32, or uninitialized memory if a shard has none."""
    return weights[name].reshape([]).float() if name in weights else torch.empty(())


def _create_output_scales(module: Linear) -> None:
    """Scales of the input that no GEMM uses, only attention for its output; both are 1 until they are loaded."""
    module.input_scale = Parameter(torch.ones(()), requires_grad=False)
    module.inv_input_scale = Parameter(torch.ones(()), requires_grad=False)


def _load_output_scales(module: Linear, weights: Weights) -> None:
    """Only Linears that aren't fused read them."""
    if len(weights) == 1 and "input_scale" in weights[0]:
        copy_weight(module.input_scale, weights[0]["input_scale"].reshape([]))
        module.inv_input_scale.data = 1 / module.input_scale


class FP8RowwiseLinearMethod(LinearMethodBase):
    """One scale per row, activations per token."""

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        module.weight = frozen(out_features, in_features, dtype=FP8)
        module.weight_scale = frozen(out_features, dtype=torch.float32)
        _create_output_scales(module)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        """Only attention uses an `input_scale`, and divides by it; the GEMM still multiplies by 1."""
        name = "weight_scale_inv" if "weight_scale_inv" in weights[0] else "weight_scale"
        copy_weight(module.weight, torch.cat(self.shards(module, weights, "weight")))
        scales = torch.cat(self.shards(module, weights, name))
        copy_weight(module.weight_scale, scales.reshape(-1) if RELEASE.flattens_row_scale else scales)
        _load_output_scales(module, weights)
        self.load_bias(module, weights)

    def dequantize(self, module: Linear) -> Tensor:
        return module.weight.float() * module.weight_scale[:, None]

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        """FP8 input is attention's, and its scale is taken to be 1 whatever attention divided by."""
        require_half(module.dtype, "fp8_rowwise_gemm")
        if isinstance(input, FP8Values):
            input = input.rescaled(None)  # noqa: A001
        elif RELEASE.quantize_activations:
            input = quantize_fp8(input, input.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX)  # noqa: A001
        return super().apply(module, input, bias)


class FP8BlockScalesLinearMethod(LinearMethodBase):
    """One scale per block of 128x128."""

    def alignment(self, module: Linear) -> int:
        return 128

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        module.weight = frozen(out_features, in_features, dtype=FP8)
        module.weight_scale = frozen(-(-out_features // 128), -(-in_features // 128), dtype=torch.float32)
        _create_output_scales(module)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        """Scales go to the block row in which their shard begins, rounded up; this is right only for whole blocks."""
        name = "weight_scale_inv" if "weight_scale_inv" in weights[0] else "weight_scale"
        weights = [each | {name: _two_dimensional(each[name])} for each in weights]
        shards = self.shards(module, weights, "weight")
        copy_weight(module.weight, torch.cat(shards))
        row = 0
        for shard, scale in zip(shards, self.shards(module, weights, name, (128, 128)), strict=True):
            first = -(-row // 128)
            copy_weight(module.weight_scale[first : first + -(-shard.shape[0] // 128)], scale)
            row += shard.shape[0]
        _load_output_scales(module, weights)
        self.load_bias(module, weights)

    def dequantize(self, module: Linear) -> Tensor:
        rows, columns = module.weight.shape
        scale = module.weight_scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return module.weight.float() * scale

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        """FP8 input is attention's; it is multiplied by `input_scale`, which is 1 unless a checkpoint has one.

        All generations assert bfloat16: `_torch/modules/linear.py` at ed53795b and at 00bbf71e.
        """
        assert module.dtype == torch.bfloat16, "FP8 block scales take bfloat16 activations"
        if isinstance(input, FP8Values):
            input = input.rescaled(module.input_scale)  # noqa: A001
        return super().apply(module, input, bias)


def _two_dimensional(scale: Tensor) -> Tensor:
    return scale.squeeze(1).squeeze(-1) if scale.dim() == 4 else scale

"""Imitates `_torch/modules/linear.py`: Linear methods of the mixed-type GEMM (int8 and int4 weights)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.modules.linear_methods import LinearMethodBase, Weights, frozen, quantize_fp8, require_half
from tensorrt_llm._torch.modules.sharding import TensorParallelMode, copy_weight, cut_shard
from tensorrt_llm.quantization.functional import is_sm100, mixed_gemm_values, preprocess_weights_for_mixed_gemm
from tensorrt_llm.quantization.mode import QuantAlgo
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from tensorrt_llm._torch.modules.linear import Linear

__all__ = [
    "W4A8_AWQ_LinearMethod",
    "W4A16_AWQ_LinearMethod",
    "W4A16_GPTQ_LinearMethod",
    "WeightOnlyQuantLinearMethod",
]


class WeightOnlyQuantLinearMethod(LinearMethodBase):
    """int8 or int4 with one scale per row, rounded to the module's dtype.

    `apply` made the bias contiguous and returned the GEMM without it until PR #12317 (merged 2026-03-18). SM100 has
    no such GEMM before PR #10190 (January 2026).
    """

    @staticmethod
    def _codes(module: Linear) -> torch.dtype:
        assert module.quant_config is not None
        return torch.int8 if module.quant_config.layer_quant_mode.algo == QuantAlgo.W8A16 else torch.quint4x2

    def alignment(self, module: Linear) -> int:
        return 16 if self._codes(module) == torch.int8 else 32

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        per_byte = 1 if self._codes(module) == torch.int8 else 2
        module.weight = frozen(in_features, out_features // per_byte, dtype=torch.int8)
        module.weight_scale = frozen(out_features, dtype=dtype)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        codes = self._codes(module)
        fused = torch.cat(self.shards(module, weights, "weight", (1 if codes == torch.int8 else 2, 1)))
        prepared = preprocess_weights_for_mixed_gemm(fused.to(torch.int8).T.contiguous(), codes, torch.float16)
        copy_weight(module.weight, prepared)
        copy_weight(module.weight_scale, torch.cat(self.shards(module, weights, "weight_scale")))
        self.load_bias(module, weights)

    def dequantize(self, module: Linear) -> Tensor:
        return mixed_gemm_values(module.weight, self._codes(module)).T * module.weight_scale.float()[:, None]

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        require_half(module.dtype, "weight_only_quant_gemm")
        if is_sm100() and not RELEASE.weight_only_on_sm100:
            raise RuntimeError(f"weight_only_quant_gemm: unsupported architecture SM{RELEASE.sm}")
        return super().apply(module, input, bias if RELEASE.weight_only_bias else None)


class W4A16_AWQ_LinearMethod(LinearMethodBase):  # noqa: N801
    """int4 with groups along K; unfused Linears require `pre_quant_scale`, fused ones never read it."""

    reads_pre_quant_scale = True
    activations = torch.float16

    def alignment(self, module: Linear) -> int:
        return self._group_size(module)

    @staticmethod
    def _group_size(module: Linear) -> int:
        assert module.quant_config is not None
        assert module.quant_config.group_size is not None
        return module.quant_config.group_size

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        group = self._group_size(module)
        module.weight = frozen(in_features, out_features // 2, dtype=torch.int8)
        if in_features % group != 0:
            raise ValueError(f"in_features ({in_features}) must be divisible by group_size ({group})")
        module.weight_scale = frozen(in_features // group, out_features, dtype=self.scale_dtype(dtype))
        module.pre_quant_scale = None

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Scales are rounded to the module's dtype."""
        return dtype

    def load_shards(self, module: Linear, weights: Weights) -> None:
        codes = torch.cat(self.shards(module, weights, "weight", (2, 1))).to(torch.int8).T.contiguous()
        copy_weight(module.weight, preprocess_weights_for_mixed_gemm(codes, torch.quint4x2, self.activations))
        copy_weight(module.weight_scale, self.grouped(module, weights, "weight_scale"))
        self.load_bias(module, weights)

    def load_weights_vanilla(self, module: Linear, weights: Weights) -> None:
        self.load_shards(module, weights)
        if self.reads_pre_quant_scale:
            self.load_pre_quant_scale(module, weights[0]["pre_quant_scale"])

    def load_pre_quant_scale(self, module: Linear, scale: Tensor) -> None:
        """Load the `pre_quant_scale` [K], sliced if the weight's columns are sliced."""
        if module.tp_mode == TensorParallelMode.ROW:
            scale = cut_shard(module, scale, (1, 1), TensorParallelMode.COLUMN)
        module.pre_quant_scale = Parameter(torch.ones(module.in_features, dtype=scale.dtype), requires_grad=False)
        copy_weight(module.pre_quant_scale, scale)

    def grouped(self, module: Linear, weights: Weights, name: str) -> Tensor:
        """Return a tensor [N, K / g] of all shards as the GEMM reads it, [K / g, N]."""
        return torch.cat(self.shards(module, weights, name, (1, self._group_size(module)))).T.contiguous()

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        if module.pre_quant_scale is not None:
            input = input * module.pre_quant_scale.float()  # noqa: A001
        return self.multiply(module, input, bias)

    def multiply(self, module: Linear, values: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        """Call the GEMM; only the method for zero points passes zeros."""
        assert module.quant_config is not None
        require_half(module.dtype, "finegrained_mixed_dtype_gemm")
        output: Tensor = torch.ops.trtllm.finegrained_mixed_dtype_gemm(
            input=values,
            weight=module.weight,
            scales=module.weight_scale,
            group_size=self._group_size(module),
            has_zero_point=module.quant_config.has_zero_point,
            output_dtype=module.dtype,
            bias=bias,
            **({"zeros": None} | more),
        )
        return output


class W4A16_GPTQ_LinearMethod(W4A16_AWQ_LinearMethod):  # noqa: N801
    """Pull request 19442, which isn't merged: additive zeros in float, no `pre_quant_scale`."""

    reads_pre_quant_scale = False

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        if self._group_size(module) not in {64, 128}:
            raise ValueError(f"W4A16_GPTQ group_size must be 64 or 128, got {self._group_size(module)}")
        super().allocate(module, in_features, out_features, dtype)
        module.weight_zero = frozen(*module.weight_scale.shape, dtype=dtype)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        super().load_shards(module, weights)
        copy_weight(module.weight_zero, self.grouped(module, weights, "weight_zero"))

    def multiply(self, module: Linear, values: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        return super().multiply(module, values, bias, zeros=module.weight_zero, **more)


class W4A8_AWQ_LinearMethod(W4A16_AWQ_LinearMethod):  # noqa: N801
    """As AWQ, with FP8 activations: scales in float16, divided by `weight_scale_2`; products are rounded to e4m3."""

    activations = torch.float8_e4m3fn

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().allocate(module, in_features, out_features, dtype)
        module.input_scale = frozen(dtype=torch.float32)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        """Scalars of all shards must be equal."""
        super().load_shards(module, weights)
        scalars = {name: self._equal(weights, name) for name in ("input_scale", "weight_scale_2")}
        scales = self.grouped(module, weights, "weight_scale").to(torch.float16)
        copy_weight(module.weight_scale, scales / scalars["weight_scale_2"])
        copy_weight(module.input_scale, scalars["input_scale"])
        module.alpha_value = float(scalars["input_scale"] * scalars["weight_scale_2"])
        if len(weights) > 1 and "pre_quant_scale" in weights[0]:
            self.load_pre_quant_scale(module, weights[0]["pre_quant_scale"])

    @staticmethod
    def _equal(weights: Weights, name: str) -> Tensor:
        scalars = [each[name].reshape([]).float() for each in weights]
        assert all(torch.equal(scalar, scalars[0]) for scalar in scalars), f"The {name} should be same"
        return scalars[0]

    def load_pre_quant_scale(self, module: Linear, scale: Tensor) -> None:
        assert scale.dtype == module.dtype
        super().load_pre_quant_scale(module, scale)

    def multiply(self, module: Linear, values: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        if RELEASE.quantize_activations:
            values = quantize_fp8(values, module.input_scale)
        scaled = values / module.input_scale
        return super().multiply(module, scaled, bias, alpha=module.alpha_value, fp8_input=True, **more)

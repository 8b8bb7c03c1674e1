"""Imitates `_torch/modules/linear.py`: Linear methods of small floats with small groups (NVFP4, MXFP4, MXFP8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.modules.linear_methods import (
    FP8,
    LinearMethodBase,
    Weights,
    frozen,
    load_kv_scales,
    require_half,
    still,
)
from tensorrt_llm._torch.modules.sharding import TensorParallelMode, copy_weight, cut_shard, load_weight_shard
from tensorrt_llm.quantization.functional import e2m1_values, e8m0_values
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from tensorrt_llm._torch.modules.linear import Linear

__all__ = [
    "MXFP8LinearMethod",
    "NVFP4LinearMethod",
    "W4A8MXFP4FP8LinearMethod",
    "W4A8MXFP4MXFP8LinearMethod",
    "W4A8NVFP4FP8LinearMethod",
    "W4A16NVFP4LinearMethod",
]


class _SmallGroups(LinearMethodBase):
    """Codes [N, K / `per_byte`] and a scale for every `group` columns."""

    group: int
    per_byte = 2
    weight_dtype = torch.uint8
    scale_dtype = torch.uint8

    def alignment(self, module: Linear) -> int:
        return 32

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        assert in_features % self.group == 0, f"in_features {in_features} must be divisible by {self.group}"
        module.weight = frozen(out_features, in_features // self.per_byte, dtype=self.weight_dtype)
        module.weight_scale = frozen(out_features, in_features // self.group, dtype=self.scale_dtype)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        copy_weight(module.weight, torch.cat(self.shards(module, weights, "weight", (1, self.per_byte))))
        scales = self.shards(module, weights, "weight_scale", (1, self.group))
        copy_weight(module.weight_scale, torch.cat(scales))
        self.load_bias(module, weights)

    def dequantize(self, module: Linear) -> Tensor:
        codes = e2m1_values(module.weight) if self.per_byte == 2 else module.weight.float()
        of_bytes = self.scale_dtype == torch.uint8
        scales = e8m0_values(module.weight_scale) if of_bytes else module.weight_scale.float()
        return codes * scales.repeat_interleave(self.group, dim=1)


class NVFP4LinearMethod(_SmallGroups):
    """Two levels of scales; the scalars of a fused Linear must agree, which is asserted.

    `NVFP4LinearMethod.load_weight_scales` of ed53795b and 00bbf71e compares with `==`, of 3fe2c922 with a tolerance.
    """

    group = 16
    scale_dtype = FP8
    reads_input_scale = True

    def allocate(self, module: Linear, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().allocate(module, in_features, out_features, dtype)
        module.weight_scale_2 = frozen(dtype=torch.float32)
        module.input_scale = frozen(dtype=torch.float32) if self.reads_input_scale else None
        module.kv_scales = Parameter(torch.ones(3), requires_grad=False)
        module.pre_quant_scale = None

    def load_shards(self, module: Linear, weights: Weights) -> None:
        """Without `input_scale` older releases fail; newer ones leave its memory uninitialized, or are dynamic."""
        super().load_shards(module, weights)
        copy_weight(module.weight_scale_2, self.one_of(weights, "weight_scale_2"))
        if module.force_dynamic_quantization and RELEASE.dynamic_nvfp4:
            module.input_scale = None
        elif self.reads_input_scale:
            self._load_input_scale(module, weights)
        if "pre_quant_scale" in weights[0] and len(weights) < 3:
            _load_pre_quant_scale(module, weights[0]["pre_quant_scale"])
        load_kv_scales(module, weights)

    def _load_input_scale(self, module: Linear, weights: Weights) -> None:
        given = any("input_scale" in each for each in weights)
        if not given and RELEASE.exact_scalars:
            raise AttributeError("'NoneType' object has no attribute 'float'")
        if given:
            copy_weight(module.input_scale, self.one_of(weights, "input_scale"))

    def one_of(self, weights: Weights, name: str) -> Tensor:
        """Return the scalar that all shards share: equal bit by bit, or in the newest release nearly."""
        scalars = [each[name].reshape([]).float() for each in weights if name in each]
        same = torch.equal if RELEASE.exact_scalars else torch.allclose
        for scalar in scalars[1:]:
            assert same(scalar, scalars[0]), f"The {name} should be same for all the weights"
        return scalars[0]

    def dequantize(self, module: Linear) -> Tensor:
        return super().dequantize(module) * module.weight_scale_2

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        if self.reads_input_scale:
            require_half(module.dtype, "fp4_quantize")
        if module.pre_quant_scale is not None:
            assert module.pre_quant_scale.dtype == module.dtype, "pre_quant_scale must have the activations' dtype"
            input = input * module.pre_quant_scale.float()  # noqa: A001
        return still(super().apply(module, input, bias), module.input_scale)


def _load_pre_quant_scale(module: Linear, scale: Tensor) -> None:
    """It multiplies the input, so it is sliced if the weight's columns are sliced."""
    mode = TensorParallelMode.flip(module.tp_mode) if module.tp_mode else None
    if mode == TensorParallelMode.COLUMN:
        scale = cut_shard(module, scale, (1, 1), mode)
    module.pre_quant_scale = Parameter(scale.clone(), requires_grad=False)


class W4A16NVFP4LinearMethod(NVFP4LinearMethod):
    """As NVFP4, without quantized activations."""

    reads_input_scale = False

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        """`cudaCoreGemmDispatcher` of `cudaCoreGemmW4A16NVFP4.cu`, for SM120 only; other GPUs dequantize.

        Marlin is the first choice on SM120, and takes bfloat16 only: `thop/marlinNvfp4MM.cpp: marlin_nvfp4_gemm`.
        """
        require_half(module.dtype, "w4a16_nvfp4_gemm")
        if RELEASE.sm == 120 and module.dtype != torch.bfloat16:
            raise RuntimeError("mat_a must be FP4 E2M1X2 or BFloat16")
        if RELEASE.sm == 120 and module.in_features % 32:
            raise RuntimeError("Failed to dispatch w4a16_nvfp4_gemm kernel")
        return super().apply(module, input, bias)


class W4A8NVFP4FP8LinearMethod(NVFP4LinearMethod):
    """Groups of 32; the scalars are required and must be bitwise equal."""

    group = 32

    def one_of(self, weights: Weights, name: str) -> Tensor:
        scalars = [each[name].reshape([]).float() for each in weights]
        assert all(torch.equal(scalar, scalars[0]) for scalar in scalars), f"The {name} should be same"
        return scalars[0]

    def load_shards(self, module: Linear, weights: Weights) -> None:
        super().load_shards(module, weights)
        copy_weight(module.input_scale, self.one_of(weights, "input_scale"))


class W4A8MXFP4FP8LinearMethod(_SmallGroups):
    """E2M1 codes, power-of-two scales per 32 columns."""

    group = 32


class W4A8MXFP4MXFP8LinearMethod(W4A8MXFP4FP8LinearMethod):
    """The same weights, other activations, which `thop/mxFp8Quantize.cpp` quantizes."""

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        require_half(module.dtype, "mxfp8_quantize")
        return super().apply(module, input, bias)


class MXFP8LinearMethod(_SmallGroups):
    """E4M3 codes, power-of-two scales per 32 columns; cut by ceiling division in every release."""

    group = 32
    per_byte = 1
    weight_dtype = FP8

    def apply(self, module: Linear, input: Tensor, bias: Tensor | None, *_: Any) -> Tensor:  # noqa: A002
        """`mxfp8_mxfp8_gemm` of `thop/mxfp8Gemm.cpp`, on SM100; other GPUs dequantize."""
        if RELEASE.sm >= 100:
            require_half(module.dtype, "mxfp8_quantize")
        if RELEASE.sm >= 100 and module.out_features % 32:
            raise RuntimeError(f"N ({module.out_features}) must be divisible by 32")
        return super().apply(module, input, bias)

    def load_shards(self, module: Linear, weights: Weights) -> None:
        name = "weight_scale_inv" if "weight_scale_inv" in weights[0] else "weight_scale"
        super().load_shards(module, [each | {"weight_scale": each[name]} for each in weights])

    @staticmethod
    def shards(module: Linear, weights: Weights, name: str, spans: tuple[int, int] = (1, 1)) -> list[Tensor]:
        assert name != "weight" or all(name in each for each in weights), "weight"
        parallel = (module.tp_size, module.tp_rank, module.tp_mode)
        return [load_weight_shard(each[name], *parallel) for each in weights]

"""Imitates `fused_moe/quantization.py`: the tensors that experts read per algorithm, and how they are stored.

w3 and w1 (up, then gate) are one weight [experts, 2 x intermediate, hidden]. Each tensor is sliced by ceiling division
of its own width, w1 and w3 along rows, w2 along columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.modules.linear_methods import FP8, frozen, quantize_fp8, requantize, still
from tensorrt_llm._torch.modules.sharding import TensorParallelMode, copy_weight, load_weight_shard
from tensorrt_llm.logger import logger
from tensorrt_llm.quantization.functional import (
    e2m1_values,
    e8m0_values,
    mixed_gemm_values,
    preprocess_weights_for_mixed_gemm,
)
from torch import Tensor

if TYPE_CHECKING:
    from tensorrt_llm._torch.modules.fused_moe.interface import MoE

__all__ = [
    "BlockExperts",
    "CutlassMXFP4Experts",
    "ExpertMethod",
    "FP8Experts",
    "Int8Experts",
    "MXFP4Experts",
    "MXFP8Experts",
    "NVFP4Experts",
    "UnquantizedExperts",
    "W4A16NVFP4Experts",
    "WInt4AFP8Experts",
]

Weights = dict[str, Tensor]


class ExpertMethod:
    """Codes and, if `scale_key` is set, scales; one scale covers `scale_spans` (rows, columns) of a weight."""

    weight_dtype: torch.dtype | None = None
    packing = (1, 1)
    scale_key: str | None = None
    scale_dtype: torch.dtype | None = None
    scale_spans = (1, 1)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    """The dtypes of activations that the kernel takes: `_QUANT_SUPPORT_TABLE` of `fused_moe_cutlass.py` (2026), and the
    types that `thop/moeOp.cpp: FusedMoeRunner` is built for."""

    def create_weights(self, module: MoE) -> None:
        """A dtype of None means the dtype of the model."""
        inner = module.intermediate_size_per_partition
        for part, rows, columns in (
            ("w3_w1", (1 + module.gated) * inner, module.hidden_size),
            ("w2", module.hidden_size, inner),
        ):
            self._create(module, f"{part}_weight", rows, columns, self.packing, self.weight_dtype)
            if self.scale_key is not None:
                self._create(module, f"{part}_scale", rows, columns, self.scale_spans, self.scale_dtype)

    @staticmethod
    def _create(
        module: MoE, name: str, rows: int, columns: int, spans: tuple[int, int], dtype: torch.dtype | None
    ) -> None:
        shape = [-(-rows // spans[0]), *([-(-columns // spans[1])] if spans[1] else [])]
        module.register_parameter(name, frozen(len(module.expert_ids), *shape, dtype=dtype or module.dtype))

    def load_weights(self, module: MoE, weights: Weights) -> None:
        """Load the experts; raises KeyError for a missing tensor."""
        for at, expert in enumerate(module.expert_ids):
            w1, w3, w2 = (self._cut(module, weights, f"{expert}.{part}", "weight") for part in ("w1", "w3", "w2"))
            copy_weight(module.w3_w1_weight[at], self.prepare(torch.cat([w3, w1])))
            copy_weight(module.w2_weight[at], self.prepare(w2))
            if self.scale_key is not None:
                w1, w3, w2 = (
                    self._cut(module, weights, f"{expert}.{part}", self.scale_key) for part in ("w1", "w3", "w2")
                )
                copy_weight(module.w3_w1_scale[at], torch.cat([w3, w1]))
                copy_weight(module.w2_scale[at], w2)

    @staticmethod
    def _cut(module: MoE, weights: Weights, expert: str, key: str) -> Tensor:
        mode = TensorParallelMode.ROW if expert.endswith("w2") else TensorParallelMode.COLUMN
        parallel = (module.mapping.moe_tp_size, module.mapping.moe_tp_rank, mode)
        return load_weight_shard(weights[f"{expert}.{key}"], *parallel)

    def prepare(self, codes: Tensor) -> Tensor:
        """Return the codes as they are stored."""
        return codes

    def dequantize(self, module: MoE, part: str, at: int) -> Tensor:
        """Return one weight [N, K] in float32; `part` is w3_w1 or w2."""
        weight = getattr(module, f"{part}_weight")[at]
        values = e2m1_values(weight) if self.packing == (1, 2) else weight.float()
        if self.scale_key is None:
            return values
        scale = getattr(module, f"{part}_scale")[at]
        scale = e8m0_values(scale) if scale.dtype == torch.uint8 else scale.float()
        for dim, span in enumerate(self.scale_spans):
            scale = scale.repeat_interleave(span, dim) if span else scale[:, None]
        return values * scale[: values.shape[0], : max(values.shape[1], 1)]

    def scale_input(self, module: MoE, part: str, at: int, values: Tensor) -> Tensor:
        """Transform the input before it is multiplied by a weight."""
        return values


class UnquantizedExperts(ExpertMethod):
    """Plain weights."""


class _WithInputScale(ExpertMethod):
    """A layer uses the largest input scale of all experts, including those on other ranks."""

    def load_input_scales(self, module: MoE, weights: Weights) -> None:
        for part, names in (("w3_w1", ("w1", "w3")), ("w2", ("w2",))):
            scales = [
                weights[f"{expert}.{name}.input_scale"].reshape([]).float()
                for expert in range(module.num_experts)
                for name in names
            ]
            setattr(module, f"{part}_input_scale", torch.stack(scales).max())

    def scale_input(self, module: MoE, part: str, at: int, values: Tensor) -> Tensor:
        return still(values, getattr(module, f"{part}_input_scale"))


class FP8Experts(_WithInputScale):
    """One scale per weight; w1 and w3 are requantized to the larger of their two scales."""

    weight_dtype = FP8

    def load_weights(self, module: MoE, weights: Weights) -> None:
        self.load_input_scales(module, weights)
        scales = [
            [weights[f"{expert}.{part}.weight_scale"].reshape([]).float() for part in ("w1", "w3", "w2")]
            for expert in range(module.num_experts)
        ]
        local = [scales[expert] for expert in module.expert_ids]
        module.w3_w1_scale = torch.stack([torch.maximum(w1, w3) for w1, w3, _ in local])
        module.w2_scale = torch.stack([w2 for _, _, w2 in local])
        for at, expert in enumerate(module.expert_ids):
            w1, w3, w2 = (self._cut(module, weights, f"{expert}.{part}", "weight") for part in ("w1", "w3", "w2"))
            fused, _ = requantize([w3, w1], [local[at][1], local[at][0]], module.dtype)
            copy_weight(module.w3_w1_weight[at], fused)
            copy_weight(module.w2_weight[at], w2)

    def dequantize(self, module: MoE, part: str, at: int) -> Tensor:
        scale: Tensor = getattr(module, f"{part}_scale")[at]
        return super().dequantize(module, part, at) * scale


class BlockExperts(ExpertMethod):
    """Blocks of 128x128, under one name only."""

    weight_dtype = FP8
    scale_key = "weight_scale_inv"
    scale_dtype = torch.float32
    scale_spans = (128, 128)
    dtypes = (torch.bfloat16,)


class W4A16NVFP4Experts(ExpertMethod):
    """Two levels of scales; w1 and w3 share the larger second one, whatever it does to the other."""

    weight_dtype = torch.uint8
    packing = (1, 2)
    scale_key = "weight_scale"
    scale_dtype = FP8
    scale_spans = (1, 16)

    @staticmethod
    def _cut(module: MoE, weights: Weights, expert: str, key: str) -> Tensor:
        """Block scales are copied as bytes, whatever dtype they are given in."""
        tensor = ExpertMethod._cut(module, weights, expert, key)
        return tensor.view(FP8) if key == "weight_scale" else tensor

    def load_weights(self, module: MoE, weights: Weights) -> None:
        super().load_weights(module, weights)
        seconds = [
            [weights[f"{expert}.{part}.weight_scale_2"].reshape([]).float() for part in ("w1", "w3", "w2")]
            for expert in module.expert_ids
        ]
        if not all(torch.equal(w1, w3) for w1, w3, _ in seconds):
            logger.warning("w1 and w3 have different weight_scale_2; the larger is used.")
        module.w3_w1_scale_2 = torch.stack([torch.maximum(w1, w3) for w1, w3, _ in seconds])
        module.w2_scale_2 = torch.stack([w2 for _, _, w2 in seconds])

    def dequantize(self, module: MoE, part: str, at: int) -> Tensor:
        scale: Tensor = getattr(module, f"{part}_scale_2")[at]
        return super().dequantize(module, part, at) * scale


class NVFP4Experts(W4A16NVFP4Experts, _WithInputScale):
    """Input scales of w1 and w3 must agree; one that isn't finite spoils the layer."""

    def load_weights(self, module: MoE, weights: Weights) -> None:
        super().load_weights(module, weights)
        self.load_input_scales(module, weights)
        for expert in range(module.num_experts):
            w1, w3 = (weights[f"{expert}.{part}.input_scale"].float() for part in ("w1", "w3"))
            assert torch.allclose(w1, w3), f"w1_input_scale and w3_input_scale of expert {expert} should be same"


class Int8Experts(ExpertMethod):
    """int8 with one scale per row, rounded to the model's dtype."""

    weight_dtype = torch.int8
    scale_key = "weight_scale"
    scale_spans = (1, 0)


class WInt4AFP8Experts(ExpertMethod):
    """int4 in groups of 128; requires activation scales that weight-only checkpoints don't have.

    `WInt4AFP8FusedMoEMethod.load_quant_scales`: input scales are read of local experts only (of all experts only with
    W4A8_CUSTOM), and each expert uses its own. w1 and w3 share the larger of their scalars. The weight's scales are
    rounded to the kernel's dtype, divided by `weight_scale_2` in the model's dtype, and multiplied by it again. The
    input is multiplied by `pre_quant_scale / input_scale`, rounded to the model's dtype. On SM89 the kernel rounds each
    product of a code and its scale to e4m3 (`dq_mma_multistage_finegrained.h`); on SM90 it scales sums.
    W4A8_CUSTOM, which early releases always use, has other names and other codes; no test has such weights.
    """

    weight_dtype = torch.int8
    packing = (2, 1)
    scale_key = "weight_scale"
    scale_dtype = torch.float32
    scale_spans = (1, 128)

    def create_weights(self, module: MoE) -> None:
        if not 89 <= RELEASE.sm <= 90:
            raise NotImplementedError(f"Unsupported configuration: SM{RELEASE.sm}")
        if module.hidden_size % 128 or module.intermediate_size_per_partition % 128:
            raise NotImplementedError("K shape is required to be multiple of 128")
        super().create_weights(module)

    def load_weights(self, module: MoE, weights: Weights) -> None:
        if module.weight_loading_mode == 2 or not RELEASE.exported_w4a8_experts:
            for expert in module.expert_ids:
                _ = weights[f"{expert}.w3.weight_scale_inv"]
            raise NotImplementedError("W4A8_CUSTOM is not imitated")
        super().load_weights(module, weights)
        # It scales the input, so it is sliced where w2 is sliced along its columns.
        for part, names, mode in (("w3_w1", ("w3", "w1"), None), ("w2", ("w2",), TensorParallelMode.COLUMN)):
            inputs, seconds, pre_quant = (
                self._larger(module, weights, names, key, mode if key == "pre_quant_scale" else None)
                for key in ("input_scale", "weight_scale_2", "pre_quant_scale")
            )
            setattr(module, f"{part}_act_scale", (pre_quant / inputs.float().reshape(-1, 1)).to(module.dtype))
            setattr(module, f"{part}_input_scale", inputs.float())
            setattr(module, f"{part}_scale_2", seconds.float())
            scale = getattr(module, f"{part}_scale")
            kernel = torch.float16 if RELEASE.sm == 89 else torch.bfloat16
            # The bits are viewed as the model's dtype, which is meant to be the kernel's.
            divided = self._scales(module, weights, names).to(kernel).view(module.dtype)
            divided /= seconds.float().reshape(-1, 1, 1)
            scale.data.copy_(divided.view(kernel))

    @staticmethod
    def _larger(
        module: MoE, weights: Weights, names: tuple[str, ...], key: str, mode: TensorParallelMode | None
    ) -> Tensor:
        """Return one tensor of every local expert in the model's dtype: of w1 and w3 the larger one."""
        parallel = (module.mapping.moe_tp_size, module.mapping.moe_tp_rank, mode)
        read = [
            torch.stack(
                [load_weight_shard(weights[f"{expert}.{name}.{key}"], *parallel) for expert in module.expert_ids]
            )
            for name in names
        ]
        return torch.stack(read).to(module.dtype).amax(0)

    def _scales(self, module: MoE, weights: Weights, names: tuple[str, ...]) -> Tensor:
        return torch.stack(
            [
                torch.cat([self._cut(module, weights, f"{expert}.{name}", "weight_scale") for name in names])
                for expert in module.expert_ids
            ]
        )

    def prepare(self, codes: Tensor) -> Tensor:
        signed = codes.to(torch.int8).T.contiguous()
        return preprocess_weights_for_mixed_gemm(signed, torch.quint4x2, FP8).T

    def dequantize(self, module: MoE, part: str, at: int) -> Tensor:
        codes = mixed_gemm_values(getattr(module, f"{part}_weight")[at].T.contiguous(), torch.quint4x2).T
        second: Tensor = getattr(module, f"{part}_scale_2")[at]
        values = codes * getattr(module, f"{part}_scale")[at].float().repeat_interleave(128, 1)
        if RELEASE.sm == 89:
            values = values.half().to(FP8).float()
        return values * second

    def scale_input(self, module: MoE, part: str, at: int, values: Tensor) -> Tensor:
        scaled = values * getattr(module, f"{part}_act_scale")[at].float()
        if RELEASE.quantize_activations:
            scaled = quantize_fp8(scaled, torch.ones(()))
        rescaled: Tensor = scaled * getattr(module, f"{part}_input_scale")[at]
        return rescaled


class MXFP4Experts(ExpertMethod):
    """E2M1 codes and power-of-two scales per 32 columns; only the newest release pads sizes."""

    weight_dtype = torch.uint8
    packing = (1, 2)
    scale_key = "weight_scale"
    scale_dtype = torch.uint8
    scale_spans = (1, 32)

    def create_weights(self, module: MoE) -> None:
        sizes = (module.hidden_size, module.intermediate_size_per_partition)
        assert RELEASE.newest_algos or all(size % 128 == 0 for size in sizes), f"{sizes} must be multiples of 128"
        super().create_weights(module)


class CutlassMXFP4Experts(MXFP4Experts):
    """As `MXFP4Experts`, with the name that CUTLASS uses for the scale."""

    scale_key = "weight_scale_inv"


class MXFP8Experts(ExpertMethod):
    """E4M3 codes and power-of-two scales per 32 columns."""

    weight_dtype = FP8
    scale_key = "weight_scale_inv"
    scale_dtype = torch.uint8
    scale_spans = (1, 32)

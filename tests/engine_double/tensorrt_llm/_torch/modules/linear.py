"""Imitates `_torch/modules/linear.py`: Linear, and the one function that chooses its method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.distributed import allgather, allreduce
from tensorrt_llm._torch.modules.awq_methods import (
    W4A8_AWQ_LinearMethod,
    W4A16_AWQ_LinearMethod,
    WeightOnlyQuantLinearMethod,
)
from tensorrt_llm._torch.modules.fp4_methods import (
    MXFP8LinearMethod,
    NVFP4LinearMethod,
    W4A8MXFP4FP8LinearMethod,
    W4A8MXFP4MXFP8LinearMethod,
    W4A8NVFP4FP8LinearMethod,
    W4A16NVFP4LinearMethod,
)
from tensorrt_llm._torch.modules.linear_methods import (
    FP8BlockScalesLinearMethod,
    FP8QDQLinearMethod,
    FP8RowwiseLinearMethod,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from tensorrt_llm._torch.modules.sharding import (
    TensorParallelMode,
    bounds,
    copy_weight,
    cut_shard,
    load_weight_shard,
)
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.modeling_utils import QuantConfig
from tensorrt_llm.quantization import QuantAlgo
from torch import Tensor, nn

from trtllm_ct.base.str_enum import StrEnum

if RELEASE.gptq_method:
    from tensorrt_llm._torch.modules.awq_methods import W4A16_GPTQ_LinearMethod

__all__ = [
    "Linear",
    "LinearMethodBase",
    "QuantConfig",
    "TensorParallelMode",
    "UnquantizedLinearMethod",
    "W4A16_AWQ_LinearMethod",
    "WeightMode",
    "WeightsLoadingConfig",
    "copy_weight",
    "get_quant_method",
    "load_weight_shard",
]


class WeightMode(StrEnum):
    """Which Linears of the checkpoint are fused into one Linear."""

    VANILLA = "vanilla"
    FUSED_QKV_LINEAR = "fused_qkv_linear"
    FUSED_GATE_UP_LINEAR = "fused_gate_up_linear"

    if RELEASE.mapping_argument:

        @property
        def shard_keys(self) -> list[str] | None:
            """The names of the shards in newer releases."""
            return {"fused_qkv_linear": ["q", "k", "v"], "fused_gate_up_linear": ["gate", "up"]}.get(self.value)


@dataclass(kw_only=True)
class WeightsLoadingConfig:
    """How a Linear is loaded."""

    weight_mode: WeightMode = WeightMode.VANILLA


_METHODS: dict[str, type[LinearMethodBase]] = {
    QuantAlgo.FP8: FP8QDQLinearMethod,
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: FP8RowwiseLinearMethod,
    QuantAlgo.FP8_BLOCK_SCALES: FP8BlockScalesLinearMethod,
    QuantAlgo.NVFP4: NVFP4LinearMethod,
    QuantAlgo.W4A8_NVFP4_FP8: W4A8NVFP4FP8LinearMethod,
    QuantAlgo.W4A8_MXFP4_FP8: W4A8MXFP4FP8LinearMethod,
    QuantAlgo.W4A8_MXFP4_MXFP8: W4A8MXFP4MXFP8LinearMethod,
    QuantAlgo.W8A16: WeightOnlyQuantLinearMethod,
    QuantAlgo.W4A16: WeightOnlyQuantLinearMethod,
    QuantAlgo.W4A16_AWQ: W4A16_AWQ_LinearMethod,
    QuantAlgo.W4A8_AWQ: W4A8_AWQ_LinearMethod,
}
if RELEASE.newest_algos:
    _METHODS |= {
        QuantAlgo.MXFP8: MXFP8LinearMethod,
        QuantAlgo.W4A16_NVFP4: W4A16NVFP4LinearMethod,
        QuantAlgo.NVFP4_ARC: NVFP4LinearMethod,
    }
if RELEASE.gptq_method:
    _METHODS[QuantAlgo.W4A16_GPTQ] = W4A16_GPTQ_LinearMethod


def get_quant_method(quant_config: QuantConfig | None = None) -> LinearMethodBase:
    """Return the method of an algorithm; raises ValueError for members of QuantAlgo without a method."""
    if quant_config is None or not quant_config.layer_quant_mode.has_any_quant(exclude_kv_cache=True):
        return UnquantizedLinearMethod()
    method = _METHODS.get(str(quant_config.layer_quant_mode.algo))
    if method is None:
        raise ValueError(f"unsupported quant mode: {quant_config.quant_mode}")
    return method()


class Linear(nn.Module):
    """Class `Linear`: one or several Linears of the checkpoint, sliced over the ranks of a tensor-parallel group."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    quant_method: LinearMethodBase
    tp_sharding: tuple[int, int] | None
    """The first and last feature of this rank, of a Linear that is sliced at its method's alignment."""
    # Attributes that the methods add.
    weight_scale: nn.Parameter
    weight_scale_2: nn.Parameter
    weight_zero: nn.Parameter
    kv_scales: nn.Parameter
    input_scale: Any
    inv_input_scale: Any
    pre_quant_scale: Any
    alpha_value: float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        mapping: Mapping | None = None,
        tensor_parallel_mode: TensorParallelMode | None = None,
        gather_output: bool = False,
        quant_config: QuantConfig | None = None,
        weights_loading_config: WeightsLoadingConfig | None = None,
        reduce_output: bool = True,
        skip_create_weights_in_init: bool = False,
        force_dynamic_quantization: bool = False,
    ) -> None:
        super().__init__()
        self.total_features = (out_features, in_features)
        self.has_bias = bias
        self.dtype = dtype or torch.bfloat16
        self.mapping = mapping or Mapping()
        self.quant_config = quant_config
        self.weights_loading_config = weights_loading_config or WeightsLoadingConfig()
        self.tp_size, self.tp_rank = self.mapping.tp_size, self.mapping.tp_rank
        self.tp_mode = tensor_parallel_mode
        self.gather_output = gather_output
        self.reduce_output = reduce_output
        self.force_dynamic_quantization = force_dynamic_quantization
        self._aligned = RELEASE.aligned_shards and not skip_create_weights_in_init and not self.is_fused
        self.tp_sharding = None
        self._weights_created = False
        if not self._aligned:
            self._require_divisible_features()
        if not skip_create_weights_in_init:
            self.create_weights()

    @property
    def is_fused(self) -> bool:
        return self.weights_loading_config.weight_mode != WeightMode.VANILLA

    def get_quant_method(self, quant_config: QuantConfig | None = None) -> LinearMethodBase:
        return get_quant_method(quant_config)

    def create_weights(self) -> None:
        """Choose the method and allocate the parameters; the configuration can't be changed afterwards."""
        if self._weights_created:
            return
        self.quant_method = self.get_quant_method(self.quant_config)
        self.out_features, self.in_features = self._local_features()
        self.quant_method.create_weights(self, self.in_features, self.out_features, self.has_bias, self.dtype)
        self._weights_created = True

    def _require_divisible_features(self) -> None:
        """Every release checks it in `Linear.__init__`; the newest only where `tp_sharding` is None."""
        if self.tp_mode is not None:
            cut = self.total_features[TensorParallelMode.split_dim(self.tp_mode)]
            assert cut % self.tp_size == 0, f"{cut} features must be divisible by tp_size {self.tp_size}"

    def _local_features(self) -> tuple[int, int]:
        rows, columns = self.total_features
        if self.tp_mode is None or self.tp_size == 1:
            return rows, columns
        cut = self.total_features[TensorParallelMode.split_dim(self.tp_mode)]
        local = cut // self.tp_size
        if self._aligned:
            self.tp_sharding = bounds(cut, self.quant_method.alignment(self), self.tp_size, self.tp_rank)
            local = self.tp_sharding[1] - self.tp_sharding[0]
        return (rows, local) if self.tp_mode == TensorParallelMode.ROW else (local, columns)

    @property
    def has_any_quant(self) -> bool:
        return self.quant_config is not None and self.quant_config.layer_quant_mode.has_any_quant(exclude_kv_cache=True)

    @property
    def quant_algo(self) -> str | None:
        """The algorithm, instead of the original's properties `has_fp8_qdq`, `has_nvfp4` and so on."""
        return self.quant_config.layer_quant_mode.algo if self.quant_config else None

    if RELEASE.aligned_shards:

        def load_shard(
            self,
            weights: dict[str, Tensor] | Tensor,
            label: str | None = None,
            device: torch.device | str = "cpu",
            name: str | None = None,
            flip_tp: bool = False,
            scale_span: int | None = None,
            elm_packing: int = 1,
        ) -> Tensor | None:
            """This rank's part of one tensor, of which an element along the cut stands for several features.

            `name` is the shard's, which only layouts of ranks that differ need. None for a tensor that isn't there.
            """
            if label is not None:
                if label not in weights:
                    return None
                weights = weights[label]
            assert isinstance(weights, Tensor)
            span = elm_packing * (scale_span or 1)
            mode = TensorParallelMode.flip(self.tp_mode) if flip_tp and self.tp_mode else None
            return cut_shard(self, weights.to(device), (span, span), mode)

    def load_weights(self, weights: list[dict[str, Tensor]], allow_partial_loading: bool = False) -> None:
        """Fill from one dictionary per shard, in the order q, k, v or gate, up."""
        assert self._weights_created
        mode = self.weights_loading_config.weight_mode
        more = {"allow_partial_loading": True} if allow_partial_loading else {}
        self.quant_method.load_weights(self, weights, mode, **more)

    def forward(self, input: Tensor, **_: Any) -> Tensor:  # noqa: A002 (upstream's name)
        """Row-parallel results are summed over the group, and rank 0 adds the bias."""
        if self.tp_mode == TensorParallelMode.ROW:
            bias = None if self.tp_rank > 0 else self.bias
            output = self.quant_method.apply(self, input, bias)
            return allreduce(output, self.mapping.tp_group) if self.reduce_output else output
        output = self.quant_method.apply(self, input, self.bias)
        return allgather(output, self.mapping.tp_group) if self.gather_output else output

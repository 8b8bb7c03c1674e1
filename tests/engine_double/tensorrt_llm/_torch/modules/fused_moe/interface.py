"""Imitates `fused_moe/interface.py`, `create_moe.py`, and the dispatch of `fused_moe_cutlass.py` and `_trtllm_gen`."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.distributed import allreduce
from tensorrt_llm._torch.modules.fused_moe import quantization as methods
from tensorrt_llm.quantization import QuantAlgo
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm.models.modeling_utils import QuantConfig

__all__ = ["MoE", "MoEWeightLoadingMode", "create_moe"]


class MoEWeightLoadingMode(enum.IntEnum):
    """How experts are stored: one by one, or stacked as `gate_up_proj` [E, K, 2N] and `down_proj` [E, N, K]."""

    VANILLA = 0
    FUSED_GATE_UP_PROJ = 1
    W4A8_CUSTOM = 2


Methods = dict[str, type[methods.ExpertMethod]]

_CUTLASS: Methods = {
    QuantAlgo.FP8: methods.FP8Experts,
    QuantAlgo.FP8_BLOCK_SCALES: methods.BlockExperts,
    QuantAlgo.NVFP4: methods.NVFP4Experts,
    QuantAlgo.W4A16_AWQ: methods.WInt4AFP8Experts,
    QuantAlgo.W4A8_AWQ: methods.WInt4AFP8Experts,
    QuantAlgo.W8A16: methods.Int8Experts,
    QuantAlgo.W4A8_MXFP4_FP8: methods.MXFP4Experts,
    QuantAlgo.W4A16_MXFP4: methods.CutlassMXFP4Experts,
    QuantAlgo.W4A8_MXFP4_MXFP8: methods.MXFP4Experts,
}
_TRTLLM: Methods = {
    QuantAlgo.FP8_BLOCK_SCALES: methods.BlockExperts,
    QuantAlgo.NVFP4: methods.NVFP4Experts,
    QuantAlgo.W4A16_MXFP4: methods.MXFP4Experts,
    QuantAlgo.W4A8_MXFP4_FP8: methods.MXFP4Experts,
    QuantAlgo.W4A8_MXFP4_MXFP8: methods.MXFP4Experts,
}
if RELEASE.newest_algos:
    _CUTLASS |= {QuantAlgo.W4A16_NVFP4: methods.W4A16NVFP4Experts, QuantAlgo.MXFP8: methods.MXFP8Experts}
if RELEASE.gptq_method:
    # All int4 modes with groups use the same method.
    _CUTLASS[QuantAlgo.W4A16_GPTQ] = methods.WInt4AFP8Experts


def _method(quant_config: QuantConfig | None, backend: str) -> methods.ExpertMethod:
    if quant_config is None or not quant_config.layer_quant_mode.has_any_quant(exclude_kv_cache=True):
        if backend == "TRTLLM" and not RELEASE.newest_algos:
            raise NotImplementedError("TRTLLM experts must be quantized")
        return methods.UnquantizedExperts()
    algo = str(quant_config.layer_quant_mode.algo)
    table = {"CUTLASS": _CUTLASS, "AUTO": _CUTLASS, "TRTLLM": _TRTLLM}[backend]
    if algo in table:
        return table[algo]()
    if backend == "TRTLLM":
        raise NotImplementedError(f"Unsupported quantization method by TRTLLMGenFusedMoE: {algo}")
    raise ValueError(f"Unsupported quantization mode: {algo}")


class MoE(nn.Module):
    """The routed experts of one layer, with one configuration; each rank holds some of them, or a slice of each."""

    # Attributes that the methods add.
    w3_w1_weight: nn.Parameter
    w2_weight: nn.Parameter
    w3_w1_scale: Tensor
    w2_scale: Tensor
    w3_w1_bias: nn.Parameter
    w2_bias: nn.Parameter

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        top_k: int,
        renormalize: bool,
        model_config: ModelConfig,
        weight_loading_mode: MoEWeightLoadingMode = MoEWeightLoadingMode.VANILLA,
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.biased = bias
        self.weight_loading_mode = weight_loading_mode
        self.gated = gated
        self.num_experts, self.top_k, self.renormalize = num_experts, top_k, renormalize
        self.hidden_size = hidden_size
        self.mapping = model_config.mapping
        self.dtype = model_config.torch_dtype
        self.moe_backend = model_config.moe_backend
        self.quant_config: QuantConfig | None = model_config.quant_config
        assert intermediate_size % self.mapping.moe_tp_size == 0
        self.intermediate_size_per_partition = intermediate_size // self.mapping.moe_tp_size
        self.expert_ids = self.mapping.ep_experts(num_experts)
        self._weights_created = False

    def create_weights(self) -> None:
        """Allocate the parameters once the configuration of the layer is known."""
        if not self._weights_created:
            self.quant_method = _method(self.quant_config, self.moe_backend)
            self.quant_method.create_weights(self)
            self._weights_created = True

    def load_weights(self, weights: list[dict[str, Tensor]], allow_partial_loading: bool = False) -> None:
        """Load from one dictionary with keys such as `0.w1.weight`, or with stacks of all experts."""
        assert not allow_partial_loading
        assert len(weights) == 1
        stacked = self.weight_loading_mode == MoEWeightLoadingMode.FUSED_GATE_UP_PROJ
        self.quant_method.load_weights(self, self._unstacked(weights[0]) if stacked else weights[0])
        if self.biased:
            for name, stored in (("w3_w1_bias", "gate_up_proj.bias"), ("w2_bias", "down_proj.bias")):
                self.register_parameter(name, nn.Parameter(weights[0][stored], requires_grad=False))

    def _unstacked(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of this rank's experts one by one; raises KeyError if there are no stacks."""
        single = {}
        for expert in self.expert_ids:
            single[f"{expert}.w1.weight"], single[f"{expert}.w3.weight"] = weights["gate_up_proj"][expert].T.chunk(2)
            single[f"{expert}.w2.weight"] = weights["down_proj"][expert].T
        return single

    def forward(self, hidden: Tensor, router_logits: Tensor) -> Tensor:
        """Return [tokens, hidden] of the experts that the router chooses."""
        method = type(self.quant_method).__name__
        if self.dtype not in self.quant_method.dtypes:
            raise NotImplementedError(f"{method} requires {self.quant_method.dtypes}, got {self.dtype}")
        shares, chosen = router_logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalize:
            shares = shares / shares.sum(-1, keepdim=True)
        output = torch.zeros_like(hidden)
        for at, expert in enumerate(self.expert_ids):
            share = (shares * (chosen == expert)).sum(-1, keepdim=True)
            output = output + share * self._expert(at, hidden)
        return allreduce(output, self.mapping.tp_group)

    def _expert(self, at: int, hidden: Tensor) -> Tensor:
        method = self.quant_method
        up, gate = method.dequantize(self, "w3_w1", at).chunk(2)
        values = method.scale_input(self, "w3_w1", at, hidden)
        values = functional.silu(values @ gate.T) * (values @ up.T)
        return method.scale_input(self, "w2", at, values) @ method.dequantize(self, "w2", at).T


def create_moe(**arguments: Any) -> MoE:
    """Return the experts of one layer, in a wrapper where the release has one."""
    if not RELEASE.wraps_experts:
        return MoE(**arguments)
    from tensorrt_llm._torch.modules.fused_moe.configurable_moe import ConfigurableMoE

    return ConfigurableMoE(**arguments)

"""Tiny models: random delivered tensors, and a slow decoder that computes the weights they encode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from installed_transformers import in_dtype, typed_config
from torch import Tensor

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GROUP = 4
LAYERS = {
    QuantAlgo.W4A16: LayerQuantConfig(quant_algo=QuantAlgo.W4A16),
    QuantAlgo.W4A16_AWQ: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=GROUP),
    QuantAlgo.W4A16_GPTQ: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_GPTQ, group_size=GROUP, has_zero_point=True),
    QuantAlgo.W8A16: LayerQuantConfig(quant_algo=QuantAlgo.W8A16),
    QuantAlgo.FP8: LayerQuantConfig(quant_algo=QuantAlgo.FP8),
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: LayerQuantConfig(quant_algo=QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN),
    QuantAlgo.FP8_BLOCK_SCALES: LayerQuantConfig(quant_algo=QuantAlgo.FP8_BLOCK_SCALES),
    QuantAlgo.NVFP4: LayerQuantConfig(quant_algo=QuantAlgo.NVFP4, group_size=16),
    QuantAlgo.W4A16_NVFP4: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_NVFP4, group_size=16),
    QuantAlgo.MXFP8: LayerQuantConfig(quant_algo=QuantAlgo.MXFP8, group_size=32),
    QuantAlgo.W4A16_MXFP4: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_MXFP4),
    QuantAlgo.W4A8_MXFP4_MXFP8: LayerQuantConfig(quant_algo=QuantAlgo.W4A8_MXFP4_MXFP8),
}
# The number of columns that share a scale; in FP8_BLOCK_SCALES, 128 rows share it too.
GROUPS = {
    QuantAlgo.W4A16_AWQ: GROUP,
    QuantAlgo.W4A16_GPTQ: GROUP,
    QuantAlgo.FP8_BLOCK_SCALES: 128,
    QuantAlgo.NVFP4: 16,
    QuantAlgo.W4A16_NVFP4: 16,
    QuantAlgo.MXFP8: 32,
    QuantAlgo.W4A16_MXFP4: 32,
    QuantAlgo.W4A8_MXFP4_MXFP8: 32,
}
ROW_PAIRS = {QuantAlgo.W4A16, QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ}
COLUMN_PAIRS = {QuantAlgo.NVFP4, QuantAlgo.W4A16_NVFP4, QuantAlgo.W4A16_MXFP4, QuantAlgo.W4A8_MXFP4_MXFP8}

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
# Mixtures of four experts, in sizes that every format divides.
MOE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
LOCAL = {"num_local_experts": 4}
COUNTED = {"num_experts": 4}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FULL_ATTENTION = {"layer_types": ["full_attention", "full_attention"]}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": {**COUNTED, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**COUNTED, "norm_topk_prob": True},
    "deepseek_v2": {**ROUTED, **MLA, "topk_method": "greedy"},
    "deepseek_v3": {**ROUTED, **MLA, "n_group": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_end_index": 1},
    "exaone_moe": {**COUNTED, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "gpt_oss": {**LOCAL, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 16},
    "hy_v3": {**COUNTED, "num_shared_experts": 1},
    "laguna": {
        **COUNTED,
        "num_attention_heads_per_layer": [4, 4],
        "shared_expert_intermediate_size": 16,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2_moe": {**COUNTED, **FULL_ATTENTION, "num_dense_layers": 1},
    "mimo_v2_flash": ROUTED,
    "minimax": {**LOCAL, **FULL_ATTENTION},
    "minimax_m2": LOCAL,
    "phimoe": LOCAL,
}
ARCHITECTURES |= {name: {**MOE, "model_type": name, **fields} for name, fields in MIXTURES.items()}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Run on one thread: tiny tensors gain nothing from more, and on busy cores synchronization costs minutes."""
    torch.set_num_threads(1)


@pytest.fixture
def random_linear() -> Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]]:
    """`random_linear(algo, N, K)` returns a layer config and random delivered tensors with arbitrary scales."""

    def build(algo: QuantAlgo, rows: int, columns: int, seed: int = 0) -> tuple[LayerQuantConfig, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def scale(*shape: int) -> Tensor:
            return 0.01 + 0.1 * torch.rand(shape, generator=generator)

        def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, dtype=dtype, generator=generator)

        groups = (rows, columns // GROUPS.get(algo, columns))
        packed = integers(0, 256, torch.uint8, rows // 2, columns)
        fp8 = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        fp4 = integers(0, 256, torch.uint8, rows, columns // 2)
        halves = integers(1, 5, torch.int8, columns).to(torch.bfloat16) / 2
        nvfp4 = {"weight_scale": (40 * scale(*groups)).to(torch.float8_e4m3fn), "weight_scale_2": scale()}
        tensors = {
            QuantAlgo.W4A16: lambda: {"weight": packed, "weight_scale": scale(rows)},
            QuantAlgo.W4A16_AWQ: lambda: {
                "weight": packed,
                "weight_scale": scale(*groups),
                "pre_quant_scale": halves,
            },
            QuantAlgo.W4A16_GPTQ: lambda: {
                "weight": packed,
                "weight_scale": scale(*groups),
                "weight_zero": scale(*groups) - 0.05,
            },
            QuantAlgo.W8A16: lambda: {
                "weight": integers(-128, 128, torch.int8, rows, columns),
                "weight_scale": scale(rows) / 16,
            },
            QuantAlgo.FP8: lambda: {"weight": fp8, "weight_scale": scale(), "input_scale": scale()},
            QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: lambda: {"weight": fp8, "weight_scale": scale(rows)},
            QuantAlgo.FP8_BLOCK_SCALES: lambda: {
                "weight": fp8,
                "weight_scale": scale(-(-rows // 128), -(-columns // 128)),
            },
            QuantAlgo.NVFP4: lambda: {"weight": fp4, **nvfp4, "input_scale": scale() / 100},
            QuantAlgo.W4A16_NVFP4: lambda: {"weight": fp4, **nvfp4},
            QuantAlgo.MXFP8: lambda: {"weight": fp8, "weight_scale": integers(120, 130, torch.uint8, *groups)},
            QuantAlgo.W4A16_MXFP4: lambda: {"weight": fp4, "weight_scale": integers(120, 130, torch.uint8, *groups)},
            QuantAlgo.W4A8_MXFP4_MXFP8: lambda: {
                "weight": fp4,
                "weight_scale": integers(120, 130, torch.uint8, *groups),
            },
        }[algo]()
        return LAYERS[algo], tensors

    return build


def decode_code(algo: QuantAlgo, weight: Tensor, row: int, column: int) -> float:
    """The value of one code, decoded from its bits."""
    if algo in ROW_PAIRS:
        byte = int(weight.view(torch.uint8)[row // 2, column])
        nibble = byte % 16 if row % 2 == 0 else byte // 16
        return float(nibble - 16 if nibble > 7 else nibble)
    if algo in COLUMN_PAIRS:
        byte = int(weight[row, column // 2])
        nibble = byte % 16 if column % 2 == 0 else byte // 16
        sign, exponent, mantissa = nibble // 8, nibble // 2 % 4, nibble % 2
        magnitude = 0.5 * mantissa if exponent == 0 else (1 + 0.5 * mantissa) * 2 ** (exponent - 1)
        return -magnitude if sign else magnitude
    return float(weight[row, column])


def decode_scale(algo: QuantAlgo, tensors: dict[str, Tensor], row: int, column: int) -> float:
    """The scale that the code at this position is multiplied with."""
    scale = tensors["weight_scale"]
    if algo is QuantAlgo.FP8:
        return float(scale)
    if scale.dim() == 1:
        return float(scale[row])
    entry = float(scale[row // 128 if algo is QuantAlgo.FP8_BLOCK_SCALES else row, column // GROUPS[algo]])
    if scale.dtype == torch.uint8:
        return 2.0 ** (entry - 127)
    return entry * float(tensors.get("weight_scale_2", 1.0))


@pytest.fixture
def decode_slowly() -> Callable[[QuantAlgo, dict[str, Tensor]], Tensor]:
    """`decode_slowly(algo, tensors)` returns the float64 weight, decoded element by element from the layout."""

    def element(algo: QuantAlgo, tensors: dict[str, Tensor], row: int, column: int) -> float:
        zero = float(tensors["weight_zero"][row, column // GROUP]) if "weight_zero" in tensors else 0.0
        return decode_code(algo, tensors["weight"], row, column) * decode_scale(algo, tensors, row, column) + zero

    def decode(algo: QuantAlgo, tensors: dict[str, Tensor]) -> Tensor:
        rows, columns = tensors["weight"].shape
        rows, columns = rows * (2 if algo in ROW_PAIRS else 1), columns * (2 if algo in COLUMN_PAIRS else 1)
        values = [[element(algo, tensors, row, column) for column in range(columns)] for row in range(rows)]
        return torch.tensor(values, dtype=torch.float64)

    return decode


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """`save_tiny("qwen2")` returns a directory with a random model of that architecture, written by transformers."""

    def save(architecture: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(7)
        config = typed_config(**(TINY | ARCHITECTURES[architecture] | fields))
        model = AutoModelForCausalLM.from_config(config, **in_dtype(dtype))
        with torch.no_grad():
            routers = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
            for tensor in [*model.parameters(), *routers]:  # some are initialized to one or zero, which hides mistakes
                tensor.add_(0.1 * torch.randn(tensor.shape))
        directory = tmp_path / architecture
        model.save_pretrained(directory)
        return directory

    return save

"""Tiny models, and random delivered tensors of single Linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from delivered_linears import decode_slowly, random_linear
from installed_transformers import in_dtype, typed_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.quant_config import LayerQuantConfig

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


@pytest.fixture(name="random_linear")
def fixture_random_linear() -> Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]]:
    """`random_linear(algo, N, K)` returns a layer config and random delivered tensors with arbitrary scales."""
    return random_linear


@pytest.fixture(name="decode_slowly")
def fixture_decode_slowly() -> Callable[[QuantAlgo, dict[str, Tensor]], Tensor]:
    """`decode_slowly(algo, tensors)` returns the float64 weight, decoded element by element from the layout."""
    return decode_slowly


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

"""Tiny models: delivered tensors made at random, and the plain weights that they stand for, decoded the slow way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from trtllm_ct.quant_config import LayerQuantConfig
from trtllm_ct.schemes import QuantAlgo

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
}

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


@pytest.fixture
def random_linear() -> Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]]:
    """`random_linear(algo, N, K)`: a layer config and random delivered tensors, their scales off any grid."""

    def build(algo: QuantAlgo, rows: int, columns: int, seed: int = 0) -> tuple[LayerQuantConfig, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def scale(*shape: int) -> Tensor:
            return 0.01 + 0.1 * torch.rand(shape, generator=generator)

        groups = (rows, columns // GROUP)
        packed = torch.randint(0, 256, (rows // 2, columns), dtype=torch.uint8, generator=generator)
        int8 = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
        fp8 = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        tensors = {
            QuantAlgo.W4A16: lambda: {"weight": packed, "weight_scale": scale(rows)},
            QuantAlgo.W4A16_AWQ: lambda: {
                "weight": packed,
                "weight_scale": scale(*groups),
                "pre_quant_scale": torch.randint(1, 5, (columns,), generator=generator).to(torch.bfloat16) / 2,
            },
            QuantAlgo.W4A16_GPTQ: lambda: {
                "weight": packed,
                "weight_scale": scale(*groups),
                "weight_zero": scale(*groups) - 0.05,
            },
            QuantAlgo.W8A16: lambda: {"weight": int8, "weight_scale": scale(rows) / 16},
            QuantAlgo.FP8: lambda: {"weight": fp8, "weight_scale": scale().reshape(()), "input_scale": scale()},
            QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: lambda: {"weight": fp8, "weight_scale": scale(rows)},
        }[algo]()
        return LAYERS[algo], tensors

    return build


@pytest.fixture
def decode_slowly() -> Callable[[QuantAlgo, dict[str, Tensor]], Tensor]:
    """`decode_slowly(algo, tensors)`: the weight in float64, element by element from the published layout."""

    def element(algo: QuantAlgo, tensors: dict[str, Tensor], row: int, column: int) -> float:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        if algo in {QuantAlgo.W4A16, QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ}:
            byte = int(weight.view(torch.uint8)[row // 2, column])
            nibble = byte % 16 if row % 2 == 0 else byte // 16
            code = float(nibble - 16 if nibble > 7 else nibble)
        else:
            code = float(weight[row, column])
        if algo is QuantAlgo.FP8:
            return code * float(scale)
        if scale.dim() == 1:
            return code * float(scale[row])
        zero = float(tensors["weight_zero"][row, column // GROUP]) if "weight_zero" in tensors else 0.0
        return code * float(scale[row, column // GROUP]) + zero

    def decode(algo: QuantAlgo, tensors: dict[str, Tensor]) -> Tensor:
        packed = algo in {QuantAlgo.W4A16, QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ}
        rows, columns = tensors["weight"].shape[0] * (2 if packed else 1), tensors["weight"].shape[1]
        values = [[element(algo, tensors, row, column) for column in range(columns)] for row in range(rows)]
        return torch.tensor(values, dtype=torch.float64)

    return decode


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """`save_tiny("qwen2")`: a directory with a random model of that architecture, written by transformers."""

    def save(architecture: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(7)
        config = AutoConfig.for_model(**(TINY | ARCHITECTURES[architecture] | fields))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases start at one and zero, which hides mistakes
                parameter.add_(0.1 * torch.randn(parameter.shape))
        directory = tmp_path / architecture
        model.save_pretrained(directory)
        return directory

    return save

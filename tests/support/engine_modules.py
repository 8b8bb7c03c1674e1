"""Single modules of the engine double, for tests of one Linear or of the experts of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["experts", "fp8", "int4", "int8", "linear", "load", "nvfp4"]


def linear(algo: str, rows: int = 64, columns: int = 256, fused: str = "", rank: int = 0, **more: Any) -> Any:
    from tensorrt_llm._torch.modules.linear import Linear, WeightMode, WeightsLoadingConfig
    from tensorrt_llm._torch.pyexecutor.model_loader import uninitialized_memory_is_poison
    from tensorrt_llm.mapping import Mapping
    from tensorrt_llm.models.modeling_utils import QuantConfig

    size = more.pop("size", 1)
    mode = WeightMode[f"FUSED_{fused}_LINEAR" if fused else "VANILLA"]
    with uninitialized_memory_is_poison():
        return Linear(
            columns,
            rows,
            bias=more.pop("bias", False),
            mapping=Mapping(world_size=size, tp_size=size, rank=rank),
            quant_config=QuantConfig(quant_algo=algo, has_zero_point=algo == "W4A16_GPTQ"),
            weights_loading_config=WeightsLoadingConfig(weight_mode=mode),
            **more,
        )


def load(module: Any, *weights: dict[str, Tensor]) -> Tensor:
    """Load a Linear and return its output for ones."""
    from tensorrt_llm._torch.pyexecutor.model_loader import uninitialized_memory_is_poison

    with uninitialized_memory_is_poison():
        module.load_weights(weights=list(weights))
    result: Tensor = module(torch.ones(1, module.in_features))
    return result


def fp8(rows: int = 64, columns: int = 256, **scales: float | Tensor) -> dict[str, Tensor]:
    codes = torch.ones(rows, columns).to(torch.float8_e4m3fn)
    return {"weight": codes} | {name: torch.as_tensor(value) for name, value in scales.items()}


def nvfp4(rows: int = 64, columns: int = 256, **scalars: float) -> dict[str, Tensor]:
    ones = {"weight": torch.full((rows, columns // 2), 0x22, dtype=torch.uint8)}
    scales = {"weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)}
    return ones | scales | {name: torch.tensor(value) for name, value in scalars.items()}


def int8(rows: int = 64, columns: int = 256, **more: Tensor) -> dict[str, Tensor]:
    return {"weight": torch.ones(rows, columns, dtype=torch.int8), "weight_scale": torch.ones(rows)} | more


def int4(rows: int = 64, columns: int = 256, group: int | None = None, **more: Tensor) -> dict[str, Tensor]:
    """Codes of 1 with scales of 1, one per row or one per group."""
    scale = torch.ones(rows) if group is None else torch.ones(rows, columns // group)
    return {"weight": torch.full((rows // 2, columns), 0x11, dtype=torch.uint8), "weight_scale": scale} | more


def experts(algo: str | None, size: int = 1, **parts: int) -> list[Any]:
    from tensorrt_llm._torch.model_config import ModelConfig, PretrainedConfig
    from tensorrt_llm._torch.modules.fused_moe.interface import MoE
    from tensorrt_llm.mapping import Mapping
    from tensorrt_llm.models.modeling_utils import QuantConfig

    ranks = []
    for rank in range(size):
        config = ModelConfig(
            mapping=Mapping(world_size=size, tp_size=size, rank=rank, **parts),
            quant_config=QuantConfig(quant_algo=algo),
            pretrained_config=PretrainedConfig(),
        )
        module = MoE(
            num_experts=4, hidden_size=256, intermediate_size=128, top_k=2, renormalize=True, model_config=config
        )
        module.create_weights()
        ranks.append(module)
    return ranks

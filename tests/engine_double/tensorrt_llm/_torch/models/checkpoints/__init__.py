"""Imitates `_torch/models/checkpoints/__init__.py`: importing it registers what is built in."""

from tensorrt_llm._torch.models.checkpoints.base_checkpoint_loader import BaseCheckpointLoader
from tensorrt_llm._torch.models.checkpoints.base_config_loader import BaseConfigLoader
from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader
from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import BaseWeightMapper
from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader
from tensorrt_llm._torch.models.checkpoints.hf.config_loader import HfConfigLoader
from tensorrt_llm._torch.models.checkpoints.hf.decoder_weight_mappers import (
    AfmoeHfWeightMapper,
    LagunaHfWeightMapper,
    NemotronHHfWeightMapper,
)
from tensorrt_llm._torch.models.checkpoints.hf.qwen2_moe_weight_mapper import Qwen2MoeHfWeightMapper
from tensorrt_llm._torch.models.checkpoints.hf.qwen3_5_weight_mapper import Qwen3_5MoeHfWeightMapper
from tensorrt_llm._torch.models.checkpoints.hf.qwen3_next_weight_mapper import Qwen3NextHfWeightMapper
from tensorrt_llm._torch.models.checkpoints.hf.weight_loader import HfWeightLoader
from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper

__all__ = [
    "AfmoeHfWeightMapper",
    "BaseCheckpointLoader",
    "BaseConfigLoader",
    "BaseWeightLoader",
    "BaseWeightMapper",
    "HfCheckpointLoader",
    "HfConfigLoader",
    "HfWeightLoader",
    "HfWeightMapper",
    "LagunaHfWeightMapper",
    "NemotronHHfWeightMapper",
    "Qwen2MoeHfWeightMapper",
    "Qwen3NextHfWeightMapper",
    "Qwen3_5MoeHfWeightMapper",
]

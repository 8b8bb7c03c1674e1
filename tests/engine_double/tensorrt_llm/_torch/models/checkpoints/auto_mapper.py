"""Imitates `checkpoints/auto_mapper.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPER_MAPPING

if TYPE_CHECKING:
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import BaseWeightMapper

__all__ = ["AutoCheckpointMapper"]


class AutoCheckpointMapper:
    """Finds a mapper by format and architecture."""

    @staticmethod
    def get(format: str, name: str | None = None) -> BaseWeightMapper:  # noqa: A002 (upstream's name)
        """Return the mapper of the architecture, else of the format; raises KeyError if none is registered."""
        mappers = MODEL_CLASS_MAPPER_MAPPING
        key = f"{name}_{format}"
        mapper: BaseWeightMapper = mappers[key if key in mappers else format]()
        return mapper

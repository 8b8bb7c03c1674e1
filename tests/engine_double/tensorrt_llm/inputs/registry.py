"""Imitates `inputs/registry.py`: the preparation of prompts, for which the parent reads the configuration again."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tensorrt_llm._torch.model_config import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["create_input_processor"]


def create_input_processor(model_dir: Path, tokenizer: Any, checkpoint_format: str | None = "HF") -> Any:
    """The tokenizer; for format HF the configuration is parsed, and only two kinds of errors are swallowed.

    Upstream it is open which format is passed when only a loader was given; here it is HF, the stricter case.
    """
    if checkpoint_format in {None, "HF"}:
        with suppress(ValueError, OSError):
            ModelConfig.from_pretrained(model_dir, trust_remote_code=True)
    return tokenizer

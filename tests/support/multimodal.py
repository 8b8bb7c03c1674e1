"""Checkpoints of models that hold a text model beside a vision tower and a projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from builders import Built
    from torch import Tensor

# The prefix of the text model's body, and its head: before transformers 4.52, since, and in wrappers.
PLACES = {
    "language_model.model.": "language_model.lm_head",
    "model.language_model.": "lm_head",
    "model.language_model.model.": "model.language_model.lm_head",
    "model.": "lm_head",
}
VISION = {
    "vision_tower.patch_embed.weight": (8, 3, 2, 2),
    "vision_tower.blocks.0.attn.qkv.weight": (24, 8),
    "vision_tower.blocks.0.attn.qkv.bias": (24,),
    "vision_tower.position_embedding": (16, 8),
    "multi_modal_projector.linear_1.weight": (64, 8),
}
MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "fp8-channel-token"),
    "o_proj": "int8-channel",
    **dict.fromkeys(("gate_proj", "up_proj"), "int4-g64"),
    "down_proj": "int4-g32",
}


def renamed(name: str, body: str) -> str:
    """Return the name that a module of a text model has inside of a multimodal model."""
    if name.startswith("model."):
        return body + name.removeprefix("model.")
    return PLACES.get(body, "lm_head") + name.removeprefix("lm_head") if name.startswith("lm_head") else name


def write_multimodal(
    directory: Path,
    body: str,
    *,
    text: dict[str, Any] | None = None,
    architecture: str = "LlavaNextForConditionalGeneration",
    vision: Mapping[str, tuple[int, ...]] = VISION,
    kinds: tuple[str, str | None] = ("llava_next", None),
    **options: Any,
) -> Built:
    """A text model under a prefix, beside a plain vision tower and a projector.

    `kinds` are the `model_type` of the whole and of the text model, None to keep that of `text`.
    Modules of the default class are delivered under the names in the files, whatever these are.
    """
    config = text or tiny_config(hidden=128, kv_heads=4, model_type="mistral")
    built = write_checkpoint(directory, **({"config": config, "scheme": MIXED} | options))

    def place(stored: dict[str, Tensor]) -> None:
        for name in list(stored):
            stored[renamed(name, body)] = stored.pop(name)
        stored |= {name: torch.randn(shape).bfloat16() for name, shape in vision.items()}

    def nest(document: dict[str, Any]) -> None:
        nested = {key: document.pop(key) for key in list(document) if key not in {"quantization_config", "dtype"}}
        document |= {
            "architectures": [architecture],
            "model_type": kinds[0],
            "text_config": nested | ({} if kinds[1] is None else {"model_type": kinds[1]}),
            "vision_config": {"model_type": "pixtral"},
        }
        block = document["quantization_config"]
        block["ignore"] = [renamed(entry, body) for entry in block["ignore"]]
        for group in block["config_groups"].values():
            group["targets"] = [renamed(target, body) for target in group["targets"]]

    rewrite(directory, place)
    rewrite_config(directory, nest)
    return built

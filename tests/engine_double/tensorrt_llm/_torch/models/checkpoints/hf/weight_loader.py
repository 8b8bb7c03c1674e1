"""Imitates `checkpoints/hf/weight_loader.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader, ConsumableWeightsDict
from tensorrt_llm._torch.models.modeling_utils import register_checkpoint_weight_loader

if TYPE_CHECKING:
    from tensorrt_llm.mapping import Mapping
    from torch import Tensor

__all__ = ["HfWeightLoader", "read_files"]


@register_checkpoint_weight_loader("HF")
class HfWeightLoader(BaseWeightLoader):
    """Loads whole files on every rank; files named consolidated only if there are no other files."""

    if RELEASE.mapping_argument:

        def load_weights(self, checkpoint_dir: str, mapping: Mapping, **_: Any) -> Any:
            return ConsumableWeightsDict(read_files(checkpoint_dir))
    else:

        def load_weights(self, checkpoint_dir: str, **_: Any) -> Any:  # type: ignore[misc]
            return read_files(checkpoint_dir)


def read_files(checkpoint_dir: str) -> dict[str, Tensor]:
    """Read the weight files of a directory; raises if it has none."""
    from safetensors.torch import load_file

    directory = Path(checkpoint_dir)
    files = sorted(directory.glob("*.safetensors"))
    files = [file for file in files if "consolidated" not in file.name] or files
    if not files:
        raise RuntimeError(f"No weight files found in {directory}.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}

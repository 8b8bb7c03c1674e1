"""Load compressed-tensors checkpoints into TensorRT-LLM.

Public names resolve on first use: importing this package loads neither torch nor transformers nor TensorRT-LLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.compressed_io import load_compressed, save_compressed
    from trtllm_ct.config.reader import CompressedTensorsConfigReader
    from trtllm_ct.config_loader import CompressedTensorsConfigLoader
    from trtllm_ct.convert import convert_checkpoint
    from trtllm_ct.detect import FormatDetector
    from trtllm_ct.doctor import diagnose
    from trtllm_ct.inspection import inspect_checkpoint
    from trtllm_ct.installation import install, uninstall
    from trtllm_ct.llm import LLM, SamplingParams
    from trtllm_ct.loader import CompressedTensorsWeightLoader
    from trtllm_ct.mapper import CompressedTensorsWeightMapper
    from trtllm_ct.pipeline import open_checkpoint, plan_checkpoint
    from trtllm_ct.plan.architectures import Model
    from trtllm_ct.plan.planner import make_plan
    from trtllm_ct.targets import TARGETS
    from trtllm_ct.targets.trtllm_torch.bindings import (
        CompressedTensorsCheckpointLoader as CompressedTensorsCheckpointLoader,
    )
    from trtllm_ct.targets.trtllm_torch.prepare import prepare
    from trtllm_ct.verify import verify_checkpoint

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "TARGETS",
    "Catalog",
    "CompressedTensorsConfigLoader",
    "CompressedTensorsConfigReader",
    "CompressedTensorsWeightLoader",
    "CompressedTensorsWeightMapper",
    "FormatDetector",
    "Model",
    "SamplingParams",
    "__version__",
    "convert_checkpoint",
    "diagnose",
    "inspect_checkpoint",
    "install",
    "load_compressed",
    "make_plan",
    "open_checkpoint",
    "plan_checkpoint",
    "prepare",
    "save_compressed",
    "uninstall",
    "verify_checkpoint",
]

_ENGINE_HOME = "targets.trtllm_torch.bindings"
_HOMES = {
    "LLM": "llm",
    "TARGETS": "targets",
    "Catalog": "checkpoint.catalog",
    # Not in `__all__`: it needs TensorRT-LLM.
    "CompressedTensorsCheckpointLoader": _ENGINE_HOME,
    "CompressedTensorsConfigLoader": "config_loader",
    "CompressedTensorsConfigReader": "config.reader",
    "CompressedTensorsWeightLoader": "loader",
    "CompressedTensorsWeightMapper": "mapper",
    "FormatDetector": "detect",
    "Model": "plan.architectures",
    "SamplingParams": "llm",
    "convert_checkpoint": "convert",
    "diagnose": "doctor",
    "inspect_checkpoint": "inspection",
    "install": "installation",
    "load_compressed": "compressed_io",
    "make_plan": "plan.planner",
    "open_checkpoint": "pipeline",
    "plan_checkpoint": "pipeline",
    "prepare": "targets.trtllm_torch.prepare",
    "save_compressed": "compressed_io",
    "uninstall": "installation",
    "verify_checkpoint": "verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == _ENGINE_HOME:
        import_module(f"{__name__}.llm").require_engine()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

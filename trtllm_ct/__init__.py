"""Load compressed-tensors checkpoints into TensorRT-LLM.

Public names are imported on first use, so that `import trtllm_ct` imports neither torch nor transformers nor
TensorRT-LLM.
"""

from __future__ import annotations

TYPE_CHECKING = False  # The command line can't handle Ctrl-C before this file is done, and `typing` takes long.
if TYPE_CHECKING:
    from trtllm_ct.base.version import __version__ as __version__
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.cli.doctor import diagnose
    from trtllm_ct.config.detect import FormatDetector
    from trtllm_ct.config.reader import CompressedTensorsConfigReader
    from trtllm_ct.convert.convert import convert_checkpoint
    from trtllm_ct.engine.target import TARGETS
    from trtllm_ct.formats.sparse.compressed_io import (
        BitmaskConfig,
        load_compressed,
        save_compressed,
        save_compressed_model,
    )
    from trtllm_ct.pipeline.config_loader import CompressedTensorsConfigLoader, to_quant_config
    from trtllm_ct.pipeline.inspection import inspect_checkpoint
    from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader
    from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
    from trtllm_ct.pipeline.weight_mapper import CompressedTensorsWeightMapper
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.options import PlanOptions
    from trtllm_ct.plan.planner import make_plan
    from trtllm_ct.serve.bindings import CompressedTensorsCheckpointLoader as CompressedTensorsCheckpointLoader
    from trtllm_ct.serve.installation import install, uninstall
    from trtllm_ct.serve.llm import LLM, SamplingParams
    from trtllm_ct.serve.prepare import prepare
    from trtllm_ct.verify.verify import verify_checkpoint

__all__ = [
    "LLM",
    "TARGETS",
    "BitmaskConfig",
    "Catalog",
    "CompressedTensorsConfigLoader",
    "CompressedTensorsConfigReader",
    "CompressedTensorsWeightLoader",
    "CompressedTensorsWeightMapper",
    "FormatDetector",
    "Model",
    "PlanOptions",
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
    "save_compressed_model",
    "to_quant_config",
    "uninstall",
    "verify_checkpoint",
]

_ENGINE_HOME = "serve.bindings"
_HOMES = {
    "LLM": "serve.llm",
    "TARGETS": "engine.target",
    "BitmaskConfig": "formats.sparse.compressed_io",
    "Catalog": "checkpoint.catalog",
    # Not in `__all__`, because it needs TensorRT-LLM.
    "CompressedTensorsCheckpointLoader": _ENGINE_HOME,
    "CompressedTensorsConfigLoader": "pipeline.config_loader",
    "CompressedTensorsConfigReader": "config.reader",
    "CompressedTensorsWeightLoader": "pipeline.loader",
    "CompressedTensorsWeightMapper": "pipeline.weight_mapper",
    "FormatDetector": "config.detect",
    "Model": "plan.models.sites",
    "PlanOptions": "plan.options",
    "SamplingParams": "serve.llm",
    "__version__": "base.version",
    "convert_checkpoint": "convert.convert",
    "diagnose": "cli.doctor",
    "inspect_checkpoint": "pipeline.inspection",
    "install": "serve.installation",
    "load_compressed": "formats.sparse.compressed_io",
    "make_plan": "plan.planner",
    "open_checkpoint": "pipeline.open",
    "plan_checkpoint": "pipeline.open",
    "prepare": "serve.prepare",
    "save_compressed": "formats.sparse.compressed_io",
    "save_compressed_model": "formats.sparse.compressed_io",
    "to_quant_config": "pipeline.config_loader",
    "uninstall": "serve.installation",
    "verify_checkpoint": "verify.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from trtllm_ct.base.packages import missing_packages_as_errors

    if _HOMES[name] == _ENGINE_HOME:
        import_module(f"{__name__}.serve.llm").require_engine()
    with missing_packages_as_errors():
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Imitates `llmapi/llm_utils.py`: what the parent process reads before any loader is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.model_config import mxfp4_algo
from tensorrt_llm.logger import logger
from tensorrt_llm.models.modeling_utils import QuantConfig
from tensorrt_llm.quantization import QuantAlgo
from tensorrt_llm.quantization.modelopt_config import is_modelopt, read_algo, read_modelopt_quant_config

if RELEASE.ct_parser is not None:
    from tensorrt_llm.models.quant_config_utils import update_quant_config_from_compressed_tensors

if TYPE_CHECKING:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

__all__ = ["CachedModelLoader"]


class CachedModelLoader:
    """Class `CachedModelLoader`: finds the directory, and parses its quantization even if a loader was given."""

    def __init__(self, llm_args: TorchLlmArgs) -> None:
        self.llm_args = llm_args
        self._model_dir = Path()

    def __call__(self) -> Path:
        """Return the local directory; raises if its configuration can't be read."""
        self._model_dir = _local_directory(self.llm_args.model, self.llm_args.revision)
        given = self.llm_args.quant_config
        if given is not None and given.quant_algo is not None:
            logger.warning("QuantConfig for pytorch backend is ignored.")
        self._update_from_hf_quant_config()
        return self._model_dir

    def _update_from_hf_quant_config(self) -> bool:
        """Whether the checkpoint is quantized; it is always called, so its errors come first."""
        inline = self._inline_block()
        path = self._model_dir / "hf_quant_config.json"
        if path.exists():
            quantization = read_modelopt_quant_config(json.loads(path.read_text()))
            by_layer = quantization.get("quantized_layers") and inline is not None and RELEASE.newest_algos
            if quantization.get("quant_algo") is None and by_layer:
                quantization = read_modelopt_quant_config(inline) | quantization
            self._apply(quantization)
            return True
        if inline is None or (inline.get("quant_method") is None and not is_modelopt(inline)):
            return False
        if is_modelopt(inline):
            self._apply(read_modelopt_quant_config(inline))
        else:
            self.llm_args.quant_config = _other_quantization(inline)
        return True

    def _inline_block(self) -> dict[str, Any] | None:
        config = json.loads((self._model_dir / "config.json").read_text())
        block: dict[str, Any] | None = config.get("quantization_config")
        if RELEASE.model_kwargs:
            block = (self.llm_args.model_kwargs or {}).get("quantization_config", block)
        return block

    def _apply(self, quantization: dict[str, Any]) -> None:
        """Set every key as an attribute; the newest release warns about keys that aren't fields."""
        algo = read_algo(quantization.pop("quant_algo", None))
        if algo is None:
            raise ValueError("Pre-quantized checkpoint must have quant_algo.")
        cache = read_algo(quantization.pop("kv_cache_quant_algo", None))
        config = QuantConfig(quant_algo=algo, kv_cache_quant_algo=cache)
        if RELEASE.strict_quant_config:
            quantization.pop("quantized_layers", None)
        for name, value in quantization.items():
            if RELEASE.strict_quant_config and name not in config.model_dump():
                logger.warning("Ignoring unknown field '%s' from HF quant config (not a QuantConfig field).", name)
                continue
            setattr(config, name, value)
        self.llm_args.quant_config = config


def _other_quantization(block: dict[str, Any]) -> QuantConfig:
    """The parent's variant of the worker's function: it raises for unknown quantization methods."""
    method, config = block.get("quant_method"), QuantConfig()
    if method == "fp8" and block.get("weight_block_size"):
        config.quant_algo, config.exclude_modules = QuantAlgo.FP8_BLOCK_SCALES, ["*eh_proj"]
    elif method == "fp8" and RELEASE.newest_algos:
        config.quant_algo = QuantAlgo.FP8
    elif method == "mxfp4":
        config.quant_algo, config.group_size = mxfp4_algo(), 32
    elif method in {"mxfp8", "nvfp4"} and RELEASE.newest_algos:
        config.quant_algo = QuantAlgo(method.upper())
    elif method == "compressed-tensors" and RELEASE.ct_parser is not None:
        update_quant_config_from_compressed_tensors(config, block)
    elif method == "gptq" and RELEASE.gptq_method:
        config.quant_algo, config.group_size = QuantAlgo.W4A16_GPTQ, block.get("group_size")
    else:
        raise NotImplementedError(f"Unsupported quantization_config: {block}.")
    return config


def _local_directory(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision))

"""Imitates `_torch/pyexecutor/model_loader.py`, in older releases also `config.py`: one rank's model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models import checkpoints
from tensorrt_llm._torch.models._arch_index import get_model_class
from tensorrt_llm._torch.models.checkpoints.auto_mapper import AutoCheckpointMapper
from tensorrt_llm._torch.models.checkpoints.base_checkpoint_loader import BaseCheckpointLoader
from tensorrt_llm._torch.models.modeling_utils import (
    get_checkpoint_weight_loader,
    get_config_loader,
)
from tensorrt_llm.logger import logger
from tensorrt_llm.quantization import QuantAlgo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
    from tensorrt_llm.mapping import Mapping
    from torch import nn

__all__ = ["ModelLoader"]

REGISTERING = (checkpoints,)
_STAGES = ("setup_aliases", "transform_weights", "cache_derived_state")
_CACHE_ALGOS = {"fp8": QuantAlgo.FP8, "nvfp4": QuantAlgo.NVFP4}


def _construct_checkpoint_loader(backend: str | None, loader: Any, checkpoint_format: str | None) -> Any:
    """Return the given loader, or one from the three registered parts of a format; None for AutoDeploy."""
    if backend == "_autodeploy":
        return None
    if loader is not None:
        return loader
    assert checkpoint_format is not None
    return BaseCheckpointLoader.get(
        checkpoint_format=checkpoint_format,
        weight_loader=get_checkpoint_weight_loader(checkpoint_format)(),
        weight_mapper=None,
        config_loader=get_config_loader(checkpoint_format)(),
    )


@contextmanager
def uninitialized_memory_is_poison() -> Iterator[None]:
    """Let `torch.empty` return NaN, or all ones for integers, so that uninitialized memory shows in the result.

    `torch.use_deterministic_algorithms` would set the same, and import torch's compiler, which takes seconds.
    """
    fills, mode = torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills


class ModelLoader:
    """Class `ModelLoader`: configuration, modules, weights, mapper, in the order of the release."""

    def __init__(self, llm_args: TorchLlmArgs, mapping: Mapping) -> None:
        self.args, self.mapping = llm_args, mapping

    def load(self, checkpoint_dir: str) -> tuple[nn.Module, nn.Module | None]:
        """Load the model and, with a speculative configuration, the draft model."""
        # The worker's base class and its model engine construct one each.
        arguments = (self.args.backend, self.args.checkpoint_loader, self.args.checkpoint_format)
        _construct_checkpoint_loader(*arguments)
        loader = _construct_checkpoint_loader(*arguments)
        with uninitialized_memory_is_poison():
            config = self._load_config(checkpoint_dir, loader)
            model = _build(config)
            self._load_weights(model, config, loader, checkpoint_dir)
            draft = self._load_draft(loader)
            for each in filter(None, (model, draft)):
                _post_load(each)
        loader.cleanup()
        return model, draft

    def _load_config(self, checkpoint_dir: str, loader: Any) -> ModelConfig:
        spec = self.args.speculative_config
        if RELEASE.defaults_pass is not None:
            given = {
                "trust_remote_code": self.args.trust_remote_code,
                "mm_encoder_only": False,
                "mapping": self.mapping,
                "spec_config": spec,
            }
            loader.load_config(checkpoint_dir, **{name: given[name] for name in RELEASE.defaults_pass})
        more: dict[str, Any] = {}
        if RELEASE.force_dynamic_quantization:
            more["force_dynamic_quantization"] = self.args.force_dynamic_quantization
        if RELEASE.model_kwargs and self.args.model_kwargs:
            more["model_kwargs"] = self.args.model_kwargs
        config: ModelConfig = loader.load_config(
            checkpoint_dir=checkpoint_dir,
            trust_remote_code=True,
            mapping=self.mapping,
            enable_min_latency=False,
            use_cuda_graph=False,
            spec_config=spec,
            max_num_tokens=self.args.max_num_tokens,
            max_seq_len=self.args.max_seq_len,
            moe_backend=self.args.moe_config.backend,
            moe_max_num_tokens=None,
            lora_config=None,
            allreduce_strategy="AUTO",
            attn_backend="TRTLLM",
            **more,
        )
        self._settle_kv_cache(config)
        return config

    def _settle_kv_cache(self, config: ModelConfig) -> None:
        """A dtype that differs from the checkpoint's raises in older releases, and takes precedence in the newest.

        Older releases (`validate_and_set_kv_cache_quant` of 2025) do not set it in the entries of layers.
        """
        asked = _CACHE_ALGOS.get(self.args.kv_cache_config.dtype)
        found = config.quant_config.kv_cache_quant_algo
        if asked is None or asked == found:
            return
        if found is not None and not RELEASE.newest_algos:
            raise RuntimeError(f"Attempting to override KV cache dtype {found} by {asked}")
        if found is not None:
            logger.warning("KV cache dtype %s of the checkpoint is overridden by %s", found, asked)
        config.quant_config.kv_cache_quant_algo = asked
        if RELEASE.newest_algos:
            for layer in (config.quant_config_dict or {}).values():
                layer.kv_cache_quant_algo = asked

    def _load_weights(self, model: Any, config: ModelConfig, loader: Any, checkpoint_dir: str) -> None:
        """The mapper is requested after the weights are loaded."""
        if RELEASE.weight_sessions:
            more = {"mapping": self.mapping, "model": model, "source_identity": checkpoint_dir}
            with loader.open_weight_session(checkpoint_dir, **more) as weights:
                model.load_weights(weights, weight_mapper=loader.get_initialized_weight_mapper(model, config))
            loader.post_load_apply(model, weights_preloaded=loader.is_weights_preloaded())
        else:
            weights = loader.load_weights(checkpoint_dir, **self._mapping_argument)
            model.load_weights(weights, weight_mapper=loader.get_initialized_weight_mapper(model, config))

    @property
    def _mapping_argument(self) -> dict[str, Mapping]:
        return {"mapping": self.mapping} if RELEASE.mapping_argument else {}

    def _load_draft(self, loader: Any) -> Any:
        """Read the configuration without the loader, weights with the same loader, and get the mapper by format."""
        if self.args.speculative_config is None:
            return None
        directory = self.args.speculative_config.speculative_model_dir
        config = ModelConfig.from_pretrained(directory, trust_remote_code=True, mapping=self.mapping)
        draft = _build(config)
        weights = loader.load_weights(directory, **self._mapping_argument)
        mapper = AutoCheckpointMapper.get(loader.checkpoint_format, config.pretrained_config.architectures[0])
        mapper.init_model_and_config(draft, config)
        draft.load_weights(weights, weight_mapper=mapper)
        return draft


def _build(config: ModelConfig) -> Any:
    """`AutoModelForCausalLM.from_config` of `_torch/models/modeling_auto.py`."""
    architecture = config.pretrained_config.architectures[0]
    cls = get_model_class(architecture)
    if cls is None:
        raise ValueError(f"Unknown architecture for AutoModelForCausalLM: {architecture}")
    return cls(config)


def _post_load(model: nn.Module) -> None:
    """One call per module in older releases, three in the newest; a Linear passes each call on to its method."""
    for stage in _STAGES if RELEASE.staged_post_load else ("post_load_weights",):
        for module in model.modules():
            for owner in (module, getattr(module, "quant_method", None)):
                hook = getattr(owner, stage, None)
                if callable(hook):
                    hook(*(() if owner is module else (module,)))

"""Imitates `llmapi/llm_args.py`: the arguments of LLM, checked and sent to every worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from tensorrt_llm._double import RELEASE
from tensorrt_llm.logger import logger

__all__ = ["DraftTargetDecodingConfig", "KvCacheConfig", "MoeConfig", "TorchLlmArgs"]


@dataclass(kw_only=True)
class KvCacheConfig:
    """`dtype` is "auto", "fp8" or "nvfp4"."""

    dtype: str = "auto"
    free_gpu_memory_fraction: float | None = None


@dataclass(kw_only=True)
class MoeConfig:
    """`backend` names the implementation of routed experts."""

    backend: str = "CUTLASS"


@dataclass(kw_only=True)
class DraftTargetDecodingConfig:
    """A draft model in a directory of its own."""

    speculative_model_dir: str
    max_draft_len: int = 1


@dataclass(kw_only=True)
class TorchLlmArgs:
    """Class `TorchLlmArgs`: strict, so an unknown argument is an error (pydantic's is a ValueError).

    `model_fields` are the arguments that this release has, as pydantic names them.
    """

    model_fields: ClassVar[dict[str, Any]]

    model: str
    tokenizer: Any = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    backend: str | None = "pytorch"
    checkpoint_loader: Any = None
    checkpoint_format: str | None = None
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)
    moe_config: MoeConfig = field(default_factory=MoeConfig)
    speculative_config: DraftTargetDecodingConfig | None = None
    quant_config: Any = None
    max_seq_len: int | None = None
    max_num_tokens: int = 8192
    max_batch_size: int | None = None
    disable_overlap_scheduler: bool = False
    force_dynamic_quantization: bool = False
    model_kwargs: dict[str, Any] | None = None

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> TorchLlmArgs:
        """Refuse arguments that this release doesn't have, then settle format and loader."""
        unknown = kwargs.keys() - cls.model_fields.keys()
        if unknown:
            raise ValueError(f"TorchLlmArgs: {', '.join(sorted(unknown))}: Extra inputs are not permitted")
        args = cls(**kwargs)
        if args.checkpoint_format is not None and args.checkpoint_loader is not None:
            # The format wins: the loader object is dropped.
            logger.warning("checkpoint_format and checkpoint_loader are both provided, checkpoint_loader is ignored.")
            args.checkpoint_loader = None
        if args.checkpoint_format is None and args.checkpoint_loader is None:
            args.checkpoint_format = "HF"
        return args


_NEWER = {"force_dynamic_quantization": RELEASE.force_dynamic_quantization, "model_kwargs": RELEASE.model_kwargs}
TorchLlmArgs.model_fields = {
    name: each for name, each in TorchLlmArgs.__dataclass_fields__.items() if _NEWER.get(name, True)
}

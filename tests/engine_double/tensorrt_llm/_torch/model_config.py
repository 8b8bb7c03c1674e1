"""Imitates `_torch/model_config.py`: a checkpoint's configuration as workers read it.

config.json is read without transformers: the original uses AutoConfig, of transformers 4 in older releases (which
know `torch_dtype`, `rope_theta` and `rope_scaling` only) and of transformers 5 in the newest.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.modeling_utils import QuantConfig
from tensorrt_llm.quantization import QuantAlgo
from tensorrt_llm.quantization.modelopt_config import build_quant_config, is_modelopt, read_modelopt_quant_config

if RELEASE.ct_parser is not None:
    from tensorrt_llm.models.quant_config_utils import update_quant_config_from_compressed_tensors

__all__ = ["ModelConfig", "PretrainedConfig"]

_ASSIGNABLE = frozenset({"extra_attrs", "pretrained_config", "quant_config", "_frozen"})
Quantization = tuple[QuantConfig, dict[str, QuantConfig] | None]


# Defaults of classes of transformers 4.57 for keys that have other names in transformers 5, and are silent therefore
# (`models/qwen3_moe/configuration_qwen3_moe.py`, `qwen3_vl_moe`, `gemma3`).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 128},
    "qwen3_vl_moe_text": {"num_experts": 60},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
}
# `attribute_map` of the same classes in transformers 5.
_RENAMED = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "qwen3_vl_moe_text": ("num_experts", "num_local_experts"),
}
# `NemotronHConfig` of transformers 5 makes the pattern from its list; the class in a model's repository does not.
_KINDS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


class PretrainedConfig(SimpleNamespace):
    """config.json with attribute access, as transformers gives it: with names and defaults of its class."""

    def __init__(self, **fields: Any) -> None:
        model_type = str(fields.get("model_type"))
        if RELEASE.rope_parameters:
            name, newer = _RENAMED.get(model_type, ("", ""))
            if newer in fields:
                fields[name] = fields[newer]
            if model_type == "nemotron_h" and isinstance(fields.get("layers_block_type"), list):
                fields["hybrid_override_pattern"] = "".join(_KINDS[kind] for kind in fields["layers_block_type"])
                fields.setdefault("rms_norm_eps", fields.get("layer_norm_epsilon", 1e-5))
        super().__init__(**(_DEFAULTS.get(model_type, {}) | fields))

    @classmethod
    def from_directory(cls, directory: str | Path) -> PretrainedConfig:
        document = json.loads((Path(directory) / "config.json").read_text())
        return cls(**({"tie_word_embeddings": False} | document), _name_or_path=str(directory))

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters; theta is 10000 where the names that this release knows are missing.

        Of blocks for kinds of layers it is that of full attention (`attention_backend/interface.py:
        RopeParams.from_config`, 51ea5c96; older texts do not know `rope_parameters`).
        """
        parameters = getattr(self, "rope_parameters", None)
        if RELEASE.rope_parameters and parameters:
            return dict(parameters.get("full_attention", parameters))
        return {"rope_theta": getattr(self, "rope_theta", 10000.0), **(getattr(self, "rope_scaling", None) or {})}

    @property
    def local_rope(self) -> dict[str, Any]:
        """Those of the sliding layers of Gemma 3, which are never scaled (`modeling_gemma3.py: Gemma3Attention`)."""
        parameters = getattr(self, "rope_parameters", None)
        if RELEASE.rope_parameters and parameters:
            return {"rope_theta": parameters.get("sliding_attention", {}).get("rope_theta", self.rope_local_base_freq)}
        return {"rope_theta": self.rope_local_base_freq}


@dataclass(kw_only=True)
class ModelConfig:
    """Class `ModelConfig`; frozen after loading except for three fields. Unknown keywords raise TypeError."""

    pretrained_config: Any = None
    mapping: Mapping = field(default_factory=Mapping)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    quant_config_dict: dict[str, QuantConfig] | None = None
    moe_backend: str = "CUTLASS"
    moe_max_num_tokens: int | None = None
    moe_load_balancer: Any = None
    attn_backend: str = "TRTLLM"
    spec_config: Any = None
    sparse_attention_config: Any = None
    lora_config: Any = None
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    use_cuda_graph: bool = False
    enable_min_latency: bool = False
    force_dynamic_quantization: bool = False
    mm_encoder_only: bool = False
    allreduce_strategy: str = "AUTO"
    nvfp4_gemm_allowed_backends: list[str] | None = None
    use_cute_dsl_blockscaling_mm: bool = False
    use_cute_dsl_blockscaling_bmm: bool = False
    extra_attrs: dict[str, Any] = field(default_factory=dict)
    _frozen: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False) and name not in _ASSIGNABLE:
            raise AttributeError(f"Cannot modify ModelConfig.'{name}' - instance is frozen")
        super().__setattr__(name, value)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the model's dtype; bfloat16 if config.json has no spelling of it that this release knows."""
        names = ("dtype", "torch_dtype") if RELEASE.rope_parameters else ("torch_dtype",)
        said = next((value for name in names if (value := getattr(self.pretrained_config, name, None))), "bfloat16")
        dtype: torch.dtype = getattr(torch, str(said).removeprefix("torch."))
        return dtype

    @classmethod
    def from_pretrained(cls, checkpoint_dir: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> ModelConfig:
        """Read config.json, apply `model_kwargs`, then find the quantization."""
        pretrained = PretrainedConfig.from_directory(checkpoint_dir)
        if RELEASE.model_kwargs:
            for name, value in (kwargs.pop("model_kwargs", None) or {}).items():
                setattr(pretrained, name, value)
        quant_config, layers = _quantization(Path(checkpoint_dir), pretrained)
        config = cls(pretrained_config=pretrained, quant_config=quant_config, quant_config_dict=layers, **kwargs)
        config._frozen = True
        return config


def _quantization(directory: Path, pretrained: PretrainedConfig) -> Quantization:
    """hf_quant_config.json takes precedence over config.json; a compressed-tensors block there is not compared."""
    inline = getattr(pretrained, "quantization_config", None)
    path = directory / "hf_quant_config.json"
    if path.exists():
        quantization = read_modelopt_quant_config(json.loads(path.read_text()))
        if quantization.get("quant_algo") is None and RELEASE.newest_algos and inline is not None:
            whole = read_modelopt_quant_config(inline)
            layers = (whole.get("quantized_layers") or {}) | (quantization.get("quantized_layers") or {})
            said = {key: value for key, value in quantization.items() if value is not None}
            quantization = whole | said | ({"quantized_layers": layers} if layers else {})
        return build_quant_config(quantization, directory)
    if inline is None:
        return QuantConfig(), None
    if is_modelopt(inline):
        return build_quant_config(read_modelopt_quant_config(inline), directory)
    return _other_quantization(inline)


def _other_quantization(block: dict[str, Any]) -> Quantization:
    """`load_hf_quant_config`: an unknown quantization method silently leaves the model unquantized."""
    method, skipped = block.get("quant_method"), list(block.get("modules_to_not_convert") or [])
    config = QuantConfig()
    if method == "fp8" and (block.get("weight_block_size") or block.get("activation_scheme") == "static"):
        assert tuple(block.get("weight_block_size") or (128, 128)) == (128, 128)
        config.quant_algo, config.group_size = QuantAlgo.FP8_BLOCK_SCALES, 128
        config.exclude_modules = ["*kv_b_proj*", "*k_b_proj*", "*eh_proj", *skipped]
    elif method == "mxfp4":
        config.quant_algo, config.group_size = mxfp4_algo(), 32
        config.exclude_modules = skipped
    elif method == "mxfp8" and RELEASE.newest_algos:
        config.quant_algo, config.group_size = QuantAlgo.MXFP8, 32
        config.exclude_modules = [*skipped, *(block.get("ignored_layers") or [])]
    elif method == "nvfp4" and RELEASE.newest_algos:
        config.quant_algo, config.group_size = QuantAlgo.NVFP4, 16
        config.exclude_modules = ["*.mlp.gate", "lm_head", *skipped]
    elif method == "compressed-tensors" and RELEASE.ct_parser is not None:
        return config, update_quant_config_from_compressed_tensors(config, block)
    elif method == "gptq" and RELEASE.gptq_method:
        if block.get("bits") != 4 or block.get("group_size") not in {64, 128} or block.get("desc_act"):
            raise ValueError("GPTQ: bits must be 4, group_size 64 or 128, desc_act false")
        config.quant_algo, config.group_size, config.has_zero_point = QuantAlgo.W4A16_GPTQ, block["group_size"], True
    return config, None


def mxfp4_algo() -> QuantAlgo:
    """Return the MXFP4 algorithm of this GPU, or the one in OVERRIDE_QUANT_ALGO."""
    forced = os.environ.get("OVERRIDE_QUANT_ALGO")
    if forced:
        return QuantAlgo(forced)
    return QuantAlgo.W4A8_MXFP4_MXFP8 if RELEASE.sm >= 100 else QuantAlgo.W4A16_MXFP4

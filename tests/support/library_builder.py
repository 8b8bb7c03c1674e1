"""Tiny checkpoints written by the outsider: transformers makes the model, compressed-tensors quantizes and saves it.

The steps are those of llm-compressor: attach the scheme, calibrate by minimum and maximum, compress, save, and add the
block to config.json.
For tests marked `library` and `reference`; both packages are imported when `write_library_checkpoint` is called.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from builders import tiny_config
from installed_library import attach_schemes
from installed_transformers import in_dtype, typed_config
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A checkpoint on disk; `config` is its config.json, `dense` the plain model by the library's own decompression."""

    directory: Path
    config: dict[str, Any]
    dense: dict[str, Tensor]


def write_library_checkpoint(
    directory: Path,
    *,
    config: Mapping[str, Any] | None = None,
    scheme: str | Mapping[str, Any] = "W4A16",
    kv: bool = False,
    seed: int = 0,
    save_format: str | None = None,
    **save: Any,
) -> Written:
    """Write a random model of `config` (`tiny_config(hidden=128)` when None), quantized by the library.

    `scheme` is the name of a preset for all Linears, or a mapping of group names to upstream's groups; lm_head stays
    plain. `save_format` overrides the format that the library infers; `save` goes to `save_pretrained`.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = _random_model(dict(config or tiny_config(hidden=128)), seed)
    groups = {scheme: ["Linear"]} if isinstance(scheme, str) else dict(scheme)
    quantization = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], kv_cache_scheme=KV_SCHEME if kv else None
    )
    attach_schemes(model, quantization)
    _calibrate(model, torch.Generator().manual_seed(seed))
    compressor = ModelCompressor.from_pretrained_model(model, save_format)
    compressor.compress_model(model)
    model.save_pretrained(directory, **save)
    compressor.update_config(str(directory))
    compressor.decompress_model(model)
    return Written(
        directory=directory,
        config=json.loads((directory / "config.json").read_text(encoding="utf-8")),
        dense={name: model.state_dict()[name] for name in _plain_names(model)},
    )


def _random_model(config: Mapping[str, Any], seed: int) -> Any:
    """A model of the dtype in `config`, whose norms and biases are no ones and zeros."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(typed_config(**config), **in_dtype(getattr(torch, config["dtype"])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _calibrate(model: Any, generator: torch.Generator) -> None:
    """Scales and zero points of weights by minimum and maximum; those of activations at random."""
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.utils import calculate_qparams

    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        weights = getattr(scheme, "weights", None)
        if weights is not None:
            low, high = _range(module.weight.detach(), weights.strategy, weights.group_size)
            scale, zero_point = calculate_qparams(low, high, weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero_point.reshape(module.weight_zero_point.shape))
        for name in ("input_scale", "k_scale", "v_scale"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, Tensor):
                parameter.data.copy_(0.01 + 0.01 * torch.rand(parameter.shape, generator=generator))
        if scheme is not None:
            module.quantization_status = QuantizationStatus.FROZEN


def _range(weight: Tensor, strategy: str, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of whatever shares a scale."""
    rows, columns = weight.shape
    shared = {
        "tensor": lambda: weight.reshape(1, -1),
        "channel": lambda: weight.reshape(rows, 1, columns),
        "group": lambda: weight.reshape(rows, -1, group_size or columns),
    }[strategy]()
    return shared.amin(-1), shared.amax(-1)


def _plain_names(model: Any) -> Iterator[str]:
    """The parameters of the model without those of its quantization; a tied lm_head is not counted twice."""
    tied = model.config.tie_word_embeddings
    for name in model.state_dict():
        local = name.rpartition(".")[2]
        if local in {"weight", "bias"} and not (tied and name == "lm_head.weight"):
            yield name

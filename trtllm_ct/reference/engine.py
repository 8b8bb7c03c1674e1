"""Build a transformers model whose quantized Linears hold the delivered tensors and compute from them.

`build_model` puts delivered tensors into an architecture. It proves that no tensor is left over and that no parameter
is left empty.
`load_model` reads the tensors of a directory: a ModelOpt or unquantized directory as it is, a compressed-tensors
directory through the `reference` target. This is the only place where this package uses code of the conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.errors import Fault, PlanError, UsageError
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.reference.architecture import build_shell, read_generation_config, require_transformers
from trtllm_ct.reference.assembly import Assembly
from trtllm_ct.reference.attention import kv_scale_names, register_fp8_attention, shares_keys
from trtllm_ct.reference.directory import read_directory
from trtllm_ct.reference.names import NameMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["build_model", "load_model"]


@missing_packages_as_errors()
def load_model(
    directory: str | Path, *, dtype: torch.dtype = torch.bfloat16, quantize_activations: bool = True
) -> nn.Module:
    """Load a model that computes, on the CPU, from the tensors that TensorRT-LLM would be given for `directory`.

    `directory` is a compressed-tensors, ModelOpt (`hf_quant_config.json`) or unquantized checkpoint. For a multimodal
    checkpoint, the causal language model of its `text_config` is built, without towers and draft layers.
    Modules dequantize and compute in `dtype`, whatever dtype the checkpoint has. `quantize_activations=False` switches
    off the simulation of quantized activations and of the FP8 KV cache.
    Memory: the delivered tensors, of which quantized ones are views of the files, and one dequantized weight while it
    is used.
    Raises `MissingDependencyError` without transformers, and `CheckpointError` for a directory that can't be loaded
    completely.
    """
    require_transformers()
    _require_compute_dtype(dtype)
    directory = path_of("directory", directory)
    source = read_directory(directory, dtype=dtype)
    model = build_model(
        source.config,
        source.quant_config,
        source.tensors,
        dtype=dtype,
        quantize_activations=quantize_activations,
        name=str(directory),
    )
    read_generation_config(model, directory)
    return model


@missing_packages_as_errors()
def build_model(
    config: Mapping[str, Any],
    quant_config: QuantConfig | None,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantize_activations: bool = True,
    name: str,
) -> nn.Module:
    """Build the causal language model of `config` (a parsed config.json) and fill it with delivered tensors.

    Names in `tensors` and `quant_config` are the names of the checkpoint. Only the language model of a multimodal
    checkpoint is built. Linears that `quant_config` calls quantized become `ReferenceLinear` and keep their tensors as
    delivered. All other floating-point tensors are cast to `dtype`, except for the few that transformers keeps in
    float32. Experts that are delivered one by one become `ReferenceExperts`. The model is in eval mode, without
    gradients, and its `.generate()` works.
    `name` is the name of the model in messages, and its `name_or_path`.

    Raises `PlanError` with all faults together: a tensor that no module takes, a parameter that no tensor fills, a
    quantized module without its tensors, quantized tensors of an excluded module, a wrong dtype or shape.
    Raises `ConfigError` for an architecture that transformers doesn't know.
    """
    require_transformers()
    _require_compute_dtype(dtype)
    quant_config = quant_config or QuantConfig()
    attention = _kv_cache_attention(quant_config, name) if quantize_activations else None
    model: Any = build_shell(config, dtype=dtype, attention=attention, name=name)
    if attention is not None and not kv_scale_names(model):
        _refuse_kv_cache(name, "attention with k_proj and v_proj, whose outputs an FP8 cache holds", "other attention")
    if attention is not None and shares_keys(model):
        _refuse_kv_cache(
            name, "attention with keys of its own in every layer", "layers that take those of earlier ones"
        )
    names = NameMap.of_checkpoint(config, model_type=model.config.model_type, model=model.state_dict())
    assembly = Assembly(model, quant_config, names, dtype=dtype, quantize_activations=quantize_activations)
    for tensor_name, tensor in tensors:
        assembly.take(tensor_name, tensor)
    assembly.finish()
    finished: nn.Module = model.eval().requires_grad_(requires_grad=False)
    return finished


def _require_compute_dtype(dtype: torch.dtype) -> None:
    if dtype not in {torch.bfloat16, torch.float16, torch.float32, torch.float64}:
        raise UsageError(
            Fault(
                where="dtype",
                expected="bfloat16, float16, float32 or float64",
                found=str(dtype),
                remedy="Give the dtype to compute in; delivered tensors keep their own.",
            )
        )


def _kv_cache_attention(quant_config: QuantConfig, name: str) -> str | None:
    """The name of the attention function that simulates the KV cache of `quant_config`; None for an unquantized one."""
    algo = quant_config.kv_cache_quant_algo
    if algo is None:
        return None
    if algo != "FP8":
        _refuse_kv_cache(name, "FP8 or none", algo)
    return register_fp8_attention()


def _refuse_kv_cache(name: str, expected: str, found: str) -> NoReturn:
    raise PlanError(
        Fault(
            where=f"{name}: kv_cache_quant_algo",
            expected=expected,
            found=found,
            remedy="Pass quantize_activations=False to compute with an unquantized KV cache.",
        )
    )

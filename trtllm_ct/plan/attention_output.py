"""Which output projections get an input that attention has quantized with a fixed scale of 1.

TensorRT-LLM's attention writes FP8 values if the mode of `o_proj` and its own mode take quantized values, and the KV
cache is FP8 or NVFP4. Its scale is the input scale of `o_proj`, and 1 if the mode reads none. With a 16-bit cache it
writes 16-bit values. Multi-head latent attention (MLA) always does, and so does attention that multiplies its output by
a gate. In the newest release, NVFP4 attention writes 16-bit values for an `o_proj` in another mode.
Source: TensorRT-LLM `_torch/modules/attention.py` (`Attention.create_weights`, `Attention._use_quantize_output` with
`attn_output_gate` in early 2026 and in c6d3bb2a, `MLA.create_output`), `_torch/attention_backend/trtllm.py`
(`get_quantize_output_dtype`) and, for attention's own mode, `_torch/models/modeling_utils.py`
(`apply_layerwise_quant_config`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.releases import KV_CACHE_WORDS, release_named
from trtllm_ct.plan.models.class_row import DEFAULT_ROW
from trtllm_ct.plan.models.class_rows import CLASS_ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.releases import Release
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["has_static_activations", "unscaled_outputs", "unscaled_outputs_of", "warnings_of_directory"]

_OUTPUT = ".o_proj"
# What models call their attention; Nemotron-H calls every part of a layer `mixer`, attention included.
_ATTENTIONS = (".self_attn", ".mixer")
_QUERIES = (".q_proj", ".qkv_proj")
_LATENT = ".kv_b_proj"


def unscaled_outputs(
    algos: Mapping[str, QuantAlgo | None], kv_cache: str | None, *, architecture: str, release: Release | None
) -> tuple[str, ...]:
    """Return the names of the output projections whose input attention quantizes with a scale of 1.

    `algos` has the mode of every module by name, None for a plain one. `kv_cache` is the KV cache's mode in the engine,
    None for a 16-bit cache. `architecture` is the model's class, and `release` that of the engine, None for any other.
    """
    if kv_cache not in KV_CACHE_WORDS or CLASS_ROWS.get(architecture, DEFAULT_ROW).gated_output:
        return ()
    matched = release is not None and release.matches_attention_output
    used = {algo for algo in algos.values() if algo is not None}
    common = used.pop() if len(used) == 1 else None
    return tuple(
        name
        for name, algo in algos.items()
        if name.endswith(tuple(f"{attention}{_OUTPUT}" for attention in _ATTENTIONS))
        and algo is not None
        and MODES_BY_ALGO[algo].unscaled_attention_output
        and (own := _mode_of(name.removesuffix(_OUTPUT), algos, common)) is not None
        and MODES_BY_ALGO[own].quantizes_attention_output
        and not (matched and own is QuantAlgo.NVFP4 and algo is not QuantAlgo.NVFP4)
    )


def unscaled_outputs_of(plan: Plan, kv_cache: str | None = None) -> tuple[str, ...]:
    """Return `unscaled_outputs` of a plan; `kv_cache` is the mode that a user sets, None if the checkpoint decides."""
    algos = {module.name: module.layer.quant_algo if module.layer else None for module in plan.modules}
    return unscaled_outputs(
        algos,
        kv_cache or plan.quant_config.kv_cache_quant_algo,
        architecture=plan.architecture,
        release=release_named(plan.engine),
    )


def has_static_activations(module: ModulePlan) -> bool:
    """Whether a module is delivered with an input scale."""
    return any(delivery.name.endswith(".input_scale") for delivery in module.deliveries)


def warnings_of_directory(
    modules: list[ModulePlan], target: Target, kv_cache: str | None, architecture: str
) -> tuple[str, ...]:
    """Return the warning about the unscaled outputs of a directory that stock TensorRT-LLM will read; empty if none."""
    release = target.capabilities.release
    algos = {module.name: module.layer.quant_algo if module.layer else None for module in modules}
    outputs = unscaled_outputs(algos, kv_cache, architecture=architecture, release=release)
    if not outputs or not target.directory:
        return ()
    can_force = target.capabilities.dynamic_attention_output and not any(map(has_static_activations, modules))
    other = ", or pass force_dynamic_quantization=True to LLM" if can_force else ""
    problem = f"with the {kv_cache} KV cache attention quantizes their input at a fixed scale of 1"
    return (f"{len(outputs)} o_proj: {problem}; convert with --dense-o-proj to dequantize them{other}",)


def _mode_of(attention: str, algos: Mapping[str, QuantAlgo | None], common: QuantAlgo | None) -> QuantAlgo | None:
    """Return the mode of attention itself; None if it has none, or is latent attention.

    It has the mode that all quantized modules have in `common`, or else that of its queries, which some models store
    together with keys and values.
    """
    if f"{attention}{_LATENT}" in algos:
        return None
    return common or next((algo for leaf in _QUERIES if (algo := algos.get(f"{attention}{leaf}"))), None)

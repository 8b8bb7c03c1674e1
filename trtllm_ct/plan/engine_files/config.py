"""config.json of an engine-build checkpoint; every value whose default in the engine is wrong is written.

Unknown keys of `quantization` and `mapping` raise TypeError when an engine is built, so these have exactly the keys
below. Sources: TensorRT-LLM `models/modeling_utils.py` (`PretrainedConfig`, `QuantConfig`), `mapping.py`,
`models/llama/config.py` (89fd9b74), `models/qwen/config.py` (373970a8), `quantization/quantize.py` (89fd9b74).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.base.version import __version__
from trtllm_ct.config.json_object import shown
from trtllm_ct.plan.engine_files.rope import rope_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.plan.engine_files.choice import Choice
    from trtllm_ct.plan.engine_files.rope import Rope
    from trtllm_ct.plan.models.build_classes import BuildClass
    from trtllm_ct.plan.models.sites import Model

__all__ = ["build_config", "build_layers", "config_warnings", "rope_of_model"]

# `QuantConfig.group_size` is 128 by default, and some pages say 64: it is always written.
_GROUP_SIZE = 128
# `exclude_modules` replaces the default list of the engine, so the entries of that list are repeated here. It is
# compared with the names of Linears, and when weights of W8A16 are loaded with those of tensors
# (`models/convert_utils.py: weight_only_quantize_dict`): only a name with an asterisk behind it matches both.
_ALWAYS_EXCLUDED = ("lm_head", "*router", "transformer.vocab_embedding")
_NOT_RUN = (
    "target engine follows the published source of TensorRT-LLM, and no engine was built from it here: "
    "compare outputs before you serve it"
)
_MIXED = "MIXED_PRECISION with these modes and quant_cfg.json"
_MIXED_MAY_STOP = (
    "one text of `LayerQuantConfig` in TensorRT-LLM imports the module fnmatch and calls it as a function, so that "
    "trtllm-build stops with a TypeError for MIXED_PRECISION: use a release whose text calls fnmatch.fnmatch"
)
_TAKE_ORIGINAL = "Take config.json from the model that was quantized."


def rope_of_model(model: Model, row: BuildClass, faults: FaultCollector) -> Rope:
    """Return the rotary embedding of a model; adds a fault for one that engines don't compute."""
    return rope_of(
        model.text, row.defaults["rope_theta"], _count(model, row, "max_position_embeddings", faults), faults
    )


def build_config(
    model: Model,
    row: BuildClass,
    choice: Choice,
    parallel: Parallel,
    *,
    rope: Rope,
    dtype: DType,
    kv_cache: str | None,
    faults: FaultCollector,
) -> dict[str, Any]:
    """Return config.json for a model in the mode of `choice`; it is the same for all ranks.

    `rope` is its rotary embedding. Adds a fault for what engines can't compute: another activation function or dtype.
    """
    text = model.text
    _refuse_activation(_stated(text, row, "hidden_act"), faults)
    _refuse_dtype(dtype, faults)
    config = {
        "producer": _producer(choice),
        "architecture": model.name,
        "dtype": dtype.torch_name,
        "logits_dtype": "float32",
        "vocab_size": model.vocabulary,
        "hidden_size": model.sizes["hidden"],
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_size": model.sizes["head_dim"],
        "intermediate_size": model.sizes["intermediate"],
        "hidden_act": row.hidden_act,
        "norm_epsilon": _epsilon(text, row, faults),
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": rope.length,
        "rotary_base": rope.base,
        "rotary_scaling": rope.scaling,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "tie_word_embeddings": bool(model.tied),
        "disable_weight_only_quant_plugin": any(mode.plain_int8 for mode in choice.modes),
        "quantization": _quantization(choice, kv_cache),
        "mapping": _mapping(row, parallel),
    }
    copied = {key: bool(text.get(source, default)) for key, source, default in row.copied}
    return config | dict(row.config) | copied | _experts(model, row, faults)


def build_layers(choice: Choice, kv_cache: str | None) -> dict[str, Any] | None:
    """Return quant_cfg.json, which has the mode of each Linear if there are several; None if there are not.

    Linears without an entry are plain. Source: `PretrainedConfig` and `LayerQuantConfig` of
    `models/modeling_utils.py`.
    """
    if not choice.layers:
        return None
    layers = {
        name: {
            "quant_algo": str(layer.quant_algo),
            "group_size": layer.group_size or _GROUP_SIZE,
            "has_zero_point": layer.has_zero_point,
            "pre_quant_scale": layer.pre_quant_scale,
        }
        for name, layer in choice.layers.items()
    }
    algo = str(QuantAlgo.MIXED_PRECISION)
    return {"quant_algo": algo, "kv_cache_quant_algo": kv_cache, "quantized_layers": layers}


def config_warnings(row: BuildClass, rope: Rope, choice: Choice, *, gptq: bool) -> tuple[str, ...]:
    """Return warnings about what no converter of TensorRT-LLM writes, and about what releases and GPUs have.

    `gptq` says that weights would be called GPTQ by their scheme.
    """
    derived = [
        what
        for what in (
            *(mode.derived for mode in choice.modes),
            _MIXED if choice.layers else "",
            rope.derived,
            "Linears that stay plain by exclude_modules" if choice.excluded else "",
        )
        if what
    ]
    warnings = [_NOT_RUN]
    if derived:
        warnings.append(f"(derived) no converter of TensorRT-LLM writes this: {'; '.join(derived)}")
    if gptq and any(mode.algo is QuantAlgo.W4A16_AWQ for mode in choice.modes):
        warnings.append(
            "int4 codes are written as W4A16_AWQ, for every GPU: a file of W4A16_GPTQ serves one generation of GPUs"
        )
    if choice.mode is not None and choice.mode.sm is not None:
        warnings.append(
            f"{choice.mode.algo} serves GPUs of SM{choice.mode.sm} and TensorRT-LLM 1.0 to 1.2.1 only: elsewhere an "
            "engine computes wrong results without a message"
        )
    if any(mode.algo is QuantAlgo.FP8 for mode in choice.modes):
        warnings.append(
            "trtllm-build joins gate_proj and up_proj by default, and quantizes the one with the smaller FP8 scale "
            "again: turn use_fused_mlp off to build with the codes as they are"
        )
    if row.uncertain:
        warnings.append(row.uncertain)
    if choice.layers:
        warnings.append(_MIXED_MAY_STOP)
    if any(mode.algo is QuantAlgo.NVFP4 for mode in choice.modes):
        warnings.append("NVFP4 needs GPUs of Blackwell: engines for earlier ones are not built")
    return tuple(warnings)


def _producer(choice: Choice) -> dict[str, Any]:
    """Return what made the file, which engines ignore; with the SM that codes in the order of a kernel are for."""
    sm = choice.mode.sm if choice.mode else None
    return {"name": "trtllm-ct", "version": __version__} | ({} if sm is None else {"sm": sm})


def _quantization(choice: Choice, kv_cache: str | None) -> dict[str, Any]:
    """Return the block `quantization`; that of several modes is in quant_cfg.json."""
    if choice.layers:
        return {"quant_algo": str(QuantAlgo.MIXED_PRECISION), "kv_cache_quant_algo": kv_cache}
    layer, mode = choice.layer, choice.mode
    return {
        "quant_algo": str(mode.algo) if mode else None,
        "kv_cache_quant_algo": kv_cache,
        "group_size": (layer and layer.group_size) or _GROUP_SIZE,
        "has_zero_point": bool(mode and mode.has_zero_point),
        "pre_quant_scale": bool(mode and mode.pre_quant_scale),
        "exclude_modules": [*_ALWAYS_EXCLUDED, *(f"{name}*" for name in choice.excluded)] if choice.excluded else None,
    }


def _mapping(row: BuildClass, parallel: Parallel) -> dict[str, int]:
    """Return the block `mapping`."""
    mapping = {
        "world_size": parallel.tensor * parallel.pipeline,
        "tp_size": parallel.tensor,
        "pp_size": parallel.pipeline,
    }
    return mapping | ({"moe_tp_size": parallel.tensor, "moe_ep_size": 1} if row.experts else {})


def _experts(model: Model, row: BuildClass, faults: FaultCollector) -> dict[str, Any]:
    """Return the block `moe` of a model with routed experts."""
    if not row.experts:
        return {}
    top_k = _count(model, row, "num_experts_per_tok", faults)
    # 1 is `MoeConfig.ExpertScaleNormalizationMode.RENORMALIZE`.
    return {"moe": {"num_experts": model.sizes["experts"], "top_k": top_k, "normalization_mode": 1}}


def _stated(text: Mapping[str, Any], row: BuildClass, key: str) -> Any:
    """Return the value of a key, or the default of the class if it is missing or null."""
    value = text.get(key)
    return row.defaults[key] if value is None else value


def _count(model: Model, row: BuildClass, key: str, faults: FaultCollector) -> int:
    """Return the number under a key, or the default of the class; adds a fault for what is no positive number."""
    value = _stated(model.text, row, key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    faults.add(where=f"config.json: {key}", expected="a positive integer", found=shown(value), remedy=_TAKE_ORIGINAL)
    return int(row.defaults[key])


def _epsilon(text: Mapping[str, Any], row: BuildClass, faults: FaultCollector) -> float:
    """Return what norms add to the variance; adds a fault for a negative number."""
    value = float(_stated(text, row, "rms_norm_eps"))
    if value < 0:
        where = "config.json: rms_norm_eps"
        faults.add(where=where, expected="a number of at least 0", found=shown(value), remedy=_TAKE_ORIGINAL)
    return value


def _refuse_activation(activation: str, faults: FaultCollector) -> None:
    if activation not in {"silu", "swish"}:
        faults.add(
            where="config.json: hidden_act",
            expected="silu, the only one of the classes that target engine writes",
            found=repr(activation),
            remedy="Convert with --to modelopt: the PyTorch backend reads config.json itself.",
        )


def _refuse_dtype(dtype: DType, faults: FaultCollector) -> None:
    if dtype not in {DType.F16, DType.BF16}:
        faults.add(
            where="config.json: dtype",
            expected="float16 or bfloat16: engines compute in these",
            found=dtype.torch_name,
            remedy="Convert with --dtype bfloat16 or float16.",
        )

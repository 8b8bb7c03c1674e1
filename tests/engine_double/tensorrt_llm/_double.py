"""The release that the double imitates: `RELEASE`, read from the environment when this module is imported.

It is an environment variable because spawned workers must imitate the same release. Only variables named TRTLLM* or
TLLM* reach them (`llmapi/mpi_session.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["RELEASE", "Release"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The differences between releases, one field per difference."""

    version: str
    mapping_argument: bool
    """Loaders are called as `load_weights(directory, mapping, ...)`, not as `load_weights(directory)`."""
    weight_sessions: bool
    """Loaders have the newer, non-abstract methods, and get `model` and `source_identity`."""
    defaults_pass: bool
    """`load_config` is called a second time, earlier, to read defaults."""
    ct_parser: str | None
    """Generation of the compressed-tensors parser in `models/quant_config_utils.py`."""
    strict_quant_config: bool
    """QuantConfig is a pydantic model that rejects unknown fields, not a dataclass."""
    layers_in_hf_quant_config: bool
    """`quantized_layers` may be in hf_quant_config.json; older releases require quant_cfg.json."""
    any_case_aliases: bool
    exclude_patterns: bool
    """`exclude_modules` matches `re:` patterns and ancestors, not only fnmatch on the full name."""
    quantized_lm_head: bool
    rope_parameters: bool
    """The release uses transformers 5: `rope_parameters` and `dtype` are read as well as their older spellings."""
    flattens_row_scale: bool
    """FP8 row-wise scales of shape [N, 1] are flattened."""
    aligned_shards: bool
    """Linears are sliced at multiples of their method's alignment; older releases use ceiling division per tensor."""
    newest_algos: bool
    """MXFP8 and W4A16_NVFP4 exist."""
    force_dynamic_quantization: bool
    model_kwargs: bool
    staged_post_load: bool
    kv_scales_by_default: bool
    awq_sm_limit: int
    gptq_method: bool = False
    quantize_activations: bool = False
    sm: int = 90


def _generation(*, newest: bool) -> Release:
    env = os.environ
    return Release(
        version="1.4.0rc1" if newest else "1.1.0",
        mapping_argument=newest,
        weight_sessions=newest,
        defaults_pass=newest,
        ct_parser=(env.get("TLLM_DOUBLE_CT_PARSER") or "B") if newest else None,
        strict_quant_config=newest,
        layers_in_hf_quant_config=newest,
        any_case_aliases=newest,
        exclude_patterns=newest,
        quantized_lm_head=newest,
        rope_parameters=newest,
        flattens_row_scale=newest,
        aligned_shards=newest,
        newest_algos=newest,
        force_dynamic_quantization=newest,
        model_kwargs=newest,
        staged_post_load=newest,
        kv_scales_by_default=newest,
        awq_sm_limit=103 if newest else 90,
        gptq_method=newest and env.get("TLLM_DOUBLE_GPTQ") == "1",
        quantize_activations=env.get("TLLM_DOUBLE_QUANTIZE_ACTIVATIONS") == "1",
        sm=int(env.get("TLLM_DOUBLE_SM", "90")),
    )


RELEASE = _generation(newest={"newest": True, "old": False}[os.environ.get("TLLM_DOUBLE_GENERATION", "newest")])

"""The release that the double imitates: `RELEASE`, read from the environment when this module is imported.

It is an environment variable because spawned workers must imitate the same release. Only variables named TRTLLM* or
TLLM* reach them (`llmapi/mpi_session.py`).

What is dated by a pull request of NVIDIA/TensorRT-LLM names it. Everything else was read from files whose date is
known by their content only: "old" from `_torch/modules/linear.py` at commit ed53795b, "mid" from commit 00bbf71e,
"newest" from commit 3fe2c922. "mid" is before March 2026 and the text of 00bbf71e after it, since it has the bias of
weight-only Linears (PR #12317): what a pull request dates overrules that text. Where a generation's behaviour is not
known, the stricter neighbour's is taken.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

__all__ = ["GENERATIONS", "RELEASE", "Release"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The differences between releases, one field per difference."""

    name: str
    """The generation's name, one of `GENERATIONS`."""
    version: str
    mapping_argument: bool
    """Loaders are called as `load_weights(directory, mapping, ...)`, not as `load_weights(directory)` (PR #8856)."""
    weight_sessions: bool
    """Loaders have the newer, non-abstract methods, and get `model` and `source_identity` (PR #17393)."""
    defaults_pass: tuple[str, ...] | None
    """`load_config` is called a second time, earlier, to read defaults, with these keywords; None: it isn't."""
    ct_parser: str | None
    """Generation of the compressed-tensors parser in `models/quant_config_utils.py`; the first is of PR #10796."""
    strict_quant_config: bool
    """QuantConfig is a pydantic model that rejects unknown fields, not a dataclass."""
    layers_in_hf_quant_config: bool
    """`quantized_layers` may be in hf_quant_config.json; older releases require quant_cfg.json."""
    any_case_aliases: bool
    exclude_patterns: bool
    """`exclude_modules` matches `re:` patterns and ancestors, not only fnmatch on the full name."""
    quantized_lm_head: bool
    """lm_head is quantized where the checkpoint says so (PR #16511)."""
    rope_parameters: bool
    """The release uses transformers 5: `rope_parameters` and `dtype` are read as well as their older spellings."""
    flattens_row_scale: bool
    """FP8 row-wise scales of shape [N, 1] are flattened."""
    aligned_shards: bool
    """Linears that allocate at once are sliced at multiples of their method's alignment (`Linear.load_shard`)."""
    spread_shards: bool
    """The remainder of a slice is spread over the first ranks (`_calc_shard`); older releases divide with ceiling."""
    exact_scalars: bool
    """Scalars of one NVFP4 Linear are compared with `==`, and a missing `input_scale` raises; newer: `allclose`."""
    weight_only_bias: bool
    """`WeightOnlyQuantLinearMethod.apply` adds the bias (PR #12317, merged 2026-03-18)."""
    weight_only_on_sm100: bool
    """int8 and int4 with one scale per row have kernels for SM100 (PR #10190, January 2026)."""
    grouped_bias_on_sm100: bool
    """The grouped int4 GEMM adds the bias on SM100 (PR #12190, merged 2026-03-13)."""
    awq_sm_limit: int
    """`FinegrainedMixedDtypeGemm.MAX_SUPPORTED_SM_VERSION` in `_torch/custom_ops/torch_custom_ops.py`."""
    wraps_experts: bool
    """Experts are a ConfigurableMoE with a child `backend` (`ENABLE_CONFIGURABLE_MOE`; always since PR #17009)."""
    binds_experts_late: bool
    """The wrapper hands its own configuration to its `backend`, which otherwise keeps the global one."""
    dynamic_attention_output: bool
    """Attention honours `force_dynamic_quantization` (`Attention._use_quantize_output`)."""
    fused_entries: bool
    """Entries named `gate_up_proj` count for the Linear of that name; early texts look for `gate_proj` only."""
    exported_w4a8_experts: bool
    """W4A8_AWQ experts are read as ModelOpt exports them; older releases read another layout only (W4A8_CUSTOM)."""
    newest_algos: bool
    """MXFP8 and W4A16_NVFP4 exist."""
    force_dynamic_quantization: bool
    """The argument of `LLM`; per-tensor FP8 Linears honour it (`FP8QDQLinearMethod.apply`)."""
    dynamic_nvfp4: bool
    """NVFP4 Linears honour it too, and then need no `input_scale`."""
    model_kwargs: bool
    staged_post_load: bool
    kv_scales_by_default: bool
    kv_scale_factor: float
    """K and V scales are multiplied by it while they are loaded."""
    dense_in_proj: bool
    """The rows of Qwen3-Next's in_proj are rearranged while they are loaded (PR #16314)."""
    gptq_method: bool = False
    quantize_activations: bool = False
    sm: int = 90


_OLD = Release(
    name="old",
    version="1.1.0",
    mapping_argument=False,
    weight_sessions=False,
    defaults_pass=None,
    ct_parser=None,
    strict_quant_config=False,
    layers_in_hf_quant_config=False,
    any_case_aliases=False,
    exclude_patterns=False,
    quantized_lm_head=False,
    rope_parameters=False,
    flattens_row_scale=False,
    aligned_shards=False,
    spread_shards=False,
    exact_scalars=True,
    weight_only_bias=False,
    weight_only_on_sm100=False,
    grouped_bias_on_sm100=False,
    awq_sm_limit=90,
    wraps_experts=False,
    binds_experts_late=False,
    dynamic_attention_output=False,
    fused_entries=False,
    exported_w4a8_experts=False,
    newest_algos=False,
    force_dynamic_quantization=False,
    dynamic_nvfp4=False,
    model_kwargs=False,
    staged_post_load=False,
    kv_scales_by_default=False,
    kv_scale_factor=6.0,
    dense_in_proj=False,
)
_MID = replace(
    _OLD,
    name="mid",
    version="1.2.1",
    mapping_argument=True,
    defaults_pass=(),
    weight_only_on_sm100=True,
    awq_sm_limit=103,
    wraps_experts=True,
    fused_entries=True,
    exported_w4a8_experts=True,
    force_dynamic_quantization=True,
    kv_scales_by_default=True,
    kv_scale_factor=1.0,
)
_NEWEST = replace(
    _MID,
    name="newest",
    version="1.4.0rc1",
    weight_sessions=True,
    defaults_pass=("trust_remote_code", "mm_encoder_only", "mapping", "spec_config"),
    ct_parser="B",
    strict_quant_config=True,
    layers_in_hf_quant_config=True,
    any_case_aliases=True,
    exclude_patterns=True,
    quantized_lm_head=True,
    rope_parameters=True,
    flattens_row_scale=True,
    aligned_shards=True,
    spread_shards=True,
    exact_scalars=False,
    weight_only_bias=True,
    grouped_bias_on_sm100=True,
    binds_experts_late=True,
    dynamic_attention_output=True,
    newest_algos=True,
    dynamic_nvfp4=True,
    dense_in_proj=True,
    model_kwargs=True,
    staged_post_load=True,
)
_RELEASES = {release.name: release for release in (_OLD, _MID, _NEWEST)}

GENERATIONS = tuple(_RELEASES)
"""The names of the generations, oldest first."""


def _of_environment() -> Release:
    env = os.environ
    release = _RELEASES[env.get("TLLM_DOUBLE_GENERATION", "newest")]
    parsed = release.ct_parser is not None
    wrapped = env.get("ENABLE_CONFIGURABLE_MOE", "1") == "1" or release.binds_experts_late
    return replace(
        release,
        ct_parser=env.get("TLLM_DOUBLE_CT_PARSER") or release.ct_parser if parsed else None,
        wraps_experts=release.wraps_experts and wrapped,
        gptq_method=release.name == "newest" and env.get("TLLM_DOUBLE_GPTQ") == "1",
        quantize_activations=env.get("TLLM_DOUBLE_QUANTIZE_ACTIVATIONS") == "1",
        sm=int(env.get("TLLM_DOUBLE_SM", "90")),
    )


RELEASE = _of_environment()

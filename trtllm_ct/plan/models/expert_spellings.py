"""How the class of a text model in transformers stores routed experts: one by one under its names, or stacked.

Writers that quantize experts one by one call their projections gate_proj, up_proj and down_proj in every model. A
class reads its own spelling only, so plain experts are delivered in it. The class of transformers tells its spelling
if it can be built (`model_class.py`); otherwise the tables here do. What TensorRT-LLM's class reads is in its row, and
has no influence on plain weights.
Source: transformers 5.23 `models/*/modeling_*.py` (the parameters of the class), and `conversion_mapping.py`, which
lists the names that are merged into them. `tests/end_to_end/test_any_model.py` converts tiny models of such classes
for target `dense`, and loads them in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.class_row import PROJECTION_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "NAMED_EXPERTS",
    "NUMBERED",
    "NUMBERED_EXPERTS",
    "PROJECTIONS",
    "STACKED_EXPERTS",
    "UNKNOWN_SPELLING",
    "ExpertSpelling",
    "StackedExperts",
    "engine_reads_stacks",
    "spelling_of",
    "spelling_type",
]

PROJECTIONS: Mapping[str, int] = {
    "gate_proj": 0,
    "up_proj": 1,
    "down_proj": 2,
    "w1": 0,
    "w3": 1,
    "w2": 2,
    # transformers 5.23 saves every gate_proj of hy_v4 and of deepseek_v4 under these names.
    "linear_gate": 0,
    "wgate": 0,
}
"""The places of the names of an expert's projections in (gate, up, down), in every spelling."""

NUMBERED = ("w1", "w3", "w2")
"""The names of (gate, up, down) in the classes of `NUMBERED_EXPERTS`."""

NUMBERED_EXPERTS = frozenset(
    {
        "deepseek_v4",
        "kimi_linear",
        "lfm2_moe",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl",
        "mistral_large4",
        "mistral_large4_text",
        "mixtral",
        "phimoe",
    }
)
"""The model types whose classes read experts one by one as w1, w2 and w3, see `spelling_type`."""

NAMED_EXPERTS = frozenset(
    {
        "afmoe",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "cohere2_moe",
        "deepseek_ocr2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "dots3_note_text",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm5_next",
        "glm5_next_text",
        "glm_moe_dsa",
        "hunyuan_v1_moe",
        "hy_v3",
        "jamba",
        "kimi_k2",
        "kimi_k25",
        "kolibri1",
        "laguna",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
        "nemotron_h",
        "olmoe",
        "qwen2_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "qwen4_exp_text",
        "solar_open",
        "unlimited_ocr",
    }
)
"""The model types whose classes read experts one by one as gate_proj, up_proj and down_proj, see `spelling_type`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedExperts:
    """The tensors of all experts that a class reads.

    `parts` are their names, beside the module `experts`, with the projections that each holds as positions in (gate,
    up, down). They are [E, in, out] if `inputs_first`, otherwise [E, out, in]. The rows of gate and up alternate if
    `alternate`, otherwise gate comes first. `biases` are the names of the tensors [E, out] of biases. `by_engine` says
    that TensorRT-LLM's class reads the same tensors, and no others. `told_by_shape` says that transformers 5 infers the
    order of the axes from their sizes.
    """

    parts: Mapping[str, tuple[int, ...]]
    inputs_first: bool = False
    alternate: bool = False
    biases: Mapping[str, tuple[int, ...]] | None = None
    by_engine: bool = False
    told_by_shape: bool = False


_GATE_UP, _DOWN = (0, 1), (2,)
_PARTS = {"experts.gate_up_proj": _GATE_UP, "experts.down_proj": _DOWN}
_OUTPUTS_FIRST = StackedExperts(parts=_PARTS)
_ARIA = StackedExperts(parts={"experts.fc1.weight": _GATE_UP, "experts.fc2.weight": _DOWN}, inputs_first=True)
_GRANITE = StackedExperts(parts={"input_linear.weight": _GATE_UP, "output_linear.weight": _DOWN})

STACKED_EXPERTS: Mapping[str, StackedExperts] = {
    # transformers 4.57 `modeling_qwen3_vl_moe.py` (`Qwen3VLMoeTextExperts`); TensorRT-LLM 03441af1
    # `_torch/models/modeling_qwen3_moe.py` (`MoEWeightLoadingMode.FUSED_GATE_UP_PROJ`).
    "qwen3_vl_moe_text": StackedExperts(parts=_PARTS, inputs_first=True, by_engine=True, told_by_shape=True),
    # TensorRT-LLM 3a5901cd `_torch/models/modeling_llama.py` (`Llama4MoE`, the same mode).
    "llama4_text": StackedExperts(parts=_PARTS, inputs_first=True, by_engine=True),
    # TensorRT-LLM 050b6cb9 `_torch/models/modeling_gpt_oss.py` (`GptOssForCausalLM.load_hf_weights`).
    "gpt_oss": StackedExperts(
        parts=_PARTS,
        inputs_first=True,
        alternate=True,
        biases={"experts.gate_up_proj_bias": _GATE_UP, "experts.down_proj_bias": _DOWN},
        by_engine=True,
    ),
    "aria": _ARIA,
    "aria_text": _ARIA,
    "diffusion_gemma_text": _OUTPUTS_FIRST,
    "glm4v_moe_text": _OUTPUTS_FIRST,
    "gemma4_text": _OUTPUTS_FIRST,
    "hy_v4": _OUTPUTS_FIRST,
    "inkling2_text": _OUTPUTS_FIRST,
    "inkling_text": _OUTPUTS_FIRST,
    "minimax_m3_vl_text": _OUTPUTS_FIRST,
    "muse_spark_text": _OUTPUTS_FIRST,
    "openai_privacy_filter": StackedExperts(
        parts=_PARTS,
        inputs_first=True,
        biases={"experts.gate_up_proj_bias": _GATE_UP, "experts.down_proj_bias": _DOWN},
    ),
    "mistral4": _OUTPUTS_FIRST,
    "zaya": _OUTPUTS_FIRST,
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoe_swa": _OUTPUTS_FIRST,
}
"""The classes that read stacked experts only, by model type, see `spelling_type`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpelling:
    """How a class reads routed experts: one by one under the names of (gate, up, down), or from stacks.

    With neither it is not known; then experts keep the names that they are stored under.
    """

    projections: tuple[str, str, str] | None = None
    stacked: StackedExperts | None = None

    @property
    def known(self) -> bool:
        """Whether anything says how the class reads experts."""
        return self.projections is not None or self.stacked is not None


UNKNOWN_SPELLING = ExpertSpelling()


def spelling_of(text_type: str) -> ExpertSpelling:
    """Return the spelling of a model type by the tables, see `spelling_type`."""
    if text_type in NUMBERED_EXPERTS:
        return ExpertSpelling(projections=NUMBERED)
    if text_type in NAMED_EXPERTS:
        return ExpertSpelling(projections=PROJECTION_NAMES)
    return ExpertSpelling(stacked=STACKED_EXPERTS.get(text_type))


def engine_reads_stacks(text_type: str) -> bool:
    """Whether TensorRT-LLM's class reads routed experts from stacked tensors only, see `StackedExperts.by_engine`."""
    stacked = STACKED_EXPERTS.get(text_type)
    return stacked is not None and stacked.by_engine


def spelling_type(model_type: str, text_type: str) -> str:
    """Return the model type whose spelling of experts holds: the wrapper's if a table here has it, or the text model's.

    A text model inside of a wrapper may read another spelling than by itself.
    """
    return model_type if spelling_of(model_type).known else text_type

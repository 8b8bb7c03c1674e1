"""The row of Llama 4, whose class reads experts from stacked tensors only.

Files are in TensorRT-LLM's `_torch/`; a commit identifies the version of the file that was read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.plan.models.class_row import ClassRow, Limit, built_biases
from trtllm_ct.plan.models.layer_parts import ATTENTION_BIASES, QKVO, TWO_NORMS, Part
from trtllm_ct.plan.models.mixture_rows import GATED

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LLAMA4_ROWS"]

_LEAVES = ("gate_proj", "up_proj", "down_proj")

# models/modeling_llama.py (3a5901cd) and models/checkpoints/hf/llama4_weight_mapper.py (7dfda15a): Llama4MoE.__init__
# asks for stacks (FUSED_GATE_UP_PROJ). Llama4DecoderLayer.__init__ looks at the global mode: in FP8 and NVFP4 it joins
# the quantization of an input with an all-reduce of several ranks, for which `forward` needs `input_scale` of the next
# Linear, plain or not. MIXED_PRECISION is none of these modes.
_LLAMA4 = ClassRow(
    plain=("feed_forward.router",),
    experts="feed_forward.experts",
    limits=(
        Limit(
            paths=tuple(f"feed_forward.experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
            source="Llama4MoE.__init__, `models/modeling_llama.py`, 3a5901cd, and "
            "`modules/fused_moe/quantization.py`: a stack has one scale for all experts of a layer",
        ),
    ),
    entries=True,
    mixers=("feed_forward", "shared_expert"),
    layer=(
        (Part(modules=(*QKVO, *TWO_NORMS), when=ATTENTION_BIASES),),
        (
            Part(
                modules=("feed_forward.router", *(f"feed_forward.shared_expert.{leaf}" for leaf in _LEAVES)),
                experts=GATED,
            ),
            Part(modules=tuple(f"feed_forward.{leaf}" for leaf in _LEAVES)),
        ),
    ),
    built_biases=built_biases(attention_bias=QKVO, mlp_bias=tuple(f"feed_forward.{leaf}" for leaf in _LEAVES)),
)

LLAMA4_ROWS: Mapping[str, ClassRow] = {"Llama4ForConditionalGeneration": _LLAMA4}
"""The row by the name of the architecture in config.json."""

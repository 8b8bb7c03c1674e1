"""How the engine's model classes read the modules of a layer: one row per class, and one for classes without a row.

The sizes of such a model are not in a table: they come from the headers of its files (`discovery.py`). So layers of
different kinds, heads of different sizes and layers without some projections need nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.parallel import Cut

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CLASS_ROWS", "DEFAULT_ROW", "ClassRow", "Limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The modes that some Linears of a class may have, since its loader rearranges their rows.

    `paths` are as in `ClassRow`. `algos` are the modes whose tensors the loader rearranges too; without any, it reads
    these Linears plain. `source` names function, file and commit. Releases may differ; a mode is in `algos` only if
    every release that has the class reads it.
    """

    paths: tuple[str, ...]
    algos: frozenset[QuantAlgo] = frozenset()
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """How a model class reads the modules of a layer.

    A path such as `mlp.gate` or `q_proj` means every module of a layer whose name ends with it. `fused` maps the last
    part of a fused Linear's name to those of its parts, which have one parent. `cuts` says how ranks divide a Linear;
    others are not divided. `plain` are the Linears that the class builds without quantization. `experts` is the path of
    the routed experts in a layer, and `projections` are the names of (gate, up, down) that the class reads; None leaves
    them as they are stored. `limits` are the modes that some Linears may have only. `inner` are pairs of a pattern and
    a replacement that turn a delivered name into the one that the class compares with entries of the quantization.

    `mixers` are the parts of a layer other than `self_attn` that attention data parallelism does not divide either.
    `divided` are the keys of config.json whose numbers the ranks must be able to divide evenly. `drafts` is the prefix
    of draft layers that the class counts on after the last layer, such as `mtp.layers.`.
    """

    fused: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    )
    cuts: Mapping[str, Cut] = field(default_factory=lambda: _CUTS)
    plain: tuple[str, ...] = ()
    experts: str = "experts"
    projections: tuple[str, str, str] | None = None
    limits: tuple[Limit, ...] = ()
    inner: tuple[tuple[str, str], ...] = ()
    mixers: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    drafts: str = ""


# TensorRT-LLM `_torch/modules/attention.py`, `gated_mlp.py`: the modules of most classes.
_CUTS: Mapping[str, Cut] = {
    "q_proj": Cut.COLUMN,
    "k_proj": Cut.KV_HEADS,
    "v_proj": Cut.KV_HEADS,
    "o_proj": Cut.ROW,
    "gate_proj": Cut.COLUMN,
    "up_proj": Cut.COLUMN,
    "down_proj": Cut.ROW,
}

DEFAULT_ROW = ClassRow()
"""What the stock weight mapper does with a class that has none of its own.

Source: TensorRT-LLM `_torch/models/checkpoints/hf/weight_mapper.py`."""

# Modes whose tensors have a row for each row of the weight, or one element, under the names that Linears read.
_ROWS_OF_ITS_OWN = frozenset(
    {
        QuantAlgo.FP8,
        QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
        QuantAlgo.NVFP4,
        QuantAlgo.W4A16_NVFP4,
        QuantAlgo.MXFP8,
        QuantAlgo.W4A16_MXFP4,
        QuantAlgo.W4A8_MXFP4_MXFP8,
        QuantAlgo.W8A16,
    }
)

# TensorRT-LLM `_torch/models/modeling_qwen3_next.py` (00022b04), `_torch/modules/mamba/gdn_mixer.py` (0d4bd901) and
# `checkpoints/hf/qwen3_next_weight_mapper.py` (ff5ca335 for 1.2, 32e0e21a for 1.3), `qwen2_moe_weight_mapper.py`
# (00be09f7). `linear_attn.conv1d` is a Linear there; writers store it as a plain convolution, and it is excluded by
# name as any plain module is.
_QWEN3_NEXT = ClassRow(
    cuts={
        **_CUTS,
        "linear_attn.in_proj_qkvz": Cut.COLUMN,
        "linear_attn.in_proj_ba": Cut.COLUMN,
        "linear_attn.out_proj": Cut.ROW,
    },
    plain=("mlp.gate", "mlp.shared_expert_gate", "linear_attn.conv1d"),
    experts="mlp.experts",
    limits=(
        Limit(
            paths=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
            algos=_ROWS_OF_ITS_OWN,
            source="Qwen3NextHfWeightMapper._permute_in_proj_to_dense, `checkpoints/hf/qwen3_next_weight_mapper.py`, "
            "32e0e21a (pull request 16314); 1.2 leaves the rows as they are",
        ),
    ),
    mixers=("linear_attn",),
    divided=("linear_num_key_heads", "linear_num_value_heads"),
    drafts="mtp.layers.",
)

# TensorRT-LLM `_torch/models/modeling_qwen3_5.py` (2478158c to 00620eb0) and `checkpoints/hf/qwen3_5_weight_mapper.py`
# (da259e7d to 04666e21): a decoder of Qwen3-Next whose linear attention is stored in four projections. The class packs
# them into two, and puts the dense MLP one level deeper.
_QWEN3_5_MOE = replace(
    _QWEN3_NEXT,
    cuts={**_CUTS, "linear_attn.out_proj": Cut.ROW},
    limits=(
        Limit(
            paths=tuple(f"linear_attn.in_proj_{part}" for part in ("q", "k", "v", "qkv", "z", "b", "a", "qkvz", "ba")),
            source="Qwen3_5MoeHfWeightMapper._pack_split_projections, `checkpoints/hf/qwen3_5_weight_mapper.py`, "
            "da259e7d to 04666e21: which scales it packs depends on the release and on the global mode",
        ),
        Limit(
            paths=("lm_head",),
            source="`_torch/models/modeling_qwen3_5.py`, 00620eb0: lm_head is added to exclude_modules",
        ),
    ),
    inner=(
        (r"\.in_proj_(?:q|k|v|qkv|z)$", ".in_proj_qkvz"),
        (r"\.in_proj_[ba]$", ".in_proj_ba"),
    ),
)
_QWEN3_5 = replace(
    _QWEN3_5_MOE,
    inner=(*_QWEN3_5_MOE.inner, (r"(layers\.\d+\.mlp)\.(gate_proj|up_proj|down_proj)$", r"\1.mlp.\2")),
)

CLASS_ROWS: Mapping[str, ClassRow] = {
    "Qwen3NextForCausalLM": _QWEN3_NEXT,
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5MoeForCausalLM": _QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5_MOE,
}
"""The rows by the name of the architecture in config.json. Names that are in `ARCHITECTURES` have no row here."""

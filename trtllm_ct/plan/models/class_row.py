"""`ClassRow`: how a model class of the engine reads the modules of a layer; the rows are in `class_rows.py`.

A row has no sizes: they come from the headers of the files (`discovery.py`). So it needs no entries for layers of
different kinds, heads of different sizes, or layers without some projections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.schemes import QuantAlgo

__all__ = ["CUTS", "DEFAULT_ROW", "GATE_UP", "QKV", "ClassRow", "Limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Which modes a class can read some of its Linears in.

    `paths` names the Linears, as in `ClassRow`. `algos` are the modes; if it is empty, the class reads these Linears
    plain. Releases may differ: a mode is in `algos` only if every release that has the class reads it. `obstacle` is
    the middle of the message "the engine's class OBSTACLE MODE", in which MODE is a mode that is not in `algos`.
    `source` names the function, the file and the commit.
    """

    paths: tuple[str, ...]
    algos: frozenset[QuantAlgo] = frozenset()
    obstacle: str = "rearranges the rows of this Linear, and can't rearrange those of"
    source: str


# The Linears that most classes fuse: TensorRT-LLM `_torch/modules/attention.py` and `gated_mlp.py`.
QKV: Mapping[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
GATE_UP: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}

CUTS: Mapping[str, Cut] = {
    "q_proj": Cut.COLUMN,
    "k_proj": Cut.KV_HEADS,
    "v_proj": Cut.KV_HEADS,
    "o_proj": Cut.ROW,
    "gate_proj": Cut.COLUMN,
    "up_proj": Cut.COLUMN,
    "down_proj": Cut.ROW,
}
"""How ranks divide the Linears of most classes, by the same two files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """How a model class reads the modules of a layer.

    A path such as `mlp.gate` or `q_proj` means every module of a layer whose name ends with it. `fused` maps the last
    part of a fused Linear's name to the paths of its parts, which have one parent; of several paths the longest counts.
    `cuts` says how ranks divide a Linear; others are not divided. `table` says how they divide the embeddings. `plain`
    are the Linears that the class builds without quantization. `experts` is the path of the routed experts in a layer,
    and `projections` are the names of (gate, up, down) that the class reads; None leaves them as they are stored.
    `limits` restrict some Linears to a few modes. `inner` are pairs of a pattern and a replacement that turn the name
    of a delivered module into the one that the class looks up in the configuration of the quantization.

    `one_mode` says that the class refuses a configuration with entries for single modules (MIXED_PRECISION). `early`
    are the Linears that the class allocates in the global mode, before it looks at entries and exclusions.
    `ranks_vary` are the Linears that the class may divide among fewer ranks than there are. `tied` says whether the
    head uses the weight of the embeddings if config.json doesn't say.

    `mixers` are the parts of a layer other than `self_attn` that attention data parallelism does not divide either.
    `divided` are the keys of config.json whose numbers the ranks must be able to divide evenly. `drafts` is the prefix
    of draft layers, such as `mtp.layers.`, whose numbers in the class follow that of the last layer.
    `gated_output` says that attention multiplies its output by a gate (`attn_output_gate`) and so never quantizes it.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {**QKV, **GATE_UP})
    cuts: Mapping[str, Cut] = field(default_factory=lambda: CUTS)
    table: Cut = Cut.VOCABULARY
    plain: tuple[str, ...] = ()
    experts: str = "experts"
    projections: tuple[str, str, str] | None = None
    limits: tuple[Limit, ...] = ()
    inner: tuple[tuple[str, str], ...] = ()
    one_mode: bool = False
    early: tuple[str, ...] = ()
    ranks_vary: tuple[str, ...] = ()
    tied: bool = False
    mixers: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    drafts: str = ""
    gated_output: bool = False


DEFAULT_ROW = ClassRow()
"""What the stock weight mapper does with a class that has none of its own.

Source: TensorRT-LLM `_torch/models/checkpoints/hf/weight_mapper.py`."""

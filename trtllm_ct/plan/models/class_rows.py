"""How the engine's model classes read the modules of a layer: one row per class, and one for classes without a row.

The sizes of such a model are not in a table: they come from the headers of its files (`discovery.py`). So layers of
different kinds, heads of different sizes and layers without some projections need nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.schemes import QuantAlgo

__all__ = ["CLASS_ROWS", "DEFAULT_ROW", "ClassRow", "Limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The modes that some Linears of a class may have, since its loader rearranges their rows.

    `paths` are as in `ClassRow`. `algos` are the modes whose tensors the loader rearranges too; without any, it reads
    these Linears plain. `source` names function, file and commit.
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

CLASS_ROWS: Mapping[str, ClassRow] = {}
"""The rows by the name of the architecture in config.json. Names that are in `ARCHITECTURES` have no row here."""

"""`ClassRow`: how a model class of the engine reads the modules of a layer; the rows are in `class_rows.py`.

A row has no sizes: they come from the headers of the files (`discovery.py`). So it needs no entries for layers of
different kinds, heads of different sizes, or layers without some projections. A row may also list the modules that
every layer must have (`Leaves`). Then the files are compared with the sizes in config.json, and no other module is
accepted (`stated_modules.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from trtllm_ct.engine.modes import LINEAR_MODES
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.layer_parts import FINAL_NORM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.plan.models.layer_parts import Part

__all__ = [
    "ALL_MODES",
    "ALWAYS",
    "CUTS",
    "DEFAULT_ROW",
    "GATE_UP",
    "PROJECTION_NAMES",
    "QKV",
    "SHAPES",
    "WHOLE_HEADS",
    "ClassRow",
    "EagerFusion",
    "Leaves",
    "Limit",
    "built_biases",
    "entry_of",
]

T = TypeVar("T")

ALWAYS = "always"
"""In place of a key of config.json: the Linear has a bias in every model of the class."""


def built_biases(**paths: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return `ClassRow.built_biases`, given the paths of Linears by the key of config.json that gives them a bias."""
    return {path: (key,) for key, linears in paths.items() for path in linears}


ALL_MODES = frozenset(mode.algo for mode in LINEAR_MODES)
"""For limits that exclude a few modes."""

WHOLE_HEADS = ("num_key_value_heads",)
"""`ClassRow.divided` of a class that doesn't repeat K/V heads when there are more ranks than heads."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerFusion:
    """Linears whose inputs a class quantizes together with the all-reduce of several ranks.

    It does so by the mode of the whole model: `paths` are the Linears by that mode. It reads their `input_scale` then,
    which a plain Linear does not have, and stops. Models without entries of their own for modules have such a mode.
    `hidden_above` is the hidden size above which the class does it. `switch` is the environment variable that turns it
    off. `source` names the function, the file and the commit.
    """

    paths: Mapping[QuantAlgo, tuple[str, ...]]
    hidden_above: int = 0
    switch: str
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


SHAPES: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("heads", "hidden"),
    "k_proj": ("kv_heads", "hidden"),
    "v_proj": ("kv_heads", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("intermediate", "hidden"),
    "up_proj": ("intermediate", "hidden"),
    "down_proj": ("hidden", "intermediate"),
    "gate": ("experts", "hidden"),
    "experts.gate_proj": ("moe_intermediate", "hidden"),
    "experts.up_proj": ("moe_intermediate", "hidden"),
    "experts.down_proj": ("hidden", "moe_intermediate"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "pre_feedforward_layernorm": ("hidden",),
    "post_feedforward_layernorm": ("hidden",),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
}
"""The sizes of the weights of most classes by name, see `sizes.py`: transformers 5.23 `models/*/modeling_*.py`."""

PROJECTION_NAMES = ("gate_proj", "up_proj", "down_proj")
"""The names of an expert's gate, up and down in most classes, and in `SHAPES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """The modules that every layer of a decoder has, by their paths in the layer.

    `attention`, `mlp` and `shared` are Linears. Layers with routed experts have `shared` in place of `mlp`, with the
    router and the experts; which layers these are is in config.json (`sizes.py: dense_layers_of`).
    """

    attention: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """How a model class reads the modules of a layer.

    A path such as `mlp.gate` or `q_proj` means every module of a layer whose name ends with it. `fused` maps the last
    part of a fused Linear's name to the paths of its parts, which have one parent; of several paths the longest counts.
    `cuts` says how ranks divide a Linear; others are not divided. `table` says how they divide the embeddings. `plain`
    are the Linears that the class builds without quantization. `experts` is the path of the routed experts in a layer,
    and `projections` are the names of (gate, up, down) that the class reads; None leaves them as they are stored.
    `router` is the path of the Linear that selects experts, which the class reads plain.
    `limits` restrict some Linears to a few modes. `inner` are pairs of a pattern and a replacement that turn the name
    of a delivered module into the one that the class looks up in the configuration of the quantization.

    `one_mode` says that the class refuses a configuration with entries for single modules (MIXED_PRECISION). `early`
    are the Linears that the class allocates in the global mode, before it looks at entries and exclusions.
    `ranks_vary` are the Linears that the class may divide among fewer ranks than there are. `tied` says whether the
    head uses the weight of the embeddings if config.json doesn't say.

    `entries` says that the class must get an entry for each quantized module although all have one mode, and `eager`
    that it must if some Linears are plain.
    `read_as` are pairs of a pattern and a replacement that turn the name of a stored module into the one under which
    the class reads it. `keys_as_values` is the key of config.json which says that layers of full attention have no
    v_proj, and `query_only` the key with the number of last layers that take keys and values of earlier ones
    (`shared_attention.py`). `head_unread` says that a class never loads a head of its own, and `all_mixtures` that it
    builds routed experts in every layer, whatever `mlp_only_layers` and `decoder_sparse_step` say.
    `embeddings` and `head` are their names if the class has others than most. `body` is the only prefix of `layers`
    that the class finds; None if it is not checked.

    `mixers` are the parts of a layer other than `self_attn` that attention data parallelism does not divide either.
    `divided` are the keys of config.json, beside the number of attention heads, whose numbers the ranks must be able to
    divide evenly, and `one_stage` says that the class refuses several pipeline stages. `drafts` is the prefix of draft
    layers, such as `mtp.layers.`, whose numbers in the class follow that of the last layer. `gated_output` says that
    attention multiplies its output by a gate (`attn_output_gate`) and so never quantizes it.

    `splits` are Linears that are stored as one and that the class itself cuts by rows, with the names of the sizes of
    their parts; it cuts `weight`, and a `weight_scale` of as many rows. `joins` are Linears that the class itself
    joins, by the path of the last of them; it knows the scales of few modes (`LinearMode.class_joins_scales`).

    `leaves` are the modules that a layer must have; of several, the first counts whose sizes config.json has. Without
    any, a layer has the modules that are stored, and must have the parts in `layer`: of each choice at least one.
    `ends` are the tensors that the body has outside of its layers, beside the embeddings. `shapes` names the sizes of
    the weights of `leaves`, `biases` the keys of config.json that give them a bias, or `always`, and `extras` other
    parameters that they have.

    `built_biases` are the Linears that the engine's class builds with a bias: by path the keys of config.json of which
    one must be set, or `ALWAYS`. It never reads a bias of any other Linear, whatever config.json and transformers say.
    `unbuilt` are names of modules that it doesn't build; of the layers that have one it builds nothing.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {**QKV, **GATE_UP})
    cuts: Mapping[str, Cut] = field(default_factory=lambda: CUTS)
    table: Cut = Cut.VOCABULARY
    plain: tuple[str, ...] = ()
    router: str = ""
    experts: str = "experts"
    projections: tuple[str, str, str] | None = None
    limits: tuple[Limit, ...] = ()
    inner: tuple[tuple[str, str], ...] = ()
    one_mode: bool = False
    early: tuple[str, ...] = ()
    ranks_vary: tuple[str, ...] = ()
    tied: bool = False
    entries: bool = False
    eager: EagerFusion | None = None
    read_as: tuple[tuple[str, str], ...] = ()
    keys_as_values: str = ""
    query_only: str = ""
    head_unread: bool = False
    all_mixtures: bool = False
    embeddings: str = ""
    head: str = ""
    body: str | None = None
    mixers: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    one_stage: bool = False
    drafts: str = ""
    gated_output: bool = False
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leaves: tuple[Leaves, ...] = ()
    layer: tuple[tuple[Part, ...], ...] = ()
    ends: Part = FINAL_NORM
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SHAPES)
    biases: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    built_biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unbuilt: tuple[str, ...] = ()


DEFAULT_ROW = ClassRow()
"""What the stock weight mapper does with a class that has none of its own.

Source: TensorRT-LLM `_torch/models/checkpoints/hf/weight_mapper.py`."""


def entry_of(entries: Mapping[str, T], name: str) -> T | None:
    """Return the entry whose path the name of a module ends with, the longest of several; None without any."""
    while name not in entries:
        _, _, name = name.partition(".")
        if not name:
            return None
    return entries[name]

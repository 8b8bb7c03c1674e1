"""The names by which engines compare a delivered module with entries and exclusions of a configuration.

An engine silently ignores an entry under another name, and then builds the module in another mode. The names are
written here apart from those of the planner:

- A class that wraps a text model compares names inside of the text model: `model.layers...` and `lm_head`.
- All routed experts of a layer are one module; stock-1.2 computes in its child `backend`.
- Some classes build a module under another name than the one that it is delivered under.

Sources: TensorRT-LLM `_torch/models/modeling_utils.py: apply_quant_config_exclude_modules` and
`apply_layerwise_quant_config`, and the class of each name in `_torch/models/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

__all__ = ["ComparedNames"]

_EXPERTS = re.compile(r"(.+\.experts)(\.|$)")
_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration")
# Releases that compute experts in a child of the module that is compared by its own name:
# `_torch/modules/fused_moe/configurable_moe.py`.
_WITH_BACKEND = frozenset({"stock-1.2"})
# Classes that look for the first part of a Linear that is stored fused: `modeling_phi3.py`.
_STORED_FUSED = frozenset({"Phi3"})
_FIRST_OF: Mapping[str, str] = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
# The prefix of draft layers that a class counts after its last layer: `modeling_qwen3_next.py`, `modeling_qwen3_5.py`,
# `modeling_deepseekv4.py`.
_DRAFTS: Mapping[str, str] = {
    "Qwen3Next": "mtp.layers.",
    "Qwen3_5": "mtp.layers.",
    "Qwen3_5Moe": "mtp.layers.",
    "DeepseekV4": "mtp.",
}

_QWEN3_5_MOE = ((r"\.in_proj_(q|k|v|z|qkv)$", ".in_proj_qkvz"), (r"\.in_proj_(b|a)$", ".in_proj_ba"))
_GEMMA4 = ((r"\.router\.proj$", ".moe.router.proj"),)
_SPARSE = ((r"\.self_attn\.indexer\.", ".self_attn.mqa.indexer."),)
_V4 = r"^(model\.)?layers\.(\d+)"
_V4_LAYER = r"model.layers.\2"
# The indexer is a child of the attention backend too.
_INDEXERS = ("self_attn", "self_attn.mqa")
# Classes that take the mode of all experts from the first entry that begins with their name and a dot, and a name that
# does: `NemotronHMOE.__init__`, `modeling_nemotron_h.py` (00620eb0).
_FIRST_EXPERT: Mapping[str, str] = {"NemotronH": "0.up_proj"}
# What a class builds under another name, as a pattern in the delivered name and its replacement.
_BUILT_AS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Starcoder2": ((r"\.mlp\.c_fc$", ".mlp.up_proj"), (r"\.mlp\.c_proj$", ".mlp.down_proj")),
    "Gemma4": _GEMMA4,
    "Gemma4Unified": _GEMMA4,
    "Qwen3_5Moe": _QWEN3_5_MOE,
    "Qwen3_5": (
        *_QWEN3_5_MOE,
        *((rf"(layers\.\d+)\.mlp\.{leaf}$", rf"\1.mlp.mlp.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")),
    ),
    "NemotronH": ((r"^backbone\.", "model."),),
    "DeepseekV32": _SPARSE,
    "GlmMoeDsa": _SPARSE,
    "Afmoe": ((r"\.mlp\.router\.gate$", ".mlp.gate"),),
    "HunYuanMoEV1": ((r"\.mlp\.gate\.wg$", ".mlp.gate"),),
    "Step3p5": tuple((rf"\.moe\.{leaf}$", ".moe.experts") for leaf in ("gate_proj", "up_proj", "down_proj")),
    "GptOss": (
        (r"^model\.embed_tokens$", "model.embedding"),
        (r"^model\.layers\.(\d+)\.self_attn\.[qkv]_proj$", r"model.block.\1.attn.qkv_proj"),
        (r"^model\.layers\.(\d+)\.self_attn\.o_proj$", r"model.block.\1.attn.o_proj"),
        (r"^model\.layers\.(\d+)\.mlp\.router$", r"model.block.\1.mlp.gate"),
        (r"^model\.layers\.(\d+)\.mlp\.experts$", r"model.block.\1.mlp.experts"),
    ),
    "DeepseekV4": (
        (r"^embed$", "model.embed_tokens"),
        (r"^head$", "lm_head"),
        (rf"{_V4}\.attn\.(wq_a|wkv)$", rf"{_V4_LAYER}.self_attn.kv_a_proj_with_mqa"),
        (rf"{_V4}\.attn\.wq_b$", rf"{_V4_LAYER}.self_attn.q_b_proj"),
        (rf"{_V4}\.attn\.wo_a$", rf"{_V4_LAYER}.self_attn.o_a_proj"),
        (rf"{_V4}\.attn\.wo_b$", rf"{_V4_LAYER}.self_attn.o_b_proj"),
        *((rf"{_V4}\.attn\.indexer\.(wq_b|weights_proj)$", rf"{_V4_LAYER}.{at}.indexer.\3") for at in _INDEXERS),
        *(
            (rf"{_V4}\.attn\.(indexer\.)?compressor\.(wkv|wgate)$", rf"{_V4_LAYER}.{at}.\3compressor.wkv_gate")
            for at in _INDEXERS
        ),
        (rf"{_V4}\.ffn\.(experts|gate)$", rf"{_V4_LAYER}.mlp.\3"),
        (rf"{_V4}\.ffn\.shared_experts\.w1$", rf"{_V4_LAYER}.mlp.shared_experts.gate_proj"),
        (rf"{_V4}\.ffn\.shared_experts\.w3$", rf"{_V4_LAYER}.mlp.shared_experts.up_proj"),
        (rf"{_V4}\.ffn\.shared_experts\.w2$", rf"{_V4_LAYER}.mlp.shared_experts.down_proj"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedNames:
    """Says by which names an engine compares the modules of one model.

    `family` is the architecture without its ending. `engine` is the name of the release, and `layers` the number of
    layers of the text model. `body` is the prefix of the text model's body, None if it is not a part of a larger model.
    """

    family: str
    engine: str
    layers: int
    body: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], engine: str, body: str | None) -> Self:
        """Return the names of a model by its parsed config.json; see the fields for `engine` and `body`."""
        text = config.get("text_config")
        text = text if isinstance(text, dict) else config
        architectures = config.get("architectures") or [""]
        name = str(architectures[0] if isinstance(architectures, list) else architectures)
        family = next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), name)
        layers = text.get("num_hidden_layers")
        return cls(family=family, engine=engine, layers=layers if isinstance(layers, int) else 0, body=body)

    def of_module(self, name: str) -> tuple[str, ...]:
        """Return the names of a module, each once; a routed expert has those of the module of all experts."""
        experts = _EXPERTS.match(name)
        stored = experts[1] if experts else name
        names = {stored, self._inside(stored)}
        drafts = _DRAFTS.get(self.family)
        if drafts and (layer := re.fullmatch(rf"{re.escape(drafts)}(\d+)\.(.+)", stored)):
            names.add(f"model.layers.{self.layers + int(layer[1])}.{layer[2]}")
        built = _BUILT_AS.get(self.family, ())
        names |= {re.sub(pattern, replacement, known) for known in names for pattern, replacement in built}
        if experts and self.engine in _WITH_BACKEND:
            names |= {f"{known}.backend" for known in names}
        if experts and self.family in _FIRST_EXPERT:
            first = _FIRST_EXPERT[self.family]
            names |= {f"{known}.{first}" for known in names if re.fullmatch(r"model\..+\.experts", known)}
        around, _, leaf = stored.rpartition(".")
        if self.family in _STORED_FUSED and leaf in _FIRST_OF:
            names.add(f"{self._inside(around)}.{_FIRST_OF[leaf]}")
        return tuple(sorted(names))

    def _inside(self, name: str) -> str:
        """Return the name of a module inside of a text model that is a part of a larger one."""
        if self.body is None:
            return name
        if name.rpartition(".")[2] == "lm_head":
            return "lm_head"
        return f"model.{name.removeprefix(self.body)}" if name.startswith(self.body) else name

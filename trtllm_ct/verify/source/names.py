"""The names of modules in files, and what they mean.

Two names mean the same module if `Names.key` gives them the same key. A key leaves out what writers and releases do
differently: the place of the text model, the names of an expert's projections, and wrappers. It is written apart from
the tables of the planner, for sources and for converted directories.

| names                                                                     | key                              |
|---------------------------------------------------------------------------|----------------------------------|
| `model.layers.0.x`, `model.language_model.layers.0.x`, ...                | `layers.0.x`                     |
| `...block_sparse_moe.experts.3.w1`, `...mlp.experts.3.gate_proj`           | `layers.0.mlp.experts.3.gate`    |
| `layers.0.attention.wq` (Mistral's own form)                              | `layers.0.self_attn.q_proj`      |
| `lm_head`, `language_model.lm_head`, `output`                              | `lm_head`                        |
| `visual.x`, `model.visual.x`                                              | `other:visual.x`                 |

Sources: transformers 4.53 `models/mistral/convert_mistral_weights_to_hf.py`, transformers 5.23
`conversion_mapping.py`, vLLM 0.15 `model_executor/models/mistral.py`, llm-compressor issues 3183 and 3200.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["BODIES", "FUSED_EXPERTS", "HEADS", "OTHER", "Names", "expert_key", "has_native_names", "is_expert"]

BODIES = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "backbone.",
    "model.",
    "",
)
"""The prefixes that a text model has had in files; a longer one comes before its own beginning."""

HEADS = ("lm_head", "language_model.lm_head", "model.language_model.lm_head")
"""The names that the head of a text model has had."""

OTHER = "other:"
"""The beginning of the keys of modules outside of the text model."""

FUSED_EXPERTS = {
    "gate_up_proj": ("gate", "up"),
    "w13_weight": ("gate", "up"),
    "down_proj": ("down",),
    "w2_weight": ("down",),
}
"""Tensors of all experts of a layer, and the projections whose rows each expert's entry has, in this order."""

_TEXT = re.compile(r"(layers\.\d+|embed_tokens|norm)(\.|$)")
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
_PROJECTIONS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    # transformers 5.23 saves every gate_proj of hy_v4 and of deepseek_v4 under these names.
    "linear_gate": "gate",
    "wgate": "gate",
}
_SPELLINGS = (frozenset({"gate_proj", "up_proj", "down_proj"}), frozenset({"w1", "w2", "w3"}))
# The classes whose experts are called w1, w2 and w3, and those that call them gate_proj, up_proj and down_proj.
_NUMBERED_EXPERTS = frozenset(
    {
        "mixtral",
        "minimax",
        "minimax_m2",
        "phimoe",
        "lfm2_moe",
        "deepseek_v4",
        "kimi_linear",
        "minimax_m3_vl",
        "mistral_large4",
        "mistral_large4_text",
    }
)
_NAMED_EXPERTS = frozenset({"llama", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k2"})
# The classes whose plain stacks of experts are stored as [E, in, out].
_TRANSPOSED_EXPERTS = frozenset(
    {
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
        "llama4_text",
        "gpt_oss",
        "openai_privacy_filter",
        "aria",
        "aria_text",
    }
)
# The classes whose plain stacks alternate rows of gate and up.
_ALTERNATING_EXPERTS = frozenset({"gpt_oss"})
# Stacks that are modules beside `experts`, with the usual names: transformers 5.23 `conversion_mapping.py`, granitemoe.
_STACK_MODULES = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
# Stacks that are modules inside of `experts`, with the usual names.
_STACKS_INSIDE = {"fc1": "gate_up_proj", "fc2": "down_proj"}
# The classes whose loader passes on no scale of the KV cache: TensorRT-LLM `_torch/models/modeling_phi3.py`.
_NO_CACHE_SCALES = frozenset({"phi3"})

# The parts of one Linear that an engine makes of several, by the last parts of their names.
_FUSED_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("gate_proj", "up_proj"),
)
# The Linears that `_torch/models/modeling_deepseekv3.py` joins while it loads weights.
_JOINED_BY_CLASS = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_QKV, _GATE_UP = _FUSED_LINEARS[0], _FUSED_LINEARS[1]
# The same for classes that fuse other Linears: TensorRT-LLM `_torch/models/modeling_{afmoe,cohere2,nemotron,...}.py`.
_FUSED_OTHERWISE = {
    "afmoe": ((*_QKV, "self_attn.gate_proj"), _GATE_UP),
    "cohere2": (_QKV,),
    "deepseek_v4": (("shared_experts.w1", "shared_experts.w3"),),
    "gpt_oss": (_QKV,),
    "nemotron": (_QKV,),
    "nemotron_h": (("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),),
}

_SECTIONS = ("embed_tokens", "layers", "norm", "lm_head")
_LEAVES = ("q", "k", "v", "o", "gate", "up", "down")

_NATIVE = re.compile(r"layers\.\d+\.attention\.")
_NATIVE_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"tok_embeddings", "embed_tokens"),
        (r"norm", "norm"),
        (r"output", "lm_head"),
        (r"(layers\.\d+)\.attention_norm", r"\1.input_layernorm"),
        (r"(layers\.\d+)\.ffn_norm", r"\1.post_attention_layernorm"),
        (r"(layers\.\d+)\.attention\.w([qkvo])", r"\1.self_attn.\2_proj"),
        (r"(layers\.\d+)\.attention(\.(?:q|k|v|kv)_fake_quantizer)?", r"\1.self_attn"),
        (r"(layers\.\d+)\.(?:feed_forward\.)?gate", r"\1.mlp.gate"),
        (r"(layers\.\d+)\.(?:feed_forward\.)?experts\.(\d+)\.w1", r"\1.mlp.experts.\2.gate"),
        (r"(layers\.\d+)\.(?:feed_forward\.)?experts\.(\d+)\.w3", r"\1.mlp.experts.\2.up"),
        (r"(layers\.\d+)\.(?:feed_forward\.)?experts\.(\d+)\.w2", r"\1.mlp.experts.\2.down"),
        (r"(layers\.\d+)\.feed_forward\.w1", r"\1.mlp.gate_proj"),
        (r"(layers\.\d+)\.feed_forward\.w3", r"\1.mlp.up_proj"),
        (r"(layers\.\d+)\.feed_forward\.w2", r"\1.mlp.down_proj"),
        (r"vision_encoder\.(.*)\.attention\.w([qkv])", rf"{OTHER}vision_tower.\1.attention.\2_proj"),
        (r"vision_encoder\.(.*)\.attention\.wo", rf"{OTHER}vision_tower.\1.attention.o_proj"),
        (r"vision_encoder\.(.*)\.feed_forward\.w1", rf"{OTHER}vision_tower.\1.feed_forward.gate_proj"),
        (r"vision_encoder\.(.*)\.feed_forward\.w3", rf"{OTHER}vision_tower.\1.feed_forward.up_proj"),
        (r"vision_encoder\.(.*)\.feed_forward\.w2", rf"{OTHER}vision_tower.\1.feed_forward.down_proj"),
        (r"vision_encoder\.(.*)", rf"{OTHER}vision_tower.\1"),
        (r"vision_language_adapter\.w_in", f"{OTHER}multi_modal_projector.linear_1"),
        (r"vision_language_adapter\.w_out", f"{OTHER}multi_modal_projector.linear_2"),
        (r"patch_merger\.merging_layer", f"{OTHER}multi_modal_projector.patch_merger.merging_layer"),
        (r"pre_mm_projector_norm", f"{OTHER}multi_modal_projector.norm"),
    )
)
_NATIVE_TENSORS = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}


def expert_key(experts: str, expert: int, projection: str) -> str:
    """Return the key of one projection of an expert; `experts` is the key of the module of all experts."""
    return f"{experts}.{expert}.{projection}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the names in a directory mean.

    `values_of` are the layers whose values are the output of k_proj, so that an engine reads k_proj as v_proj too.
    `model_type` is the type of the text model. `native` says whether the directory has Mistral's own form.
    `multimodal` says whether the text model is a part of a larger one. `latent` says whether attention has queries that
    are fused with nothing (multi-head latent attention).
    """

    model_type: str
    native: bool
    multimodal: bool
    latent: bool
    values_of: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> Names:
        """Return the names of a directory, by its parsed config.json and the names of its tensors.

        Without names of tensors the directory does not count as one in Mistral's own form.
        """
        nested = config.get("text_config")
        text = nested if isinstance(nested, dict) else config
        architectures = config.get("architectures") or [""]
        family = str(architectures[0] if isinstance(architectures, list) else architectures)
        outer = str(config.get("model_type"))
        model_type = text.get("model_type") or family.removesuffix("ForCausalLM").lower()
        model_type = outer if outer in _NUMBERED_EXPERTS | _TRANSPOSED_EXPERTS else model_type
        return cls(
            model_type=str(model_type),
            native=has_native_names(tensor_names),
            multimodal=text is not config,
            latent=bool(text.get("kv_lora_rank")),
            values_of=_layers_without_values(text),
        )

    @property
    def transposed_experts(self) -> bool:
        """Whether plain stacks of experts are stored as [E, in, out]."""
        return self.model_type in _TRANSPOSED_EXPERTS

    @property
    def alternating_experts(self) -> bool:
        """Whether the rows of gate and up alternate in plain stacks of experts."""
        return self.model_type in _ALTERNATING_EXPERTS

    def stack_of(self, module: str) -> tuple[str, str] | None:
        """Return the module of all experts that a stack under another name is of, and its usual name there; or None."""
        parent, _, leaf = module.rpartition(".")
        if leaf in _STACKS_INSIDE and parent.endswith(".experts"):
            return parent, _STACKS_INSIDE[leaf]
        return (f"{parent}.experts", _STACK_MODULES[leaf]) if leaf in _STACK_MODULES and parent else None

    @property
    def cache_scales_are_read(self) -> bool:
        """Whether an engine reads scales of the KV cache; otherwise they are 1."""
        return not self.latent and self.model_type not in _NO_CACHE_SCALES

    def key(self, module: str) -> str:
        """Return the key of a module."""
        module = module.removesuffix(".base_layer")
        if self.native:
            for pattern, replacement in _NATIVE_NAMES:
                if match := pattern.fullmatch(module):
                    return match.expand(replacement)
        if module in HEADS:
            return "lm_head"
        body = self.body(module)
        if body is not None:
            return _inner_key(module.removeprefix(body))
        return OTHER + _inner_key(module.removeprefix("model."))

    def body(self, module: str) -> str | None:
        """Return the prefix that a module of the text model's body has; None for any other module."""
        return next(
            (body for body in BODIES if module.startswith(body) and _TEXT.match(module.removeprefix(body))), None
        )

    def tensor(self, module: str, local: str, siblings: Iterable[str]) -> str:
        """Return what the name of a tensor in its module means; `siblings` are all names in the module.

        DeepSeek's writers and partial conversions call the multiplier of a block `weight_scale_inv`.
        """
        if local == "weight_scale_inv" and local in siblings and "weight_scale" not in siblings:
            return "weight_scale"
        if not self.native:
            return local
        if local == "qscale_act" and module.endswith("_fake_quantizer"):
            return f"{module.rpartition('.')[2].removesuffix('_fake_quantizer')}_scale"
        meaning = _NATIVE_TENSORS.get(local, local)
        return local if meaning in siblings else meaning

    def variants(self, module: str, key: str) -> tuple[str, ...]:
        """Return the names by which targets of the configuration may mean a module, the stored one first."""
        names = [module]
        if self.native and not key.startswith(OTHER):
            names += [f"model.{self._spelled(key)}", f"language_model.model.{self._spelled(key)}"]
        if self.multimodal and not key.startswith(OTHER):
            body = next((body for body in BODIES if body and module.startswith(body)), "")
            names += HEADS if key == "lm_head" else [other + module.removeprefix(body) for other in BODIES if other]
            names += [f"{name}.linear" for name in names]
        return tuple(dict.fromkeys(names))

    def _spelled(self, key: str) -> str:
        """Return the name of a module of the text model in Hugging Face's form, without the prefix of the body."""
        names = ("w1", "w3", "w2") if self.model_type in _NUMBERED_EXPERTS else ("gate_proj", "up_proj", "down_proj")
        if match := _EXPERT.fullmatch(key):
            parent = match[1].replace(".mlp.", ".block_sparse_moe.") if names[0] == "w1" else match[1]
            return f"{parent}.{match[2]}.{names[('gate', 'up', 'down').index(match[3])]}"
        return key

    def fused_linear(self, key: str) -> str | None:
        """Return the Linear into which an engine fuses a module with others; None for a module that is not fused."""
        if _EXPERT.fullmatch(key) or key.startswith(OTHER):
            return None
        for parts in _FUSED_OTHERWISE.get(self.model_type, _FUSED_LINEARS):
            for part in parts:
                if key.endswith(f".{part}") and not (self.latent and "q_proj" in parts[0]):
                    return f"{key.removesuffix(part)}{'+'.join(parts)}"
        return None

    def is_joined_by_class(self, key: str) -> bool:
        """Whether an engine's model class joins a module with others itself, and reads its scales by another name."""
        return self.latent and key.endswith(_JOINED_BY_CLASS)

    def sharing_scalars(self, key: str) -> str:
        """Return what modules have in common whose scalars an engine takes to be equal."""
        match = _EXPERT.fullmatch(key)
        if match:
            return key if match[3] == "down" else f"{match[1]}.{match[2]}.gate+up"
        return self.fused_linear(key) or key

    def values_key(self, key: str) -> str | None:
        """Return the key of the v_proj that an engine reads from this module too; None without one."""
        match = re.fullmatch(r"(layers\.(\d+)\.self_attn)\.k_proj", key)
        return f"{match[1]}.v_proj" if match and int(match[2]) in self.values_of else None

    def order(self, key: str) -> tuple[int, ...]:
        """Return the place of a module in the model, for sorting: layer, attention, expert, projection."""
        section, _, inner = key.partition(".")
        if section != "layers":
            return (_SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS),)
        layer, _, path = inner.partition(".")
        match = _EXPERT.fullmatch(key)
        kind = 0 if "norm" in path and "." not in path else 1 if path.startswith("self_attn") else 2
        leaf = path.rpartition(".")[2].removesuffix("_proj")
        place = _LEAVES.index(leaf) + 1 if leaf in _LEAVES else 0
        return _SECTIONS.index(section), int(layer), kind, int(match[2]) + 1 if match else 0, place

    def misspelled(self, module: str) -> str | None:
        """Return the names that an expert's projection must have if `module`, a delivered one, has another."""
        match = _EXPERT.search(module)
        if match is None or match[3] not in _PROJECTIONS:
            return None
        if self.model_type not in _NUMBERED_EXPERTS | _NAMED_EXPERTS:
            return None
        names = _SPELLINGS[self.model_type in _NUMBERED_EXPERTS]
        return None if match[3] in names else ", ".join(sorted(names))


def has_native_names(tensor_names: Iterable[str]) -> bool:
    """Whether some tensors have names of Mistral's own form."""
    return any(_NATIVE.match(name) for name in tensor_names)


def _layers_without_values(text: Mapping[str, Any]) -> frozenset[int]:
    """Return the layers without v_proj: those with full attention, if config.json says so (Gemma 4)."""
    kinds = text.get("layer_types") if text.get("attention_k_eq_v") else None
    return frozenset(layer for layer, kind in enumerate(kinds or ()) if kind == "full_attention")


def is_expert(key: str) -> bool:
    """Whether a key is that of a projection of a routed expert."""
    return _EXPERT.fullmatch(key) is not None


def _inner_key(inner: str) -> str:
    """Return the key of a module of the text model by its name behind the prefix of the body."""
    # Gemma 4's experts are beside the MLP; TensorRT-LLM's class has them in a module of their own.
    inner = inner.replace(".block_sparse_moe", ".mlp").replace(".moe.experts", ".experts")
    match = _EXPERT.fullmatch(inner)
    if match is None or match[3] not in _PROJECTIONS:
        return inner
    return expert_key(match[1], int(match[2]), _PROJECTIONS[match[3]])

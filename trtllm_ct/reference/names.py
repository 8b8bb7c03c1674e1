"""Map the names of a checkpoint to the paths of modules and tensors in a transformers model.

Checkpoints keep the names that their publishers gave them, but transformers 5 has renamed modules since; transformers 4
has the names of the checkpoints. A multimodal checkpoint puts its language model behind a prefix that differs between
generations. Both are tables in this file.
Source: transformers 5.23 `conversion_mapping.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.engine.quant_config import QuantConfig

__all__ = ["NameMap", "stacked_suffixes"]

# By model type: parts of dotted names in checkpoints, and their names in transformers. They are replaced in this order.
_MIXTRAL = (("block_sparse_moe", "mlp"),)
_GRANITE = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
)
# The names that DeepSeek published its fourth model under.
_DEEPSEEK_V4 = (
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    *((f"hc_{part}_{local}", f"{part}_hc.{local}") for part in ("attn", "ffn") for local in ("fn", "base", "scale")),
    ("attn.indexer.compressor", "attn.compressor.indexer"),
    ("attn.indexer.wq_b", "attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "attn.compressor.indexer.scorer.weights_proj"),
    ("compressor.norm", "compressor.kv_norm"),
    ("indexer.norm", "indexer.kv_norm"),
    ("ape", "position_bias"),
    ("wgate", "gate_proj"),
    ("wkv", "kv_proj"),
    *((f"w{part}", f"{part[0]}_{part[2]}_proj") for part in ("q_a", "q_b", "o_a", "o_b")),
    ("attn.q_norm", "attn.q_a_norm"),
    ("attn.attn_sink", "attn.sinks"),
    ("attn", "self_attn"),
    ("ffn.gate.bias", "ffn.gate.e_score_correction_bias"),
    *((f"shared_experts.w{at}", f"shared_experts.{name}_proj") for at, name in ((1, "gate"), (3, "up"), (2, "down"))),
    ("ffn", "mlp"),
)
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "deepseek_v4": _DEEPSEEK_V4,
    "ernie4_5_moe": (("mlp.moe_statics", "mlp.gate.moe_statics"),),
    "exaone_moe": (("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),),
    # TensorRT-LLM's class has router and experts in a module beside the MLP: `_torch/models/modeling_gemma4.py`,
    # commit 00e7d103.
    "gemma4_text": (("moe.experts", "experts"), ("moe.router", "router")),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hy_v3": (
        ("mlp.router.gate", "mlp.gate"),
        ("mlp.expert_bias", "mlp.e_score_correction_bias"),
        ("mlp.shared_mlp", "mlp.shared_experts"),
    ),
    "laguna": (
        ("mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        ("mlp.shared_expert", "mlp.shared_experts"),
    ),
    "mimo_v2_flash": (("self_attn.attention_sink_bias", "self_attn.sinks"),),
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "mixtral": _MIXTRAL,
    "nemotron_h": (("backbone", "model"),),
    "phimoe": (*_MIXTRAL, ("mlp.gate", "mlp.router")),
    # TensorRT-LLM's class has the dense MLP one level deeper: `_torch/models/modeling_qwen3_5.py`, commit 00620eb0.
    "qwen3_5_text": (("mlp.mlp", "mlp"),),
}

# By model type: unquantized stacks of experts that were published as [E, in, out], where transformers has [E, out, in].
_TRANSPOSED: Mapping[str, tuple[str, ...]] = {"qwen3_vl_moe_text": (".experts.gate_up_proj", ".experts.down_proj")}

# The prefixes of the language model in multimodal checkpoints, and the matching prefixes in a text-only model. The
# first prefix that matches counts. A name that no prefix matches belongs to a tower, a projector or a draft model.
_LANGUAGE = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.embed_tokens.", "model.embed_tokens."),
    ("model.layers.", "model.layers."),
    ("model.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)

# By model type: prefixes of text-only checkpoints that were published without that of the body.
_BODIES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "deepseek_v4": (
        ("embed.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        ("norm.", "model.norm."),
        ("head.", "lm_head."),
        *((f"hc_head_{local}.", f"model.hc_head.hc_{local}.") for local in ("fn", "base", "scale")),
    ),
}

# The child in which TensorRT-LLM computes routed experts, `_torch/modules/fused_moe/configurable_moe.py`.
_KERNEL = ".backend"

# Prefixes of layers for multi-token prediction; the reference engine generates text without them.
_DRAFT = ("mtp.", "model.mtp.", "model.mtp_layers.")


def stacked_suffixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The suffixes of the stacks [E, in, out] of unquantized experts that a parsed config.json's class reads."""
    text = config.get("text_config") or config
    return _TRANSPOSED.get(text.get("model_type", ""), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMap:
    """Maps the names of one checkpoint to paths in the model.

    `renamed` are pairs: a part of a checkpoint name and its replacement. `language` is the prefix table of a multimodal
    checkpoint; it is empty for a text-only checkpoint. `bodies` are other prefixes, and what the model has instead; a
    name without them stays as it is. `ignored` are prefixes, as model paths, of modules that the
    model does not have. `transposed` are suffixes of the paths of tensors that may be stored as [E, in, out] where the
    model has [E, out, in].
    """

    renamed: tuple[tuple[str, str], ...] = ()
    language: tuple[tuple[str, str], ...] = ()
    bodies: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any], *, model_type: str, model: Iterable[str] = ()) -> NameMap:
        """The map for a parsed config.json; `model_type` is the type of the language model that is built from it.

        `model` are the full names of that model's tensors. A part of a name that the model itself has is not replaced.
        """
        text = config.get("text_config") or config
        dotted = [f".{name}." for name in model]
        draft_layers = text.get("num_nextn_predict_layers") or 0
        layers = text.get("num_hidden_layers") or 0
        return cls(
            renamed=tuple(pair for pair in _RENAMED.get(model_type, ()) if not _has_part(pair[0], dotted)),
            language=_LANGUAGE if text is not config else (),
            bodies=_BODIES.get(model_type, ()),
            ignored=_DRAFT + tuple(f"model.layers.{layer}." for layer in range(layers, layers + draft_layers)),
            transposed=stacked_suffixes(config),
        )

    def path(self, name: str) -> str | None:
        """The path in the model of the tensor or module `name`; None if the model has no such part."""
        dotted = f"{name}."
        if self.language:
            matching = ((stored, target) for stored, target in self.language if dotted.startswith(stored))
            stored, target = next(matching, ("", ""))
            if not stored:
                return None
            dotted = target + dotted.removeprefix(stored)
        if dotted.startswith(self.ignored):
            return None
        stored, target = next((pair for pair in self.bodies if dotted.startswith(pair[0])), ("", ""))
        dotted = target + dotted.removeprefix(stored)
        dotted = f".{dotted}"
        for stored, target in self.renamed:
            dotted = dotted.replace(f".{stored}.", f".{target}.")
        return dotted.strip(".")

    def stored(self, path: str) -> str:
        """The checkpoint's name for a path in the model, for messages.

        The prefix of a multimodal checkpoint is not restored.
        """
        dotted = f".{path}."
        for stored, target in reversed(self.renamed):
            dotted = dotted.replace(f".{target}.", f".{stored}.")
        return dotted.strip(".")

    def translate(self, quant_config: QuantConfig) -> QuantConfig:
        """`quant_config` with module names translated to model paths; modules that the model lacks are left out.

        Several names may mean one module: those under two prefixes, and that of the engine's kernel of experts.
        """
        excluded = (self.path(name.removesuffix(_KERNEL)) for name in quant_config.exclude_modules)
        quantized = (
            (self.path(name.removesuffix(_KERNEL)), layer) for name, layer in quant_config.quantized_layers.items()
        )
        return replace(
            quant_config,
            exclude_modules=tuple(dict.fromkeys(name for name in excluded if name is not None)),
            quantized_layers={name: layer for name, layer in quantized if name is not None},
        )


def _has_part(part: str, dotted: Iterable[str]) -> bool:
    """Whether one of the names, with a dot at both ends, contains `part`."""
    return any(f".{part}." in name for name in dotted)

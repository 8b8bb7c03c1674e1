"""From the names of a checkpoint to the paths of modules and tensors in a transformers model.

Checkpoints keep the names that their publishers gave them; transformers 5 has renamed modules since, and a multimodal
checkpoint wraps its language model in prefixes that differ between generations. Both are tables here.
Source: transformers 5.23 `conversion_mapping.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.quant_config import QuantConfig

__all__ = ["NameMap"]

# By model type: parts of dotted names in checkpoints, and what transformers calls them, applied in this order.
_MIXTRAL = (("block_sparse_moe", "mlp"),)
_GRANITE = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
)
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "ernie4_5_moe": (("mlp.moe_statics", "mlp.gate.moe_statics"),),
    "exaone_moe": (("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),),
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
    "phimoe": (*_MIXTRAL, ("mlp.gate", "mlp.router")),
}

# By model type: plain stacks of experts that were published as [E, in, out], where transformers writes [E, out, in].
_TRANSPOSED: Mapping[str, tuple[str, ...]] = {"qwen3_vl_moe_text": (".experts.gate_up_proj", ".experts.down_proj")}

# Where multimodal checkpoints keep the language model, and what its parts are called in a model of text alone. The
# first prefix that fits counts; what none fits belongs to a tower, a projector or a draft model.
_LANGUAGE = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.embed_tokens.", "model.embed_tokens."),
    ("model.layers.", "model.layers."),
    ("model.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)

# Layers that predict several tokens at once; text is generated without them.
_DRAFT = ("mtp.", "model.mtp.", "model.mtp_layers.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMap:
    """Where the tensors and modules of one checkpoint belong.

    `renamed` are parts of names and what replaces them. `language` is the table of prefixes of a multimodal
    checkpoint, empty for a language model. `ignored` are prefixes, in terms of the model, of what it does not have.
    `transposed` are ends of paths of tensors that may be there as [E, in, out] where the model has [E, out, in].
    """

    renamed: tuple[tuple[str, str], ...] = ()
    language: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any], *, model_type: str) -> NameMap:
        """The map for a parsed config.json; `model_type` is that of the language model which it becomes."""
        text = config.get("text_config") or config
        drafts = text.get("num_nextn_predict_layers") or 0
        behind = text.get("num_hidden_layers") or 0
        return cls(
            renamed=_RENAMED.get(model_type, ()),
            language=_LANGUAGE if text is not config else (),
            ignored=_DRAFT + tuple(f"model.layers.{layer}." for layer in range(behind, behind + drafts)),
            transposed=_TRANSPOSED.get(text.get("model_type", ""), ()),
        )

    def path(self, name: str) -> str | None:
        """The path in the model of a tensor or module; None for what belongs to other parts of the checkpoint."""
        dotted = f"{name}."
        if self.language:
            fitting = ((stored, wanted) for stored, wanted in self.language if dotted.startswith(stored))
            stored, wanted = next(fitting, ("", ""))
            if not stored:
                return None
            dotted = wanted + dotted.removeprefix(stored)
        if dotted.startswith(self.ignored):
            return None
        dotted = f".{dotted}"
        for stored, wanted in self.renamed:
            dotted = dotted.replace(f".{stored}.", f".{wanted}.")
        return dotted.strip(".")

    def stored(self, path: str) -> str:
        """What the checkpoint calls a path of the model, for messages; without the prefix of a multimodal one."""
        dotted = f".{path}."
        for stored, wanted in reversed(self.renamed):
            dotted = dotted.replace(f".{wanted}.", f".{stored}.")
        return dotted.strip(".")

    def translate(self, quant_config: QuantConfig) -> QuantConfig:
        """The same configuration with the modules called as in the model, without those that it does not have."""
        excluded = (self.path(name) for name in quant_config.exclude_modules)
        quantized = ((self.path(name), layer) for name, layer in quant_config.quantized_layers.items())
        return replace(
            quant_config,
            exclude_modules=tuple(name for name in excluded if name is not None),
            quantized_layers={name: layer for name, layer in quantized if name is not None},
        )

"""Tiny checkpoints of Llama 4 and Gemma 4, whose classes in transformers hold the experts of a layer in stacks.

Experts are stored one by one, as they are quantized, or in plain stacks. Nothing here uses the tables of the package
under test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from builders import Built
from decoder_models import _block, _scheme_of
from installed_transformers import in_dtype
from safetensors.torch import load_file, save_file
from stored_schemes import SCHEMES, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["STACKED", "as_saved", "write_stacked"]

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA = _SIZES | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 128,
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "tie_word_embeddings": True,
}
_KEYS_AS_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """One class: the `model_type` and the sizes of its text model, and what holds the text model.

    `outer` is the `model_type` of a wrapper, and `prefix` replaces `model.` in it. `inputs_first` is the order of the
    axes in stacks.
    """

    model_type: str
    sizes: Mapping[str, Any]
    outer: str = ""
    prefix: str = ""
    head: str = "lm_head."
    tower: str = ""
    inputs_first: bool = False


STACKED: Mapping[str, Stacked] = {
    "Llama4ForConditionalGeneration": Stacked(
        model_type="llama4_text",
        sizes=_SIZES
        | {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size_mlp": 1024,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_bias": False,
            "tie_word_embeddings": False,
        },
        outer="llama4",
        prefix="language_model.model.",
        head="language_model.lm_head.",
        tower="vision_model.model.layers.0.self_attn.q_proj.weight",
        inputs_first=True,
    ),
    "Gemma4ForCausalLM": Stacked(
        model_type="gemma4_text",
        sizes=_GEMMA
        | _KEYS_AS_VALUES
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 512},
    ),
    "Gemma4ForConditionalGeneration": Stacked(
        model_type="gemma4_text",
        sizes=_GEMMA
        | {
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 128,
            "vocab_size_per_layer_input": 96,
        },
        outer="gemma4",
        prefix="model.language_model.",
        tower="model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
    ),
    "Gemma4UnifiedForConditionalGeneration": Stacked(
        model_type="gemma4_unified_text",
        sizes=_GEMMA | _KEYS_AS_VALUES,
        outer="gemma4_unified",
        prefix="model.language_model.",
    ),
}
"""By the class in config.json."""

_PLAIN = ("router", "router.proj", "embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection", "lm_head")


def write_stacked(directory: Path, name: str, scheme: str | Mapping[str, str], **more: Any) -> Built:
    """Write a random checkpoint of a class, whose Linears are stored by `scheme`, or by that of the end of their names.

    Experts without a scheme are stored in stacks. `more` are other sizes. `dense` of the result has the exact values
    under the names of a text-only model, those of experts one by one.
    """
    model = STACKED[name]
    config, saved = _saved(directory / "plain", model, more)
    writer = Writer(torch.bfloat16, torch.Generator().manual_seed(0))
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    for key, tensor in saved.items():
        parts = dict(_experts(key, tensor, model)) if tensor.dim() == 3 else {key: tensor}
        if tensor.dim() == 3 and not _scheme(next(iter(parts)), scheme):
            exact |= {part: value.bfloat16().double() for part, value in parts.items()}
            stored[_place(model, key)] = tensor.bfloat16()
            continue
        for part, value in parts.items():
            how = _scheme(part, scheme) if value.dim() == 2 else ""
            if not how:
                stored[_place(model, part)], exact[part] = value.bfloat16(), value.bfloat16().double()
                continue
            module = part.removesuffix(".weight")
            tensors, exact[part] = writer.store(SCHEMES[how], (value.shape[0], value.shape[1]))
            stored |= {_place(model, f"{module}.{local}"): codes for local, codes in tensors.items()}
            named[_place(model, module)] = how
    config["quantization_config"] = _block(named)
    if model.outer:
        if model.tower:
            stored[model.tower] = writer.normal(24, 16).bfloat16()
        config = _wrapped(name, model, config)
    else:
        config["architectures"] = [name]
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file({key: value.contiguous() for key, value in stored.items()}, directory / "model.safetensors")
    return Built(directory=directory, config=config, dense=exact, stored=stored)


def _scheme(key: str, scheme: str | Mapping[str, str]) -> str:
    module, _, local = key.rpartition(".")
    return "" if local != "weight" or module.endswith(_PLAIN) else _scheme_of(module, scheme)


def _saved(directory: Path, model: Stacked, more: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors of a random text model, as transformers saves both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**model.sizes, **more}
    torch.manual_seed(0)
    built: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model.model_type, **given), **in_dtype(torch.float32)
    )
    state = built.state_dict()
    for key, parameter in state.items():
        if key.endswith("layer_scalar"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1 and parameter.is_floating_point():
            parameter.normal_(std=0.1).add_(1)
        elif parameter.dim() > 1:
            parameter.normal_(std=1 / sqrt(parameter.shape[1 if model.inputs_first and parameter.dim() == 3 else -1]))
    built.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | given | {"dtype": "bfloat16"}
    return config, load_file(directory / "model.safetensors")


def _experts(key: str, stack: Tensor, model: Stacked) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of single experts in a stack."""
    around, _, leaf = key.rpartition(".")
    names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    for number, entry in enumerate(stack.mT if model.inputs_first else stack):
        for name, part in zip(names, entry.chunk(len(names)), strict=True):
            yield f"{around}.{number}.{name}.weight", part


def as_saved(name: str, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return exact values under the names of a text-only model, experts in stacks again."""
    result = dict(dense)
    owners = sorted({key.partition(".experts.")[0] for key in dense if ".experts." in key})
    for owner in owners:
        count = 1 + max(int(key.split(".")[-3]) for key in dense if key.startswith(f"{owner}.experts."))
        for leaf, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            entries = [
                torch.cat([result.pop(f"{owner}.experts.{number}.{part}.weight") for part in names])
                for number in range(count)
            ]
            stack = torch.stack(entries)
            result[f"{owner}.experts.{leaf}"] = stack.mT if STACKED[name].inputs_first else stack
    return result


def _place(model: Stacked, key: str) -> str:
    if not model.outer:
        return key
    return key.replace("lm_head.", model.head, 1) if key.startswith("lm_head.") else model.prefix + key[len("model.") :]


def _wrapped(name: str, model: Stacked, config: dict[str, Any]) -> dict[str, Any]:
    whole = {key: config.pop(key) for key in ("quantization_config", "dtype")}
    kinds = {"architectures": [name], "model_type": model.outer, "tie_word_embeddings": config["tie_word_embeddings"]}
    return {**whole, **kinds, "text_config": config, "vision_config": {"model_type": f"{model.outer}_vision"}}

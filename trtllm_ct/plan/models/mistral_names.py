"""Rename the modules of Mistral's own form to their Hugging Face names.

After `hugging_face_names` a checkpoint in this form (`consolidated*.safetensors`) looks like any other one.
`StoredModule.stored_name` remains the name in the file, for messages and for targets.
Scales have other names in this form too: `qscale_weight`, `qscale_act` and `k_fake_quantizer.qscale_act`.
Sources: transformers 4.53 `models/mistral/convert_mistral_weights_to_hf.py` and
`models/mistral3/convert_mistral3_weights_to_hf.py`; vLLM 0.15 `model_executor/models/mistral.py`; mistral-inference 1.6
`moe.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import PlanError
from trtllm_ct.checkpoint.header import format_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule, View

__all__ = ["hugging_face_names"]

_NATIVE = re.compile(r"layers\.\d+\.attention\.")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_VISION_LAYER = re.compile(r"vision_encoder\.(transformer\.layers\.\d+)\.(.+)")
_EXPERT = re.compile(r"(?:feed_forward\.)?experts\.(\d+)\.(w[123])")
_ROUTERS = frozenset({"gate", "feed_forward.gate"})

# The prefix of the text model's body and the name of its head, for a text model and for a multimodal model.
_TEXT_MODEL = ("model.", "lm_head")
_IN_MULTIMODAL_MODEL = ("language_model.model.", "language_model.lm_head")

_OF_LAYER = {
    "attention": "self_attn",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_fake_quantizer": "self_attn",
    "attention.k_fake_quantizer": "self_attn",
    "attention.v_fake_quantizer": "self_attn",
    "attention.kv_fake_quantizer": "self_attn",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_OF_VISION_LAYER = {
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
}
_BESIDE_THE_TEXT = {
    "vision_encoder.patch_conv": "vision_tower.patch_conv",
    "vision_encoder.ln_pre": "vision_tower.ln_pre",
    "vision_language_adapter.w_in": "multi_modal_projector.linear_1",
    "vision_language_adapter.w_out": "multi_modal_projector.linear_2",
    "patch_merger.merging_layer": "multi_modal_projector.patch_merger.merging_layer",
    "pre_mm_projector_norm": "multi_modal_projector.norm",
}
# Positions in `Model.projections`: w1 is the gate, w3 is up, w2 is down.
_PROJECTION_OF_EXPERT = {"w1": 0, "w3": 1, "w2": 2}
_LOCALS = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}


def hugging_face_names(
    modules: dict[str, StoredModule], model: Model, faults: FaultCollector
) -> dict[str, StoredModule]:
    """Return the modules under Hugging Face names; they are unchanged if they don't have Mistral's names.

    Those of a model whose row lists no modules, such as Mistral Large 3, keep their names too.

    Adds a fault for each name that two stored tensors would get. Raises `PlanError` with all faults if the model has no
    name for some modules, instead of later faults for each surplus and each missing tensor.
    """
    if model.stated is None or not any(_NATIVE.match(f"{name}.") for name in modules):
        return modules
    renamed: dict[str, StoredModule] = {}
    unknown = []
    for native, module in modules.items():
        name = _hugging_face_name(native, model)
        if name is None:
            unknown.append(native)
            continue
        views = {_hugging_face_local(native, local, module.views): view for local, view in module.views.items()}
        known = renamed.get(name)
        for local in known.views.keys() & views.keys() if known else ():
            faults.add(
                where=module.full_name(local),
                expected=f"one tensor that makes {name}.{local}",
                found="another one that does",
                remedy="The names are of two checkpoints, and only their source can tell which is meant: move the "
                "files of the other one to another directory.",
            )
        renamed[name] = replace(module.delivered_as(name), views={**(known.views if known else {}), **views})
    if unknown:
        faults.add(
            where=unknown[0],
            expected=f"the modules that a {model.name} has in Mistral's own form",
            found=f"{len(unknown)} others: {format_names(unknown)}",
            remedy="Use the Hugging Face form of the model, which has model*.safetensors.",
        )
        faults.raise_if_any(PlanError)
    return renamed


def _hugging_face_name(native: str, model: Model) -> str | None:
    """Return the Hugging Face name of a module; None if the model has no such module."""
    body, head = _IN_MULTIMODAL_MODEL if model.multimodal else _TEXT_MODEL
    outside_layers = {"tok_embeddings": f"{body}embed_tokens", "norm": f"{body}norm", "output": head}
    if model.multimodal:
        outside_layers |= _BESIDE_THE_TEXT
    if native in outside_layers:
        return outside_layers[native]
    if layer := _LAYER.fullmatch(native):
        inner = _of_layer(layer[2], model)
        return f"{body}layers.{layer[1]}.{inner}" if inner else None
    if model.multimodal and (layer := _VISION_LAYER.fullmatch(native)):
        inner = _OF_VISION_LAYER.get(layer[2])
        return f"vision_tower.{layer[1]}.{inner}" if inner else None
    return None


def _of_layer(native: str, model: Model) -> str | None:
    """Return the Hugging Face path of a module within its layer; None if there is no such module."""
    if native in _ROUTERS:
        return model.row.router or None
    if model.experts and (expert := _EXPERT.fullmatch(native)):
        return f"{model.experts}.{expert[1]}.{model.projections[_PROJECTION_OF_EXPERT[expert[2]]]}"
    return _OF_LAYER.get(native)


def _hugging_face_local(module: str, native: str, siblings: Mapping[str, View]) -> str:
    """Return the Hugging Face local name of a tensor; `siblings` are all tensors of its module.

    If the module already has a tensor of that name, the native name is kept, and the tensor is refused later.
    """
    if module.endswith("_fake_quantizer") and native == "qscale_act":
        return f"{module.rpartition('.')[2].removesuffix('_fake_quantizer')}_scale"
    name = _LOCALS.get(native, native)
    return native if name in siblings else name

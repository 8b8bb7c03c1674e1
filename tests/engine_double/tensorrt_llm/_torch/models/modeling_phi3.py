"""Imitates `_torch/models/modeling_phi3.py`: a loader of its own, which cuts q, k, v and gate, up by rows.

As in the version that knows scales (the one before it loaded plain weights only). It cuts `weight_scale` where its
first size is that of `weight`, with two indices; otherwise every part gets the whole of it. It passes on `weight`,
`weight_scale`, `weight_scale_2` and `input_scale`, and nothing else.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from tensorrt_llm._torch.models.modeling_decoder import Decoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Phi3ForCausalLM"]

_COPIED = ("input_scale", "weight_scale_2")


def _cut(stored: dict[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    weight, scale = stored["weight"][:], stored.get("weight_scale")
    ends = [*accumulate(sizes, initial=0)]
    parts = []
    for first, last in [*pairwise(ends), (ends[-1], weight.shape[0])]:
        part = {"weight": weight[first:last, :]} | {name: stored[name] for name in _COPIED if name in stored}
        if scale is not None:
            by_row = bool(scale.shape) and scale.shape[0] == weight.shape[0]
            part["weight_scale"] = scale[first:last, :] if by_row else scale
        parts.append(part)
    return parts


class Phi3ForCausalLM(Decoder):
    """The decoder with the loader of Phi-3; it takes no weight mapper."""

    def load_weights(self, weights: dict[str, Tensor], weight_mapper: Any = None) -> None:
        config = self.config
        queries, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        sizes = {
            "self_attn.qkv_proj": (queries, config.num_key_value_heads * head_dim),
            "mlp.gate_up_proj": (config.intermediate_size,),
        }
        for name, module in list(self.named_modules()):
            if not module._parameters or (config.tie_word_embeddings and name.startswith("lm_head")):
                continue
            stored = {key[len(name) + 1 :]: tensor for key, tensor in weights.items() if key.startswith(name)}
            fused = next((rows for path, rows in sizes.items() if path in name), None)
            if fused is not None:
                module.load_weights(weights=_cut(stored, fused))
            elif hasattr(module, "load_weights"):
                module.load_weights(weights=[stored])
            else:
                for parameter_name, parameter in module._parameters.items():
                    if parameter is not None:
                        parameter.data.copy_(stored[parameter_name][:])

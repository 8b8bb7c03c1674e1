"""What changes the meaning of weights and is not understood here: refused by name.

Parts of a configuration, and Mistral's own form of a checkpoint: `params.json`, and tensors such as
`layers.0.attention.wq.weight` whose query and key rows are in another order than in the Hugging Face form. Plain
weights could be renamed and reordered. With quantized ones the files don't tell enough: vLLM
(`models/llama.py`) and TensorRT-LLM (`_torch/models/checkpoints/mistral/weight_mapper.py`) reorder `weight` and leave
`weight_scale` and `weight_packed` as they lie, so that writers may have stored these in either order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.config.model import ExpertSparsity, QuantizationConfig
    from trtllm_ct.errors import FaultCollector
    from trtllm_ct.plan.architectures import Model

__all__ = ["MISTRAL_REMEDY", "refuse_mistral_names", "refuse_unsupported"]

MISTRAL_REMEDY = (
    "Use the Hugging Face form of the model, which has config.json and model*.safetensors: Mistral publishes it in the "
    "same repository or in a twin. The rows of queries and keys have another order here, and nothing tells whether "
    "scales and packed codes have it too."
)

# A transform at these places rotates what attention keeps and compares; no weight can take it in.
_OF_ATTENTION = frozenset({"k_cache", "q_attn"})


def refuse_unsupported(config: QuantizationConfig, model: Model, faults: FaultCollector) -> None:
    """Add a fault for every part of a configuration without which the model would be quietly wrong."""
    for transform in config.transforms:
        if transform.location in _OF_ATTENTION:
            faults.add(
                where=f"{config.origin}.transform_config.{transform.name}",
                expected="transforms that fold into weights (weight_input, weight_output, input, output)",
                found=f"a {transform.type} transform applied at run time ({transform.location})",
                remedy="Without the rotation the model is wrong; quantize again without it.",
            )
    if config.expert_sparsity is not None:
        _refuse_expert_sparsity(f"{config.origin}.moe_sparsity_config", config.expert_sparsity, model, faults)


def refuse_mistral_names(names: Iterable[str], faults: FaultCollector) -> None:
    """Add one fault when tensors have the names of Mistral's own form."""
    first = next((name for name in names if name.startswith("layers.") and ".attention." in name), None)
    if first is not None:
        faults.add(
            where=first,
            expected="the names of the Hugging Face form, such as model.layers.0.self_attn.q_proj.weight",
            found="those of Mistral's own form",
            remedy=MISTRAL_REMEDY,
        )


def _refuse_expert_sparsity(where: str, sparsity: ExpertSparsity, model: Model, faults: FaultCollector) -> None:
    """Pruned experts leave an ordinary model when every layer keeps as many as config.json says."""
    if sparsity.method != "prune":
        faults.add(
            where=where,
            expected="method prune",
            found=f"method {sparsity.method}",
            remedy="Experts that were shrunk instead of removed have no published layout; use the unpruned checkpoint.",
        )
        return
    kept = sorted({count for count in sparsity.num_experts if count is not None})
    experts = model.sizes.get("experts", 0)
    if kept and kept != [experts]:
        faults.add(
            where=f"{where}.num_experts",
            expected=f"{experts} experts in every layer, as config.json says",
            found=f"layers that keep {', '.join(str(count) for count in kept)}",
            remedy="Engines hold the same number of experts in every layer; prune all layers to one number, or use the "
            "unpruned checkpoint.",
        )

"""Tensors that no module owns: a fault each, never a silent pass-through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Collection

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["refuse_leftovers"]


def refuse_leftovers(module: StoredModule, owned: Collection[str | None], model: str, faults: FaultCollector) -> None:
    """Add a fault for each tensor of a module whose local name is not in `owned`; `model` is for the message."""
    # Where nothing of a module is owned, codes and scales and all, no tensor was lost: the model has no such module.
    whole = not owned and module.is_quantized and len(module.specs) > 1
    for local, spec in module.specs.items():
        if local in owned:
            continue
        quantization = local in QUANTIZATION_TENSORS and not whole
        faults.add(
            where=module.full_name(local),
            expected="a module that this tensor belongs to" if quantization else f"only tensors of {model}",
            found=f"{spec} without an owner",
            remedy=(
                "A quantization tensor without its weight means that a tensor was lost or renamed."
                if quantization
                else "Nothing would read it; remove it, or check the architecture in config.json."
            ),
        )

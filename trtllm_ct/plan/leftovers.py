"""Refuse tensors that the plan has no use for: each is a fault, and none is passed through silently."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.lost_remedies import FETCH
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Collection

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["refuse_leftovers"]


def refuse_leftovers(module: StoredModule, owned: Collection[str | None], model: str, faults: FaultCollector) -> None:
    """Add a fault for each tensor of a module whose local name is not in `owned`.

    `owned` are the local names that the plan delivers, ignores or reads; `model` names the architecture in messages.
    """
    # A quantized module without any owned tensor is complete, so no tensor was lost: the model has no such module.
    unknown_module = not owned and module.is_quantized and len(module.specs) > 1
    for local, spec in module.specs.items():
        if local in owned:
            continue
        quantization = local in QUANTIZATION_TENSORS and not unknown_module
        faults.add(
            where=module.full_name(local),
            expected="a module that this tensor belongs to" if quantization else f"only tensors of {model}",
            found=f"{spec} without an owner",
            remedy=(
                f"Its weight was lost or renamed. {FETCH}; or remove this tensor if it is left over."
                if quantization
                else "Nothing would read it: remove it, or take it out of an index; or correct architectures in "
                "config.json if the model has it."
            ),
        )

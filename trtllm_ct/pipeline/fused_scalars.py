"""Check the scalars that the parts of a fused Linear must share.

Engines fuse q/k/v and gate/up into one Linear, also in experts. An NVFP4 Linear has one `weight_scale_2` and one
`input_scale`, and releases assert that they are exactly equal in all parts. Planning with a probe makes them equal
(`plan/equalize.py`). Only the delivered values prove it, so they are checked when modules are delivered.
Source: TensorRT-LLM `_torch/modules/linear.py`, NVFP4LinearMethod.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.engine.modes import MODES_BY_ALGO

if TYPE_CHECKING:
    from trtllm_ct.layouts.stored_array import StoredTensors
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["FusedScalars"]


class FusedScalars:
    """Remembers the scalars of each fused Linear, and refuses a part whose scalars differ."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[str, float]] = {}

    def check(self, module: ModulePlan, delivered: StoredTensors) -> None:
        """Raise `PayloadError` if a scalar of this module differs from the one of the first part that was checked."""
        if module.fused_linear is None or module.layer is None:
            return
        for local in MODES_BY_ALGO[module.layer.quant_algo].shared_scalars:
            tensor = delivered.get(f"{module.name}.{local}")
            if tensor is None:
                continue
            value = float(tensor)
            first_module, expected = self._seen.setdefault((module.fused_linear, local), (module.name, value))
            if value != expected:
                raise PayloadError(
                    Fault(
                        where=f"{module.name}.{local}",
                        expected=f"{expected:.9g}, as {first_module} has it: the engine makes one Linear of both",
                        found=f"{value:.9g}",
                        remedy="Quantize again with a current llm-compressor, which links them, or use --to dense.",
                    )
                )

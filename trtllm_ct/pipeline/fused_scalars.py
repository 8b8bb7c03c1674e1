"""Scalars that the parts of a joined Linear must share.

Engines make one Linear of q/k/v and of gate/up, in experts too, which has one `weight_scale_2` and one
`input_scale`: for NVFP4 they assert that the parts agree. Plans with a probe see to it (`plan/equalize.py`); only the
values prove it, so this is checked as modules are delivered.
Source: TensorRT-LLM `_torch/modules/linear.py`, NVFP4LinearMethod.
"""

from __future__ import annotations

from math import isclose
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.plan.equalize import SCALAR_TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["FusedScalars"]


class FusedScalars:
    """Remembers the scalars of each joined Linear and refuses a part that differs from the one before."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[str, float]] = {}

    def check(self, module: ModulePlan, delivered: Mapping[str, Tensor]) -> None:
        """Raise `PayloadError` when a scalar of this module differs from that of another part of its Linear."""
        if module.fused_linear is None or module.layer is None:
            return
        for local in MODES_BY_ALGO[module.layer.quant_algo].shared_scalars:
            tensor = delivered.get(f"{module.name}.{local}")
            if tensor is None:
                continue
            value = float(tensor)
            other, expected = self._seen.setdefault((module.fused_linear, local), (module.name, value))
            if not isclose(value, expected, rel_tol=SCALAR_TOLERANCE):
                raise PayloadError(
                    Fault(
                        where=f"{module.name}.{local}",
                        expected=f"{expected:g}, as {other} has it: the engine makes one Linear of both",
                        found=f"{value:g}",
                        remedy="Quantize again with a current llm-compressor, which links them, or use --to dense.",
                    )
                )

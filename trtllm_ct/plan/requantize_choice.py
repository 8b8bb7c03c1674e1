"""`Choice`: an option that would keep dequantized modules in codes, with its price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_form import json_object

if TYPE_CHECKING:
    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.schemes import Element, QuantAlgo
    from trtllm_ct.engine.requantization import Form

__all__ = ["Choice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one option would make of the modules that it names.

    `what` and `form` are the words of the option. `modules` modules would have `mode`, whose kernels compute on
    `activations`. `dense_bytes` are the bytes of their weights when they are dequantized, and `coded_bytes` those of
    codes and scales.
    """

    what: str
    form: Form
    mode: QuantAlgo
    activations: str
    modules: int
    dense_bytes: int
    coded_bytes: int

    @property
    def for_experts(self) -> bool:
        """Whether it is about routed experts."""
        return self.what == "experts"

    @property
    def calibrated(self) -> bool:
        """Whether its kernels read static scales of inputs, which a calibration gives."""
        return self.form.input_divisor is not None

    @property
    def coded_form(self) -> tuple[Element, DType]:
        """The dtypes of codes and scales: choices that have them in common differ in activations only."""
        return self.form.element, self.form.scale_dtype

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "option": f"{self.what}={self.form.name}",
                "mode": self.mode,
                "activations": self.activations,
                "modules": self.modules,
                "dense_bytes": self.dense_bytes,
                "coded_bytes": self.coded_bytes,
                "usual_error": self.form.usual_error,
                "largest_error": self.form.largest_error,
                "needs_calibration": self.calibrated,
            }
        )

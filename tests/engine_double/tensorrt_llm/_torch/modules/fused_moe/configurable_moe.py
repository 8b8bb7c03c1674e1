"""Imitates `fused_moe/configurable_moe.py`: experts whose parameters belong to a child, `backend`.

Early 2026 (the text of 55,233 characters with `_create_comm_strategy_auto`) the child is built in the constructor with
the model's configuration. What is assigned to the wrapper afterwards, by `apply_layerwise_quant_config` or by
`apply_quant_config_exclude_modules`, does not reach it: only entries for `<experts>.backend` do. The variable
ENABLE_CONFIGURABLE_MOE=0 switched the wrapper off until PR #17009 (2026-07-31).
The newest release builds the child in `create_weights`, with the wrapper's configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.modules.fused_moe.interface import MoE
from torch import nn

if TYPE_CHECKING:
    from tensorrt_llm.models.modeling_utils import QuantConfig
    from torch import Tensor

__all__ = ["ConfigurableMoE"]


class ConfigurableMoE(MoE):
    """The wrapper: it has no parameters of its own."""

    def __init__(self, **arguments: Any) -> None:
        nn.Module.__init__(self)
        self.backend = MoE(**arguments)
        self.quant_config: QuantConfig | None = arguments["model_config"].quant_config

    def create_weights(self) -> None:
        if RELEASE.binds_experts_late:
            self.backend.quant_config = self.quant_config
        self.backend.create_weights()

    def load_weights(self, weights: list[dict[str, Tensor]], allow_partial_loading: bool = False) -> None:
        self.backend.load_weights(weights, allow_partial_loading)

    def forward(self, hidden: Tensor, router_logits: Tensor) -> Tensor:
        output: Tensor = self.backend(hidden, router_logits)
        return output

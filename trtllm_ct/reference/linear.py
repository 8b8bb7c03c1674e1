"""A Linear that holds the delivered tensors unchanged and computes from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trtllm_ct.reference.linear_layouts import Tensors, checked_layout
from trtllm_ct.reference.rules import check_aliases

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from trtllm_ct.engine.quant_config import LayerQuantConfig

__all__ = ["ReferenceLinear"]


class ReferenceLinear(nn.Module):
    """Compute y = x @ W^T + bias; W is dequantized from the delivered tensors in every call.

    The tensors are buffers under their delivered names. They are never cast, copied or changed, not even by
    `.to(dtype)` of the model. The product is computed in the dtype of the input: W is dequantized in float32 (float64
    for a float64 input) and rounded once.

    `layer` names the algorithm and the group size. `bias` says whether the architecture has a bias here. `name` is used
    in messages.
    Raises `PlanError` with a fault for every tensor that is missing, surplus, of a wrong dtype or shape, or different
    under its second name, and for an algorithm or group size that the reference engine can't compute.
    """

    def __init__(
        self,
        tensors: Tensors,
        *,
        layer: LayerQuantConfig,
        in_features: int,
        out_features: int,
        bias: bool = False,
        quantize_activations: bool = True,
        name: str = "linear",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.in_features = in_features
        self.out_features = out_features
        self.quantize_activations = quantize_activations
        self._layout = checked_layout(
            tensors, layer=layer, in_features=in_features, out_features=out_features, name=name, bias=bias
        )
        check_aliases(tensors, self._layout.tensors, name)
        for local, tensor in tensors.items():
            self.register_buffer(local, tensor)
        names = ((rule.name, rule.name_among(tensors)) for rule in self._layout.tensors)
        self._delivered_names = {rule_name: name for rule_name, name in names if name is not None}

    @property
    def delivered(self) -> dict[str, Tensor]:
        """The delivered tensors by their names in `LAYOUTS`, also those that were delivered under an alias."""
        return {rule_name: getattr(self, name) for rule_name, name in self._delivered_names.items()}

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`: computed in float32, or in float64 for float64, and rounded once.

        A `pre_quant_scale` multiplies the input, so it is not part of the weight.
        """
        wide = torch.promote_types(dtype, torch.float32)
        return self._layout.dequantize(self.delivered, wide).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., K] to [..., N], in the dtype of `x`."""
        tensors = self.delivered
        if "pre_quant_scale" in tensors:
            x = x * tensors["pre_quant_scale"].to(x.dtype)
        if self.quantize_activations and self._layout.quantize_input is not None:
            x = self._layout.quantize_input(x, tensors)
        bias = tensors["bias"].to(x.dtype) if "bias" in tensors else None
        return nn.functional.linear(x, self.dequantized_weight(x.dtype), bias)

    def extra_repr(self) -> str:
        """The text that `print(model)` shows in parentheses after the class name."""
        return f"{self.in_features}, {self.out_features}, {self.layer.quant_algo}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - nn.Module's
        """Apply a device change such as `.to(device)`, but ignore casts, which would change codes and scales."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

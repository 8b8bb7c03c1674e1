"""A Linear that holds delivered tensors as they are and computes from them.

One table, `LAYOUTS`, says per algorithm which tensors a Linear has, what they look like, how they become a weight and
what happens to the input. A new algorithm is one row and one function.
Axis letters: `N` out, `K` in, `g` group size.
Source of the layouts: TensorRT-LLM `_torch/modules/linear.py` (main, September 2026) and the exports of ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from trtllm_ct.dtypes import DType
from trtllm_ct.errors import Fault, FaultCollector, PlanError
from trtllm_ct.reference.activations import quantize_per_tensor, quantize_per_token
from trtllm_ct.reference.rules import WIDE_FLOATS, LinearCheck, TensorRule
from trtllm_ct.schemes import QuantAlgo

if TYPE_CHECKING:
    from trtllm_ct.quant_config import LayerQuantConfig

__all__ = ["LAYOUTS", "LinearLayout", "ReferenceLinear"]

Tensors = Mapping[str, Tensor]

_F32 = (DType.F32,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayout:
    """How one algorithm stores a Linear.

    `dequantize(tensors, dtype)` gives the weight [N, K], computed in `dtype`, which is float32 or float64.
    `quantize_input(x, tensors)` gives the input as the kernel sees it; None when activations stay as they are.
    """

    tensors: tuple[TensorRule, ...]
    dequantize: Callable[[Tensors, torch.dtype], Tensor]
    quantize_input: Callable[[Tensor, Tensors], Tensor] | None = None


def dequantize_rows(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """One code an element (int8 or float8 [N, K]), one scale a row ([N])."""
    return tensors["weight"].to(dtype) * tensors["weight_scale"].to(dtype)[:, None]


def dequantize_tensor(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """One code an element ([N, K]), one scale for all."""
    return tensors["weight"].to(dtype) * tensors["weight_scale"].to(dtype)


def dequantize_int4_rows(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """Row pairs of int4 codes ([N/2, K]), one scale a row ([N])."""
    return unpack_row_pairs(tensors["weight"]).to(dtype) * tensors["weight_scale"].to(dtype)[:, None]


def dequantize_int4_groups(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """Row pairs of int4 codes ([N/2, K]), one scale for g neighbours along K ([N, K/g])."""
    codes = unpack_row_pairs(tensors["weight"]).to(dtype)
    return codes * spread_groups(tensors["weight_scale"].to(dtype), codes.shape[1])


def dequantize_int4_groups_with_zero(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """As `dequantize_int4_groups`, plus a `weight_zero` that is added to the scaled code: W = code * scale + zero."""
    scaled = dequantize_int4_groups(tensors, dtype)
    return scaled + spread_groups(tensors["weight_zero"].to(dtype), scaled.shape[1])


def unpack_row_pairs(packed: Tensor) -> Tensor:
    """[N/2, K] bytes -> signed int8 codes [N, K]; byte (i, k) is row 2i (low nibble) and row 2i + 1 (high nibble)."""
    pairs = packed.view(torch.uint8)
    nibbles = torch.stack((pairs & 0x0F, pairs >> 4), dim=1).flatten(0, 1).to(torch.int8)
    return (nibbles ^ 8) - 8


def spread_groups(per_group: Tensor, columns: int) -> Tensor:
    """[N, K/g] -> [N, K]: every entry repeated for the columns of its group."""
    return per_group.repeat_interleave(columns // per_group.shape[1], dim=1)


def _fp8_input_per_tensor(x: Tensor, tensors: Tensors) -> Tensor:
    return quantize_per_tensor(x, tensors.get("input_scale"))


def _fp8_input_per_token(x: Tensor, tensors: Tensors) -> Tensor:  # noqa: ARG001 - the table's signature
    return quantize_per_token(x)


_INT4_ROW_PAIRS = TensorRule(name="weight", dtypes=(DType.U8, DType.I8), shape=("N/2", "K"))
_INT8_CODES = TensorRule(name="weight", dtypes=(DType.I8,), shape=("N", "K"))
_FP8_CODES = TensorRule(name="weight", dtypes=(DType.F8_E4M3,), shape=("N", "K"))
_TENSOR_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=())
_ROW_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=("N",))
_GROUP_SCALE = TensorRule(name="weight_scale", dtypes=_F32, shape=("N", "K/g"))
_GROUP_ZERO = TensorRule(name="weight_zero", dtypes=_F32, shape=("N", "K/g"))
_INPUT_SCALE = TensorRule(name="input_scale", dtypes=_F32, shape=(), required=False)
_PRE_QUANT_SCALE = TensorRule(name="pre_quant_scale", dtypes=WIDE_FLOATS, shape=("K",), required=False)
_BIAS = TensorRule(name="bias", dtypes=WIDE_FLOATS, shape=("N",))

LAYOUTS: Mapping[QuantAlgo, LinearLayout] = {
    QuantAlgo.W4A16: LinearLayout(tensors=(_INT4_ROW_PAIRS, _ROW_SCALE), dequantize=dequantize_int4_rows),
    QuantAlgo.W4A16_AWQ: LinearLayout(
        tensors=(_INT4_ROW_PAIRS, _GROUP_SCALE, _PRE_QUANT_SCALE), dequantize=dequantize_int4_groups
    ),
    QuantAlgo.W4A16_GPTQ: LinearLayout(
        tensors=(_INT4_ROW_PAIRS, _GROUP_SCALE, _GROUP_ZERO), dequantize=dequantize_int4_groups_with_zero
    ),
    QuantAlgo.W8A16: LinearLayout(tensors=(_INT8_CODES, _ROW_SCALE), dequantize=dequantize_rows),
    QuantAlgo.FP8: LinearLayout(
        tensors=(_FP8_CODES, _TENSOR_SCALE, _INPUT_SCALE),
        dequantize=dequantize_tensor,
        quantize_input=_fp8_input_per_tensor,
    ),
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: LinearLayout(
        tensors=(_FP8_CODES, _ROW_SCALE), dequantize=dequantize_rows, quantize_input=_fp8_input_per_token
    ),
}


class ReferenceLinear(nn.Module):
    """y = x @ W^T + bias, with W computed anew from the delivered tensors at every call.

    The tensors are buffers under their delivered names and stay as given: neither cast, copied nor changed, not even by
    `.to(dtype)` of the model. Computation is in the dtype of the input: W is dequantized in float32 (float64 for a
    float64 input) and rounded once.

    `layer` names algorithm and group size, `bias` says whether the architecture has one, `name` is for messages.
    Raises `PlanError` with a fault for every tensor that is missing, surplus, or of a wrong dtype or shape.
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
        self._layout = _layout_of(layer, name)
        faults = FaultCollector()
        check = LinearCheck(name=name, layer=layer, out_features=out_features, in_features=in_features, faults=faults)
        check.check(tensors, (*self._layout.tensors, _BIAS) if bias else self._layout.tensors)
        faults.raise_if_any(PlanError)
        self._names = tuple(tensors)
        for local, tensor in tensors.items():
            self.register_buffer(local, tensor)

    @property
    def delivered(self) -> dict[str, Tensor]:
        """The delivered tensors by their local names."""
        return {local: self.get_buffer(local) for local in self._names}

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`: computed in float32, or in float64 for float64, and rounded once.

        A `pre_quant_scale` belongs to the input and is not part of it.
        """
        wide = torch.promote_types(dtype, torch.float32)
        return self._layout.dequantize(self.delivered, wide).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the dtype of `x`."""
        tensors = self.delivered
        if "pre_quant_scale" in tensors:
            x = x * tensors["pre_quant_scale"].to(x.dtype)
        if self.quantize_activations and self._layout.quantize_input is not None:
            x = self._layout.quantize_input(x, tensors)
        bias = tensors["bias"].to(x.dtype) if "bias" in tensors else None
        return nn.functional.linear(x, self.dequantized_weight(x.dtype), bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows between the parentheses."""
        return f"{self.in_features}, {self.out_features}, {self.layer.quant_algo}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - nn.Module's
        """Follow `.to(device)` but no cast: a code or scale in another dtype is another number."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _layout_of(layer: LayerQuantConfig, name: str) -> LinearLayout:
    layout = LAYOUTS.get(layer.quant_algo)
    if layout is None:
        raise PlanError(
            Fault(
                where=name,
                expected=f"one of {', '.join(LAYOUTS)}",
                found=f"quant_algo {layer.quant_algo}",
                remedy="Give the module an algorithm that the reference engine can compute.",
            )
        )
    return layout

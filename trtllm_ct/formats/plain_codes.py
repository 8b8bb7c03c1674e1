"""`int-quantized`, `float-quantized`, `naive-quantized`: one code an element, in the weight's own shape.

| local name          | dtype                 | shape                                                              |
|---------------------|-----------------------|--------------------------------------------------------------------|
| `weight`            | int8 or float8_e4m3fn | [N, K]                                                             |
| `weight_scale`      | bf16, f16, f32        | one element, [N, 1], [N, ceil(K / g)] or [ceil(N / A), ceil(K / B)] |
| `weight_zero_point` | int8                  | as the scale, never packed                                         |
| `weight_g_idx`      | int32                 | [K]: the group of each column                                      |

The three names share one codec upstream, and 2024's writers label the same bytes now one way, now another; what tells
integers from floats is the dtype of `weight`. Integers of fewer than 8 bits lie here too, one in a byte: weights that
go with quantized activations (W4A8, W4AFP8) are not packed unless the producer asks for it. Blocks of A rows and B
columns at the lower and right edge may be smaller.

A zero point of integers counts whenever it exists, whatever `symmetric` says. One beside float8 codes is a leftover
of 2024's writers and must be all zeros.
Source: compressed-tensors 0.20 `compressors/naive_quantized/base.py`, `compressors/format.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, Element, NumberType, Packing, QuantArgs
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat
from trtllm_ct.formats.companions import check_codes, check_plain_zero_point, check_scale, check_shape, scale_name
from trtllm_ct.formats.group_index import GROUP_INDEX, check_group_index, group_of_columns
from trtllm_ct.layouts.loops.dispatch import repack
from trtllm_ct.layouts.packing import INT8_PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["FLOAT8", "INT8"]


class _PlainCodes(WeightFormat):
    """Codes of one dtype, stored as they are."""

    codes = "weight"
    axes: Mapping[str, Axis] = {
        "weight": Axis.ROWS,
        "weight_scale": Axis.SCALE_ROWS,
        "weight_scale_inv": Axis.SCALE_ROWS,
        "weight_zero_point": Axis.SCALE_ROWS,
        GROUP_INDEX: Axis.COLUMNS,
    }

    def __init__(self, name: str, number: NumberType, dtype: DType, packing: Packing | None, label: str) -> None:
        self.name = name
        self.number = number
        self.dtype = dtype
        self.packing = packing
        self.element = Element.E4M3 if packing is None else Element.INT
        self.declared_as = frozenset({CompressionFormat(label), CompressionFormat.NAIVE_QUANTIZED})

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Arguments of the number type, and a `weight` of the dtype with a float scale, if it has one.

        A float8 weight with an exponent-only scale is MXFP8 and not this format.
        """
        weight, scale = stored.get("weight"), stored.get(scale_name(stored))
        return (
            args.type is self.number
            and weight is not None
            and weight.dtype is self.dtype
            and (scale is None or scale.dtype not in {DType.U8, DType.F8_E8M0})
        )

    def describe(
        self,
        module: str,
        args: QuantArgs,
        stored: StoredSpecs,
        expected_shape: tuple[int, int] | None,
        faults: FaultCollector,
        version: Version = (),  # noqa: ARG002 (the contract names it; no release differs here)
    ) -> StoredWeight | None:
        """See the table above."""
        spec = stored["weight"]
        if not check_codes(module, "weight", spec, self.dtype, faults):
            return None
        shape = (spec.shape[0], spec.shape[1])
        check_shape(module, shape, expected_shape, faults)
        check_scale(module, args, stored, shape, faults)
        zero_point = stored.get("weight_zero_point") if args.type is NumberType.INT else None
        if zero_point is not None:
            check_plain_zero_point(module, args, zero_point, shape, faults)
        scale = scale_name(stored)
        names = ("weight", scale, "weight_zero_point", GROUP_INDEX)
        return StoredWeight(
            format=self,
            args=args,
            shape=shape,
            codes="weight",
            packing=self.packing,
            element=self.element,
            scale=scale,
            has_zero_point=zero_point is not None,
            group_index=check_group_index(module, args, stored, shape, faults),
            axes={name: self.axes[name] for name in names if name in stored},
        )

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """The stored tensors themselves, reshaped."""
        import torch

        zero_point = stored["weight_zero_point"] if weight.has_zero_point else None
        return Codes(
            values=stored["weight"],
            packing=self.packing,
            element=self.element,
            shape=weight.shape,
            scale=stored[weight.scale].reshape(weight.scale_shape),
            zero_point=None if zero_point is None else zero_point.reshape(weight.scale_shape).to(torch.int8),
            group_index=group_of_columns(weight, stored),
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, Tensor]:  # noqa: ARG002 (the contract names it)
        """One code an element; `codes` may come in any packing."""
        values = codes.values
        if codes.packing is not None:
            values = repack(values, codes.packing, INT8_PLAIN, codes.shape)
        tensors = {"weight": values, "weight_scale": codes.scale}
        zero_point = codes.plain_zero_point
        if zero_point is not None:
            tensors["weight_zero_point"] = zero_point
        if codes.group_index is not None:
            tensors[GROUP_INDEX] = codes.group_index
        return tensors


INT8 = _PlainCodes("int-quantized", NumberType.INT, DType.I8, INT8_PLAIN, "int-quantized")
FLOAT8 = _PlainCodes("float-quantized", NumberType.FLOAT, DType.F8_E4M3, None, "float-quantized")

"""`int-quantized`, `float-quantized`, `naive-quantized`: one unpacked code per element, in the shape of the weight.

| local name          | dtype                 | shape                                                              |
|---------------------|-----------------------|--------------------------------------------------------------------|
| `weight`            | int8 or float8_e4m3fn | [N, K]                                                             |
| `weight_scale`      | bf16, f16, f32        | one element, [N, 1], [N, ceil(K / g)] or [ceil(N / A), ceil(K / B)] |
| `weight_zero_point` | int8                  | the shape of the scale; never packed                               |
| `weight_g_idx`      | int32                 | [K]: the group of each column                                      |

A x B are the rows and columns of a block; blocks at the lower and right edge may be smaller. g is the group size.

The three names share one codec in compressed-tensors, and writers of 2024 use different names for the same bytes. The
dtype of `weight` distinguishes integers from floats. Integers of fewer than 8 bits are also stored like this, one per
byte: weights for quantized activations (W4A8, W4AFP8) are not packed unless the producer asks for it.

A zero point of integer codes is applied whenever it exists, whatever `symmetric` says. A zero point of float8 codes is
a leftover of writers of 2024 and must be all zeros.
Source: compressed-tensors 0.20 `compressors/naive_quantized/base.py`, `compressors/format.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, Element, NumberType, Packing, QuantArgs
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat
from trtllm_ct.formats.companions import (
    check_codes,
    check_plain_zero_point,
    check_scale,
    check_shape,
    plain_zero_point,
    scale_name,
)
from trtllm_ct.formats.group_index import GROUP_INDEX, check_group_index, group_of_columns
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = ["FLOAT8", "INT8"]


class _PlainCodes(WeightFormat):
    """Unpacked codes of one dtype."""

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
        """Accept arguments of this number type with a `weight` of this dtype.

        A weight with a uint8 or float8_e8m0fnu scale (powers of two) is not accepted: it is MXFP8.
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
        """Return the weight that the tensors in the table above make up."""
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
            zero_point=self.zero_point if zero_point is not None else None,
            group_index=check_group_index(module, args, stored, shape, faults),
            axes={name: self.axes[name] for name in names if name in stored},
        )

    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return the stored codes and scale without a copy, the scale as (rows, groups), and zero points as int8."""
        zero_point = stored[weight.zero_point] if weight.zero_point else None
        return Codes(
            values=stored["weight"],
            packing=self.packing,
            element=self.element,
            shape=weight.shape,
            scale=stored[weight.scale].reshape(*weight.scale_shape),
            zero_point=None if zero_point is None else plain_zero_point(weight, zero_point),
            group_index=group_of_columns(weight, stored),
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, StoredArray]:  # noqa: ARG002 (the contract names it)
        """Return the tensors by local name, with one code per element; `codes` may have any packing."""
        values = codes.values if codes.packing is None else codes.repacked(INT8_PLAIN)
        tensors = {"weight": values, "weight_scale": codes.scale}
        zero_point = codes.plain_zero_point
        if zero_point is not None:
            tensors["weight_zero_point"] = StoredArray(zero_point, DType.I8)
        if codes.group_index is not None:
            tensors[GROUP_INDEX] = codes.group_index
        return tensors


INT8 = _PlainCodes("int-quantized", NumberType.INT, DType.I8, INT8_PLAIN, "int-quantized")
FLOAT8 = _PlainCodes("float-quantized", NumberType.FLOAT, DType.F8_E4M3, None, "float-quantized")

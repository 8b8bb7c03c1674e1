"""`mxfp8-quantized`: float8 codes in the shape of the weight, with a power-of-two scale for each 32 columns.

| local name     | dtype                    | shape                                      |
|----------------|--------------------------|--------------------------------------------|
| `weight`       | float8_e4m3fn            | [N, K]                                     |
| `weight_scale` | uint8 or float8_e8m0fnu  | [N, K/32], e means 2^(e - 127); 255 is NaN |

The dtype of the scale distinguishes this format from `float-quantized`. Releases since 0.15 write it.
Source: compressed-tensors 0.20 `compressors/mxfp8/base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, Element, NumberType
from trtllm_ct.formats.microscaling import MicroscalingFormat, mx_axes

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.formats.base import StoredSpecs

__all__ = ["MXFP8"]


class _MXFP8(MicroscalingFormat):
    name = "mxfp8-quantized"
    declared_as = frozenset({CompressionFormat.MXFP8_QUANTIZED})
    codes = "weight"
    axes = mx_axes("weight")
    code_dtype = DType.F8_E4M3
    element = Element.E4M3
    packing = None

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Accept float8_e4m3fn weights whose scales are uint8 or float8_e8m0fnu."""
        weight, scale = stored.get("weight"), stored.get("weight_scale")
        return (
            args.type is NumberType.FLOAT
            and args.num_bits == 8
            and weight is not None
            and weight.dtype is DType.F8_E4M3
            and scale is not None
            and scale.dtype in {DType.U8, DType.F8_E8M0}
        )


MXFP8 = _MXFP8()

"""`mxfp6-pack-quantized`: E2M3 codes, four in three bytes, with a power-of-two scale for each 32 columns.

| local name      | dtype                    | shape                                                        |
|-----------------|--------------------------|--------------------------------------------------------------|
| `weight_packed` | uint8                    | [N, 3K/4], a little-endian stream: code k in bits 6k to 6k+5 |
| `weight_scale`  | uint8 or float8_e8m0fnu  | [N, K/32], e means 2^(e - 127); 255 is NaN                   |

A code has a sign bit, two exponent bits (bias 1) and three mantissa bits. Releases since 0.20 write this format.
Source: compressed-tensors 0.20 `compressors/mxfp6/{base,helpers}.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, Element
from trtllm_ct.formats.microscaling import MicroscalingFormat, mx_axes
from trtllm_ct.formats.small_floats import is_packed_float
from trtllm_ct.layouts.floats import E2M3_PACKED

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.formats.base import StoredSpecs

__all__ = ["MXFP6"]


class _MXFP6(MicroscalingFormat):
    name = "mxfp6-pack-quantized"
    declared_as = frozenset({CompressionFormat.MXFP6_PACK_QUANTIZED})
    codes = "weight_packed"
    axes = mx_axes("weight_packed")
    code_dtype = DType.U8
    element = Element.E2M3
    packing = E2M3_PACKED

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Accept 6-bit floats packed in uint8."""
        return is_packed_float(args, stored, bits=6)


MXFP6 = _MXFP6()

"""`mxfp4-pack-quantized`: E2M1 codes, two per byte, with a power-of-two scale for each 32 columns.

| local name      | dtype                    | shape                                        |
|-----------------|--------------------------|----------------------------------------------|
| `weight_packed` | uint8                    | [N, K/2], even columns in the low nibble     |
| `weight_scale`  | uint8 or float8_e8m0fnu  | [N, K/32], e means 2^(e - 127); 255 is NaN   |

Releases 0.13 to 0.17 may declare a `weight_global_scale`, but no release writes it. If the tensor exists, it is a
fault.
Source: compressed-tensors 0.20 `compressors/mxfp4/base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, Element
from trtllm_ct.formats.microscaling import MicroscalingFormat, mx_axes
from trtllm_ct.formats.small_floats import has_e4m3_scales, is_packed_float
from trtllm_ct.layouts.floats import E2M1_PACKED

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.formats.base import StoredSpecs

__all__ = ["MXFP4"]


class _MXFP4(MicroscalingFormat):
    name = "mxfp4-pack-quantized"
    declared_as = frozenset({CompressionFormat.MXFP4_PACK_QUANTIZED})
    codes = "weight_packed"
    axes = mx_axes("weight_packed")
    code_dtype = DType.U8
    element = Element.E2M1
    packing = E2M1_PACKED

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Accept 4-bit floats packed in uint8 whose scales are not E4M3; those are NVFP4."""
        return is_packed_float(args, stored, bits=4) and not has_e4m3_scales(args, stored)


MXFP4 = _MXFP4()

"""`nvfp4-pack-quantized`: E2M1 codes, two per byte, with an E4M3 scale for each 16 columns and one global divisor.

| local name            | dtype                   | shape                                             |
|-----------------------|-------------------------|---------------------------------------------------|
| `weight_packed`       | uint8                   | [N, K/2], even columns in the low nibble          |
| `weight_scale`        | float8_e4m3fn           | [N, K/16]; uint8 with the same bytes is read too  |
| `weight_global_scale` | float32                 | one element: 448 * 6 / largest absolute weight    |
| `input_global_scale`  | float32                 | one element, W4A4 only; scales the activations    |

A weight is `code * weight_scale / weight_global_scale`. The global scale divides; ModelOpt's `weight_scale_2`
multiplies. The library reads a missing global scale as 1, which makes the weight wrong by a factor of hundreds; this
package reports a fault.

A global scale of 0 belongs to an expert that calibration never reached; its weight is zero. `decode` returns an
infinite divisor for it, so that the division gives zero.
Source: compressed-tensors 0.20 `compressors/nvfp4/{base,helpers}.py`; releases since 0.10 write the same bytes.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.lost_remedies import lost_or_damaged
from trtllm_ct.base.schemes import CompressionFormat, Element
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat
from trtllm_ct.formats.companions import check_codes, check_shape
from trtllm_ct.formats.small_floats import (
    NVFP4_GROUP,
    check_group_scale,
    check_group_size,
    has_e4m3_scales,
    is_packed_float,
    local_scale,
    logical_shape,
)
from trtllm_ct.layouts.floats import E2M1_PACKED
from trtllm_ct.layouts.stored_array import scalar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors

__all__ = ["NVFP4"]

_GLOBAL_SCALE_DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})


class _NVFP4(WeightFormat):
    name = "nvfp4-pack-quantized"
    declared_as = frozenset({CompressionFormat.NVFP4_PACK_QUANTIZED})
    codes = "weight_packed"
    axes: Mapping[str, Axis] = {
        "weight_packed": Axis.ROWS,
        "weight_scale": Axis.SCALE_ROWS,
        "weight_global_scale": Axis.SCALAR,
        "weight_zero_point": Axis.SCALE_ROWS,
    }

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Accept 4-bit floats packed in uint8 with E4M3 scales."""
        return is_packed_float(args, stored, bits=4) and has_e4m3_scales(args, stored)

    def describe(
        self,
        module: str,
        args: QuantArgs,
        stored: StoredSpecs,
        expected_shape: tuple[int, int] | None,
        faults: FaultCollector,
        version: Version = (),  # noqa: ARG002 (no release differs)
    ) -> StoredWeight | None:
        """Return the weight that the tensors in the table above make up."""
        packed = stored["weight_packed"]
        is_matrix = check_codes(module, "weight_packed", packed, DType.U8, faults)
        if not check_group_size(module, args, NVFP4_GROUP, faults) or not is_matrix:
            return None
        shape = logical_shape(packed, E2M1_PACKED, expected_shape)
        check_shape(module, shape, expected_shape, faults)
        check_group_scale(module, args, stored, shape, (DType.F8_E4M3, DType.U8), faults)
        _check_global_scale(module, stored, faults)
        return StoredWeight(
            format=self,
            args=args,
            shape=shape,
            codes="weight_packed",
            packing=E2M1_PACKED,
            element=Element.E2M1,
            divisor="weight_global_scale",
            axes={name: axis for name, axis in self.axes.items() if name in stored},
        )

    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return the stored codes and scales without a copy, and the divisor, which is infinite if 0 is stored."""
        divisor = float(stored["weight_global_scale"])
        return Codes(
            values=stored["weight_packed"],
            packing=E2M1_PACKED,
            shape=weight.shape,
            scale=local_scale(weight, stored["weight_scale"]).reshape(*weight.scale_shape),
            element=Element.E2M1,
            divisor=inf if divisor == 0 else divisor,
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, StoredArray]:  # noqa: ARG002 (the contract names it)
        """Return the tensors by local name, as the library writes them.

        `codes` may have any packing; they need E4M3 scales and a divisor.
        """
        if codes.divisor is None:
            raise AssertionError("NVFP4 has a divisor")
        return {
            "weight_packed": codes.repacked(E2M1_PACKED),
            "weight_scale": codes.scale,
            "weight_global_scale": scalar(0 if codes.divisor == inf else codes.divisor),
        }


NVFP4 = _NVFP4()


def _check_global_scale(module: str, stored: StoredSpecs, faults: FaultCollector) -> None:
    """Add a fault if the divisor is missing, not bfloat16, float16 or float32, or not one element."""
    spec = stored.get("weight_global_scale")
    if spec is not None and spec.dtype in _GLOBAL_SCALE_DTYPES and spec.numel == 1:
        return
    faults.add(
        where=f"{module}.weight_global_scale",
        expected="one float32 element, which the scaled codes are divided by",
        found=str(spec) if spec else "no such tensor",
        remedy=(
            f"Without it the weight is wrong by a factor of hundreds. {lost_or_damaged(spec)}; or save the model with "
            "a release of its writer that keeps this tensor."
        ),
    )

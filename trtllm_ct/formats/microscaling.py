"""The base class of the MX formats MXFP4, MXFP6 and MXFP8: small floats in groups of 32 columns.

The scale of a group is a power of two (E8M0). There is no scale for the whole tensor, and a `weight_zero_point` must
hold zeros only.
Source: OCP Microscaling Formats 1.0; compressed-tensors 0.20 `compressors/mx_utils.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, final

from trtllm_ct.base.dtypes import DType
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat
from trtllm_ct.formats.companions import check_codes, check_shape
from trtllm_ct.formats.small_floats import check_group_scale, check_group_size, local_scale, logical_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import Element, Packing, QuantArgs
    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors

__all__ = ["MicroscalingFormat", "mx_axes"]

_GROUP = 32


def mx_axes(codes: str) -> Mapping[str, Axis]:
    """Return the `axes` of an MX format whose codes have the local name `codes`."""
    return {codes: Axis.ROWS, "weight_scale": Axis.SCALE_ROWS, "weight_zero_point": Axis.SCALE_ROWS}


class MicroscalingFormat(WeightFormat):
    """Codes of one element type with E8M0 scales.

    The formats differ in the element type, the local name and dtype of the codes, and the packing.
    """

    code_dtype: DType
    element: Element
    packing: Packing | None

    @abstractmethod
    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Return whether a module with these arguments and tensors is stored in this format."""

    @final
    def describe(
        self,
        module: str,
        args: QuantArgs,
        stored: StoredSpecs,
        expected_shape: tuple[int, int] | None,
        faults: FaultCollector,
        version: Version = (),  # noqa: ARG002 (no release differs)
    ) -> StoredWeight | None:
        """Return the weight that the tensors in the table of the format's module make up."""
        spec = stored[self.codes]
        is_matrix = check_codes(module, self.codes, spec, self.code_dtype, faults)
        if not check_group_size(module, args, _GROUP, faults) or not is_matrix:
            return None
        shape = logical_shape(spec, self.packing, expected_shape)
        check_shape(module, shape, expected_shape, faults)
        check_group_scale(module, args, stored, shape, (DType.U8, DType.F8_E8M0), faults)
        _refuse_global_scale(module, stored, faults)
        return StoredWeight(
            format=self,
            args=args,
            shape=shape,
            codes=self.codes,
            packing=self.packing,
            element=self.element,
            axes={name: axis for name, axis in self.axes.items() if name in stored},
        )

    @final
    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return the stored tensors without a copy; scales are viewed as uint8 exponents."""
        return Codes(
            values=stored[self.codes],
            packing=self.packing,
            shape=weight.shape,
            scale=local_scale(weight, stored["weight_scale"]).reshape(*weight.scale_shape),
            element=self.element,
        )

    @final
    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, StoredArray]:  # noqa: ARG002 (the contract names it)
        """Return the tensors by local name, as the library writes them.

        Packed `codes` may have any packing; their scales must be uint8 exponents.
        """
        values = codes.values if self.packing is None else codes.repacked(self.packing)
        return {self.codes: values, "weight_scale": codes.scale}


def _refuse_global_scale(module: str, stored: StoredSpecs, faults: FaultCollector) -> None:
    """Add a fault if there is a scale for the whole tensor: MX formats have none, and it must not be ignored either."""
    if "weight_global_scale" in stored:
        faults.add(
            where=f"{module}.weight_global_scale",
            expected="no scale for the whole tensor beside power-of-two scales",
            found=str(stored["weight_global_scale"]),
            remedy="Check `format` and group_size in config_groups: NVFP4 has such a scale, the MX formats have none.",
        )

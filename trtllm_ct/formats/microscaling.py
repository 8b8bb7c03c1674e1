"""What MXFP4, MXFP6 and MXFP8 share: groups of 32 columns, each scaled by a power of two, and nothing else.

Source: OCP Microscaling Formats 1.0; compressed-tensors 0.20 `compressors/mx_utils.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, final

from trtllm_ct.base.dtypes import DType
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat
from trtllm_ct.formats.companions import check_codes, check_shape
from trtllm_ct.formats.small_floats import check_group_scale, check_group_size, local_scale, logical_shape
from trtllm_ct.layouts.loops.dispatch import repack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import Element, Packing, QuantArgs

__all__ = ["MicroscalingFormat", "axes_with"]

_GROUP = 32


def axes_with(codes: str) -> Mapping[str, Axis]:
    """The tensors of a format whose codes have the local name `codes`."""
    return {codes: Axis.ROWS, "weight_scale": Axis.SCALE_ROWS, "weight_zero_point": Axis.SCALE_ROWS}


class MicroscalingFormat(WeightFormat):
    """Codes of one element type with E8M0 scales; formats differ in where the codes are and how they are packed."""

    code_dtype: DType
    element: Element
    packing: Packing | None

    @abstractmethod
    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """See the format."""

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
        """See the table of the format."""
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
    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """The stored tensors themselves; scales as uint8 exponents."""
        return Codes(
            values=stored[self.codes],
            packing=self.packing,
            shape=weight.shape,
            scale=local_scale(weight, stored["weight_scale"]).reshape(weight.scale_shape),
            element=self.element,
        )

    @final
    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, Tensor]:  # noqa: ARG002 (the contract names it)
        """What the library writes; packed `codes` may come in any packing, scales are uint8 exponents."""
        values = codes.values
        if codes.packing is not None and self.packing is not None:
            values = repack(values, codes.packing, self.packing, codes.shape)
        return {self.codes: values, "weight_scale": codes.scale}


def _refuse_global_scale(module: str, stored: StoredSpecs, faults: FaultCollector) -> None:
    """A scale for the whole tensor has no meaning here; it is neither applied nor passed over."""
    if "weight_global_scale" in stored:
        faults.add(
            where=f"{module}.weight_global_scale",
            expected="no scale for the whole tensor beside power-of-two scales",
            found=str(stored["weight_global_scale"]),
            remedy="Check `format` and group_size in config_groups: NVFP4 has such a scale, the MX formats have none.",
        )

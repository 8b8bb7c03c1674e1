"""Who decodes: this package's own codecs, or the compressed-tensors library.

Both answer the same two calls, so that a plan runs with either and tests compare them.
The library is imported when its codec is first used and not before: that costs seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.base.schemes import Element
from trtllm_ct.layouts.floats import element_fields
from trtllm_ct.layouts.loops.dispatch import dequantize
from trtllm_ct.layouts.packing import INT8_PLAIN, pack_fields
from trtllm_ct.layouts.scales import Scaling

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.formats.base import Codes, StoredWeight

__all__ = ["LIBRARY", "NATIVE", "Codec"]


class Codec(Protocol):
    """Turns the stored tensors of one module (by local name) into codes or into plain weights."""

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """Codes, scale and zero point."""

    def dequantize(self, weight: StoredWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Plain weights [N, K] of `dtype`."""


class _NativeCodec:
    """The formats of this package; every dequantized element is the exact value rounded once."""

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """What the weight's format decodes; codes that can stay packed do."""
        return weight.format.decode(weight, stored)

    def dequantize(self, weight: StoredWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """[N, K] of `dtype`, rounded once; elements beyond its range become infinite."""
        codes = self.decode(weight, stored)
        scaling = Scaling(
            scale=codes.scale,
            zero_point=codes.plain_zero_point,
            group_columns=weight.group_columns,
            block_rows=weight.block_rows,
            group_index=codes.group_index,
            divisor=codes.divisor,
        )
        return dequantize(codes.values, codes.packing, codes.element, codes.shape, scaling, dtype)


# The library has had no decoder for these since 0.15, or never had one.
_DROPPED = frozenset({"marlin-24"})


class _LibraryCodec:
    """The compressed-tensors package: its bit unpacking for codes, its decompressors for plain weights.

    Its decompressors compute in the dtype of the scale; that result is then converted to `dtype`.
    What release 0.20 misreads or refuses (padded words, group indices, a last group that is not whole) is left to this
    package's own codecs.
    Source: compressed-tensors 0.20 `compressors/base.py`, `compressors/pack_quantized/helpers.py`.
    """

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """What the library unpacks: integers as int8 [N, K], small floats packed again."""
        codes = weight.format.decode(weight, stored)
        if codes.packing is None or codes.packing == INT8_PLAIN or not codes.packing.dense:
            return codes
        if codes.element is not Element.INT:
            return replace(codes, values=_library_fields(codes, codes.packing)) if _in_whole_groups(weight) else codes
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        bits = weight.args.num_bits
        zero_point = codes.plain_zero_point
        if weight.zero_point_packing is not None:
            # Old writers leave surplus columns behind the groups, which the library does not know.
            packed = stored["weight_zero_point"][:, : weight.scale_shape[1]]
            zero_point = unpack_from_int32(packed, bits, torch.Size(weight.scale_shape), packed_dim=0)
        values = unpack_from_int32(codes.values, bits, torch.Size(weight.shape))
        return replace(codes, values=values, packing=INT8_PLAIN, zero_point=zero_point, zero_point_packing=None)

    def dequantize(self, weight: StoredWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """[N, K] of `dtype`, computed in the dtype of the scale before that."""
        codes = self.decode(weight, stored)
        if codes.group_index is not None or not _in_whole_groups(weight) or weight.format.name in _DROPPED:
            return NATIVE.dequantize(weight, stored, dtype)
        from compressed_tensors.compressors import BaseCompressor

        compressor = BaseCompressor.get_value_from_registry(weight.format.name)
        # The library insists on weight_shape and on the shapes that its own writer gives.
        tensors = weight.format.encode(codes, weight.args)
        if weight.divisor is not None and codes.divisor is not None:
            # It would make NaN of the 0 of an expert without calibration; by infinity it divides.
            tensors[weight.divisor] = codes.divisor
        dense: Tensor = compressor.decompress(tensors, _library_scheme(weight))["weight"]
        return dense.to(dtype)


def _in_whole_groups(weight: StoredWeight) -> bool:
    """Whether the last group is whole too, as the library demands."""
    return weight.shape[1] % (weight.args.group_size or 1) == 0


def _library_fields(codes: Codes, packing: Packing) -> Tensor:
    """Packed codes of small floats, unpacked to values by the library and packed again here."""
    rows, columns = codes.shape
    if codes.element is Element.E2M3:
        from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8 as unpack
    else:
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8 as unpack
    held = codes.values.shape[1] * packing.container.bits // packing.bits
    values = unpack(codes.values, rows, held)[:, :columns]
    return pack_fields(element_fields(values, codes.element), packing)


def _library_scheme(weight: StoredWeight) -> object:
    """The library's scheme object for one weight."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = weight.args
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=args.num_bits,
            type=str(args.type),
            symmetric=not weight.has_zero_point,
            strategy=str(args.strategy),
            group_size=args.group_size,
            block_structure=args.block_structure,
            scale_dtype=args.scale_dtype,
        ),
    )


NATIVE: Codec = _NativeCodec()
LIBRARY: Codec = _LibraryCodec()

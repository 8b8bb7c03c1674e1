"""The two codecs that decode stored weights: `NATIVE` (this package) and `LIBRARY` (compressed-tensors).

Both have the same two methods, so that a plan can run with either and tests can compare them.
The compressed-tensors library is imported when its codec is first used, because the import takes seconds.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.base.schemes import Element, NumberType, Strategy
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
    """Decodes the stored tensors of one module, given by local name, to codes or to plain weights."""

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """Return the codes, scale and zero point of the weight."""

    def dequantize(self, weight: StoredWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, [N, K] of `dtype`."""


class _NativeCodec:
    """Decodes with the formats of this package; a dequantized element is the exact value, rounded once."""

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """Return what the format of the weight decodes; codes stay packed where the format allows it."""
        return weight.format.decode(weight, stored)

    def dequantize(self, weight: StoredWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight, [N, K] of `dtype`, rounded once; elements beyond the range of `dtype` become infinite."""
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


# Formats that the library can't decode: it has had no decoder for them since 0.15, or never had one.
_NOT_IN_LIBRARY = frozenset({"marlin-24"})
# The release whose decoders are known to read all other formats. 0.15, which is the newest beside torch before 2.10,
# has none for MXFP4 and MXFP6, reads codes that straddle words as padded ones, and refuses blocks at a ragged edge.
_COMPLETE_LIBRARY = (0, 20)
_MICROSCALING = frozenset({"mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"})
_WORD_BITS = 32


class _LibraryCodec:
    """Decodes with the compressed-tensors package: its bit unpacking for codes, its decompressors for plain weights.

    The decompressors compute in the dtype of the scale; the result is then converted to the requested dtype.
    `NATIVE` decodes what release 0.20 of the library misreads or refuses: padded words, group indices, and weights
    whose last group is not full. Beside an older release it also decodes microscaling formats, blocks, and integers
    whose width doesn't divide a word.
    Sources: compressed-tensors 0.20 and 0.15 `compressors/{base.py,pack_quantized,mxfp4}`.
    """

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """Return codes that the library unpacked: integers as int8 [N, K]; small floats are then packed again.

        Codes that are not packed, or that the library can't unpack, come from the format of this package.
        """
        codes = weight.format.decode(weight, stored)
        if codes.packing is None or codes.packing == INT8_PLAIN or not codes.packing.dense:
            return codes
        if not _library_reads(weight):
            return codes
        if codes.element is not Element.INT:
            return replace(codes, values=_library_fields(codes, codes.packing))
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        bits = weight.args.num_bits
        zero_point = codes.plain_zero_point
        if weight.zero_point is not None and weight.zero_point_packing is not None:
            # Old writers stored surplus columns after the last group; the library does not expect them.
            packed = stored[weight.zero_point][:, : weight.scale_shape[1]]
            zero_point = unpack_from_int32(packed, bits, torch.Size(weight.scale_shape), packed_dim=0)
        values = unpack_from_int32(codes.values, bits, torch.Size(weight.shape))
        return replace(codes, values=values, packing=INT8_PLAIN, zero_point=zero_point, zero_point_packing=None)

    def dequantize(self, weight: StoredWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight, [N, K] of `dtype`; the library computes in the dtype of the scale."""
        codes = self.decode(weight, stored)
        if codes.group_index is not None or not _has_full_groups(weight) or not _library_reads(weight):
            return NATIVE.dequantize(weight, stored, dtype)
        from compressed_tensors.compressors import BaseCompressor

        compressor = BaseCompressor.get_value_from_registry(weight.format.name)
        # The library requires weight_shape, and the tensor shapes that its own writer produces.
        tensors = weight.format.encode(codes, weight.args)
        if weight.divisor is not None and codes.divisor is not None:
            # An expert that calibration never reached has a stored divisor of 0. The library would turn that into
            # NaN; with the infinite divisor that decode returns, it computes zeros.
            tensors[weight.divisor] = codes.divisor
        plain: Tensor = compressor.decompress(tensors, _library_scheme(weight))["weight"]
        return plain.to(dtype)


def _library_reads(weight: StoredWeight) -> bool:
    """Whether the installed release of the library has a decoder for the weight that reads it rightly."""
    if weight.format.name in _NOT_IN_LIBRARY:
        return False
    if _library_release() >= _COMPLETE_LIBRARY:
        return True
    args = weight.args
    straddles = args.type is NumberType.INT and _WORD_BITS % args.num_bits != 0
    return not (straddles or weight.format.name in _MICROSCALING or args.strategy is Strategy.BLOCK)


@cache
def _library_release() -> tuple[int, int]:
    """The major and minor number of the installed compressed-tensors."""
    major, minor = importlib.metadata.version("compressed-tensors").split(".")[:2]
    return int(major), int(minor)


def _has_full_groups(weight: StoredWeight) -> bool:
    """Whether the last group of a row is full too, as the library requires."""
    return weight.shape[1] % (weight.args.group_size or 1) == 0


def _library_fields(codes: Codes, packing: Packing) -> Tensor:
    """Return small floats as packed codes: the library unpacks them to values, which are packed again here."""
    rows, columns = codes.shape
    if codes.element is Element.E2M3:
        from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8 as unpack
    else:
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8 as unpack
    capacity = codes.values.shape[1] * packing.container.bits // packing.bits
    values = unpack(codes.values, rows, capacity)[:, :columns]
    return pack_fields(element_fields(values, codes.element), packing)


def _library_scheme(weight: StoredWeight) -> object:
    """Return the `QuantizationScheme` object of the library for one weight."""
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

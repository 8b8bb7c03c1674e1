"""The two codecs that decode stored weights: `NATIVE` (this package) and `LIBRARY` (compressed-tensors).

Both have the same two methods, so that a plan can run with either and tests can compare them.
What differs between releases of the library is in `library.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.base.schemes import Element
from trtllm_ct.formats import library
from trtllm_ct.layouts.floats import element_fields
from trtllm_ct.layouts.loops.dispatch import dequantize
from trtllm_ct.layouts.packing import INT8_PLAIN, pack_fields
from trtllm_ct.layouts.scales import Scaling
from trtllm_ct.layouts.stored_array import StoredArray, scalar

if TYPE_CHECKING:
    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.formats.base import Codes, StoredWeight
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = ["LIBRARY", "NATIVE", "Codec"]


class Codec(Protocol):
    """Decodes the stored tensors of one module, given by local name, to codes or to plain weights."""

    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return the codes, scale and zero point of the weight."""

    def dequantize(self, weight: StoredWeight, stored: StoredTensors, dtype: DType) -> StoredArray:
        """Return the dequantized weight, [N, K] of `dtype`."""


class _NativeCodec:
    """Decodes with the formats of this package; a dequantized element is the exact value, rounded once."""

    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return what the format of the weight decodes; codes stay packed where the format allows it."""
        return weight.format.decode(weight, stored)

    def dequantize(self, weight: StoredWeight, stored: StoredTensors, dtype: DType) -> StoredArray:
        """Return the weight, [N, K] of `dtype`, rounded once; elements beyond the range of `dtype` become infinite."""
        codes = self.decode(weight, stored)
        scaling = Scaling(
            scale=codes.scale,
            zero_point=codes.plain_zero_point,
            group_columns=weight.group_columns,
            block_rows=weight.block_rows,
            group_index=None if codes.group_index is None else codes.group_index.elements,
            divisor=1.0 if codes.divisor is None else codes.divisor,
        )
        return dequantize(codes.values, codes.packing, codes.element, codes.shape, scaling, dtype)


class _LibraryCodec:
    """Decodes with the compressed-tensors package: its bit unpacking for codes, its decompressors for plain weights.

    The decompressors compute in the dtype of the scale; the result is then converted to the requested dtype.
    `NATIVE` decodes what release 0.20 of the library misreads or refuses: padded words, group indices, and weights
    whose last group is not full; and what the installed release does, see `library.py: LINES`.
    """

    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return codes that the library unpacked: integers as int8 [N, K]; small floats are then packed again.

        Codes that are not packed, or that the library can't unpack, come from the format of this package.
        """
        codes = weight.format.decode(weight, stored)
        if codes.packing is None or codes.packing == INT8_PLAIN or not codes.packing.dense:
            return codes
        if not library.installed_line().reads(weight):
            return codes
        if codes.element is not Element.INT:
            return replace(codes, values=_library_fields(codes, codes.packing))
        bits = weight.args.num_bits
        zero_point = codes.zero_point
        if weight.zero_point is not None and weight.zero_point_packing is not None:
            # Old writers stored surplus columns after the last group; the library does not expect them.
            packed = stored[weight.zero_point][:, : weight.scale_shape[1]]
            zero_point = library.unpack_integers(packed, bits, weight.scale_shape, along_rows=True)
        values = library.unpack_integers(codes.values, bits, weight.shape)
        return replace(codes, values=values, packing=INT8_PLAIN, zero_point=zero_point, zero_point_packing=None)

    def dequantize(self, weight: StoredWeight, stored: StoredTensors, dtype: DType) -> StoredArray:
        """Return the weight, [N, K] of `dtype`; the library computes in the dtype of the scale."""
        codes = self.decode(weight, stored)
        reads = library.installed_line().reads(weight)
        if codes.group_index is not None or not _has_full_groups(weight) or not reads:
            return NATIVE.dequantize(weight, stored, dtype)
        # The library requires weight_shape, and the tensor shapes that its own writer produces.
        tensors = weight.format.encode(codes, weight.args)
        if weight.divisor is not None and codes.divisor is not None:
            # An expert that calibration never reached has a stored divisor of 0. The library would turn that into
            # NaN; with the infinite divisor that decode returns, it computes zeros.
            tensors[weight.divisor] = scalar(codes.divisor)
        return library.decompress(weight, tensors, dtype)


def _has_full_groups(weight: StoredWeight) -> bool:
    """Whether the last group of a row is full too, as the library requires."""
    return weight.shape[1] % (weight.args.group_size or 1) == 0


def _library_fields(codes: Codes, packing: Packing) -> StoredArray:
    """Return small floats as packed codes: the library unpacks them to values, which are packed again here."""
    rows, columns = codes.shape
    capacity = codes.values.shape[1] * packing.container.bits // packing.bits
    values = library.unpack_small_floats(codes.values, codes.element, (rows, capacity))[:, :columns]
    return StoredArray(pack_fields(element_fields(values.numbers, codes.element), packing), packing.container)


NATIVE: Codec = _NativeCodec()
LIBRARY: Codec = _LibraryCodec()

"""Unpack, pack and repack integer codes in containers, which are numpy arrays.

A `Packing` describes how codes are stored. Codes stay integers throughout, and no function changes its input.
A field is the bit pattern of one code as it is stored, in a uint8.
Axis letters: `O` out (rows, N), `I` in (columns, K), `P` packed.
Sources: compressed-tensors 0.20 `compressors/pack_quantized/helpers.py` for the int32 containers; ModelOpt 0.47
`export/quant_utils.py` and TensorRT-LLM `_torch/modules/linear.py` for the engine's int4 row pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing
from trtllm_ct.layouts.stored_array import numpy_dtype

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    Container = NDArray[Any]
    Fields = NDArray[np.uint8]
    IntegerCodes = NDArray[np.int8]

__all__ = [
    "INT4_ROW_PAIRS",
    "INT8_PLAIN",
    "pack_codes",
    "pack_fields",
    "packed_words",
    "repack",
    "run_size",
    "unpack_codes",
    "unpack_fields",
]

INT4_ROW_PAIRS = Packing(bits=4, container=DType.U8, axis=0, offset_binary=False)
"""The engine's int4: byte (i, k) holds row 2i in its low nibble and row 2i+1 in its high nibble, two's complement."""

INT8_PLAIN = Packing(bits=8, container=DType.I8, axis=1, offset_binary=False)
"""One signed byte per code, as in the engine's W8A16 and in the `int-quantized` format."""


def packed_words(bits: int, axis: int = 1, *, dense: bool = True) -> Packing:
    """Return the packing of `pack-quantized`: offset binary in int32, along axis 1 for weights and 0 for zero points.

    Since compressed-tensors 0.18.0, codes of 3, 5, 6 and 7 bits form one dense stream of bits. Earlier releases left
    the highest bits of each word unused (`dense=False`).
    """
    return Packing(bits=bits, container=DType.I32, axis=1 if axis else 0, offset_binary=True, dense=dense)


def unpack_codes(packed_OP: Container, packing: Packing, shape: tuple[int, int]) -> IntegerCodes:
    """Return the signed codes in a container: int8 of `shape`, in [-2^(bits-1), 2^(bits-1) - 1].

    The container has the shape `packing.packed_shape(shape)`, or surplus elements along either axis, which are ignored.
    """
    return _signed(unpack_fields(packed_OP, packing, shape), packing)


def unpack_fields(packed_OP: Container, packing: Packing, shape: tuple[int, int]) -> Fields:
    """Return the bit pattern of each code as it is stored: uint8 of `shape`, in [0, 2^bits - 1]."""
    import numpy as np

    fields = _split_stream(_byte_streams(packed_OP, packing), packing)
    if packing.axis == 0:
        fields = fields.T
    return np.ascontiguousarray(fields[: shape[0], : shape[1]])


def pack_codes(codes_OI: IntegerCodes, packing: Packing) -> Container:
    """Pack signed int8 codes into a container: the inverse of `unpack_codes`.

    Returns a contiguous array of the container's dtype and of shape `packing.packed_shape(codes.shape)`. The unused
    bits of the last element are zero.
    """
    import numpy as np

    unsigned = codes_OI.view(np.uint8)
    if packing.offset_binary:
        unsigned = unsigned + np.uint8(1 << (packing.bits - 1))
    return pack_fields(unsigned & np.uint8((1 << packing.bits) - 1), packing)


def pack_fields(fields_OI: Fields, packing: Packing) -> Container:
    """Pack uint8 fields of `packing.bits` bits into a container: the inverse of `unpack_fields`."""
    import numpy as np

    lines = fields_OI if packing.axis == 1 else fields_OI.T
    width = packing.elements(lines.shape[1]) * packing.container.itemsize
    streams = _join_stream(lines, packing)
    padded = np.zeros((lines.shape[0], width), np.uint8)
    used = min(width, streams.shape[1])
    padded[:, :used] = streams[:, :used]
    packed = padded.view(numpy_dtype(packing.container))
    return packed if packing.axis == 1 else np.ascontiguousarray(packed.T)


def repack(packed: Container, source: Packing, target: Packing, shape: tuple[int, int]) -> Container:
    """Convert codes of `shape` from one packing to another; a target with fewer bits keeps the low bits of each code.

    For equal packings the result is the input array itself, without a copy.
    """
    return packed if source == target else pack_codes(unpack_codes(packed, source, shape), target)


def _byte_streams(packed: Container, packing: Packing) -> Fields:
    """Return the container as uint8 [lines, bytes]: one line per row (axis 1) or per column (axis 0).

    This relies on little-endian byte order, which safetensors prescribes and which the supported machines have.
    """
    import numpy as np

    lines = np.ascontiguousarray(packed if packing.axis == 1 else packed.T)
    return lines.view(np.uint8)


def _split_stream(streams: Fields, packing: Packing) -> Fields:
    """Split bytes [lines, bytes] into fields, uint8 [lines, codes].

    A field lies in one byte or straddles two; then its low bits are the highest bits of the first byte.
    """
    import numpy as np

    size, count = run_size(packing)
    if count == 1:
        return streams
    lines, width = streams.shape
    padded = np.pad(streams, ((0, 0), (0, -width % size)))
    runs = padded.reshape(lines, padded.shape[1] // size, size)
    fields = np.empty((*runs.shape[:2], count), np.uint8)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        fields[..., i] = runs[..., byte] >> np.uint8(shift)
        if shift + packing.bits > 8:
            fields[..., i] |= runs[..., byte + 1] << np.uint8(8 - shift)
    fields &= np.uint8((1 << packing.bits) - 1)
    return fields.reshape(lines, runs.shape[1] * count)


def _join_stream(lines: Fields, packing: Packing) -> Fields:
    """Join fields [lines, codes] into bytes, with the last run padded by zero bits: the inverse of `_split_stream`."""
    import numpy as np

    size, count = run_size(packing)
    if count == 1:
        return lines
    padded = np.pad(lines, ((0, 0), (0, -lines.shape[1] % count)))
    runs = padded.reshape(padded.shape[0], padded.shape[1] // count, count)
    streams = np.zeros((*runs.shape[:2], size), np.uint8)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        streams[..., byte] |= runs[..., i] << np.uint8(shift)
        if shift + packing.bits > 8:
            streams[..., byte + 1] |= runs[..., i] >> np.uint8(8 - shift)
    return streams.reshape(lines.shape[0], runs.shape[1] * size)


def run_size(packing: Packing) -> tuple[int, int]:
    """Return the number of bytes and of codes in a run, a unit of the stored bytes that holds whole codes only.

    A run is one byte when `bits` divides 8, else eight codes of a dense stream, else one element of the container.
    """
    if 8 % packing.bits == 0:
        return 1, 8 // packing.bits
    if packing.dense:
        return packing.bits, 8
    return packing.container.itemsize, packing.container.bits // packing.bits


def _signed(fields: Fields, packing: Packing) -> IntegerCodes:
    """Convert fields of `packing.bits` bits to signed int8 codes."""
    import numpy as np

    half = np.uint8(1 << (packing.bits - 1))
    # The top bit of two's complement counts as -half; flipping it gives offset binary, code + half.
    offset = fields if packing.offset_binary else fields ^ half
    # The subtraction wraps around in uint8; read as int8, the result is the signed code.
    codes: IntegerCodes = (offset - half).view(np.int8)
    return codes

"""Unpack, pack and repack integer codes in container tensors.

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

if TYPE_CHECKING:
    from torch import Tensor

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

_TILE_BYTES = 1 << 20  # the temporaries of a tile fit into the cache, and don't grow with the weight


def packed_words(bits: int, axis: int = 1, *, dense: bool = True) -> Packing:
    """Return the packing of `pack-quantized`: offset binary in int32, along axis 1 for weights and 0 for zero points.

    Since compressed-tensors 0.18.0, codes of 3, 5, 6 and 7 bits form one dense stream of bits. Earlier releases left
    the highest bits of each word unused (`dense=False`).
    """
    return Packing(bits=bits, container=DType.I32, axis=1 if axis else 0, offset_binary=True, dense=dense)


def unpack_codes(packed_OP: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """Return the signed codes in a container: int8 of `shape`, in [-2^(bits-1), 2^(bits-1) - 1].

    The container has the shape `packing.packed_shape(shape)`, or surplus elements along either axis, which are ignored.
    """
    return _signed(unpack_fields(packed_OP, packing, shape), packing)


def unpack_fields(packed_OP: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """Return the bit pattern of each code as it is stored: uint8 of `shape`, in [0, 2^bits - 1]."""
    streams = _byte_streams(packed_OP, packing)
    fields = _split_stream(streams, packing)
    if packing.axis == 0:
        fields = fields.T
    return fields[: shape[0], : shape[1]].contiguous()


def pack_codes(codes_OI: Tensor, packing: Packing) -> Tensor:
    """Pack signed int8 codes into a container: the inverse of `unpack_codes`.

    Returns a contiguous tensor of the container's dtype and of shape `packing.packed_shape(codes.shape)`. The unused
    bits of the last element are zero.
    """
    import torch

    half = 1 << (packing.bits - 1)
    unsigned = codes_OI.view(torch.uint8) + half if packing.offset_binary else codes_OI.view(torch.uint8)
    return pack_fields(unsigned & ((1 << packing.bits) - 1), packing)


def pack_fields(fields_OI: Tensor, packing: Packing) -> Tensor:
    """Pack uint8 fields of `packing.bits` bits into a container: the inverse of `unpack_fields`."""
    import torch

    lines = fields_OI if packing.axis == 1 else fields_OI.T
    width = packing.elements(lines.shape[1]) * packing.container.itemsize
    streams = _join_stream(lines, packing)
    padded = torch.zeros((lines.shape[0], width), dtype=torch.uint8, device=lines.device)
    used = min(width, streams.shape[1])
    padded[:, :used] = streams[:, :used]
    packed = padded.view(packing.container.torch_dtype)
    return packed if packing.axis == 1 else _transposed(packed)


def repack(packed: Tensor, source: Packing, target: Packing, shape: tuple[int, int]) -> Tensor:
    """Convert codes of `shape` from one packing to another; a target with fewer bits keeps the low bits of each code.

    For equal packings the result is the input tensor itself, without a copy.
    The two conversions that common checkpoints need have a direct path; all others go through int8 codes.
    """
    import torch

    if source == target:
        return packed
    exact = tuple(packed.shape) == source.packed_shape(shape)
    if exact and (source, target) == (packed_words(4), INT4_ROW_PAIRS) and shape[0] % 2 == 0 and shape[1] % 8 == 0:
        return _int4_words_to_row_pairs(packed)
    if exact and (source, target) == (packed_words(8), INT8_PLAIN) and shape[1] % 4 == 0:
        return packed.view(torch.uint8).bitwise_xor(0x80).view(torch.int8)
    return pack_codes(unpack_codes(packed, source, shape), target)


def _int4_words_to_row_pairs(packed_OP: Tensor) -> Tensor:
    """Convert offset-binary int32 words along K, [N, K/8], to row pairs in two's complement, uint8 [N/2, K].

    In memory a word is four bytes with two columns each. For a pair of rows (even, odd) and one such byte, the two low
    nibbles form the result byte of the first column, and the two high nibbles form that of the second column.
    Offset binary and two's complement differ only in the top bit of each nibble, hence the 0x88.
    """
    import torch

    columns_OC = packed_OP.view(torch.uint8)
    rows, width = columns_OC.shape
    pairs = columns_OC.view(rows // 2, 2, width)
    result = torch.empty((rows // 2, width, 2), dtype=torch.uint8, device=packed_OP.device)
    step = max(1, _TILE_BYTES // max(1, 2 * width))
    for start in range(0, rows // 2, step):
        even, odd = pairs[start : start + step].unbind(1)
        tile = result[start : start + step]
        torch.bitwise_or(even & 0x0F, odd << 4, out=tile[..., 0])
        torch.bitwise_or(even >> 4, odd & 0xF0, out=tile[..., 1])
        tile.bitwise_xor_(0x88)
    return result.view(rows // 2, 2 * width)


def _byte_streams(packed: Tensor, packing: Packing) -> Tensor:
    """Return the container as uint8 [lines, bytes]: one line per row (axis 1) or per column (axis 0).

    This relies on little-endian byte order, which safetensors prescribes and which the supported machines have.
    """
    import torch

    lines = packed.contiguous() if packing.axis == 1 else _transposed(packed)
    return lines.view(torch.uint8)


def _transposed(matrix: Tensor) -> Tensor:
    """Return a transposed copy.

    `.T.contiguous()` does not copy a matrix of one row or column: torch treats it as contiguous, but with strides that
    can't be viewed as another dtype.
    """
    import torch

    return matrix.T.clone(memory_format=torch.contiguous_format)


def _split_stream(streams: Tensor, packing: Packing) -> Tensor:
    """Split bytes [lines, bytes] into fields, uint8 [lines, codes].

    A field lies in one byte or straddles two; then its low bits are the highest bits of the first byte.
    """
    import torch

    size, count = run_size(packing)
    if count == 1:
        return streams
    padded = torch.nn.functional.pad(streams, (0, -streams.shape[1] % size))
    runs = padded.reshape(padded.shape[0], padded.shape[1] // size, size)
    fields = torch.empty((*runs.shape[:2], count), dtype=torch.uint8, device=streams.device)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        torch.bitwise_right_shift(runs[..., byte], shift, out=fields[..., i])
        if shift + packing.bits > 8:
            fields[..., i] |= runs[..., byte + 1] << (8 - shift)
    fields &= (1 << packing.bits) - 1
    return fields.flatten(1)


def _join_stream(lines: Tensor, packing: Packing) -> Tensor:
    """Join fields [lines, codes] into bytes, with the last run padded by zero bits: the inverse of `_split_stream`."""
    import torch

    size, count = run_size(packing)
    if count == 1:
        return lines
    padded = torch.nn.functional.pad(lines, (0, -lines.shape[1] % count))
    runs = padded.reshape(padded.shape[0], padded.shape[1] // count, count)
    streams = torch.zeros((*runs.shape[:2], size), dtype=torch.uint8, device=lines.device)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        streams[..., byte] |= runs[..., i] << shift
        if shift + packing.bits > 8:
            streams[..., byte + 1] |= runs[..., i] >> (8 - shift)
    return streams.flatten(1)


def run_size(packing: Packing) -> tuple[int, int]:
    """Return the number of bytes and of codes in a run, a unit of the stored bytes that holds whole codes only.

    A run is one byte when `bits` divides 8, else eight codes of a dense stream, else one element of the container.
    """
    if 8 % packing.bits == 0:
        return 1, 8 // packing.bits
    if packing.dense:
        return packing.bits, 8
    return packing.container.itemsize, packing.container.bits // packing.bits


def _signed(fields: Tensor, packing: Packing) -> Tensor:
    """Convert fields of `packing.bits` bits to signed int8 codes."""
    import torch

    half = 1 << (packing.bits - 1)
    # The top bit of two's complement counts as -half; flipping it gives offset binary, code + half.
    offset = fields if packing.offset_binary else fields ^ half
    # The subtraction wraps around in uint8; read as int8, the result is the signed code.
    return (offset - half).view(torch.int8)

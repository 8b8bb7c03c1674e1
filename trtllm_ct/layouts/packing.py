"""Integer codes and the containers that they lie in: unpack, pack and repack.

A `Packing` says how codes lie; these functions move them. Codes stay integers throughout, and no input is changed.
Axis letters: `O` out (rows, N), `I` in (columns, K), `P` packed.
Sources: compressed-tensors 0.20 `compressors/pack_quantized/helpers.py` for the int32 containers; ModelOpt 0.47
`export/quant_utils.py` and TensorRT-LLM `_torch/modules/linear.py` for the row pairs of the engine.
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
    "run_of",
    "unpack_codes",
    "unpack_fields",
]

INT4_ROW_PAIRS = Packing(bits=4, container=DType.U8, axis=0, offset_binary=False)
"""The engine's int4: byte (i, k) holds row 2i in its low and row 2i+1 in its high nibble, two's complement."""

INT8_PLAIN = Packing(bits=8, container=DType.I8, axis=1, offset_binary=False)
"""One signed byte a code, as the engine's W8A16 and the `int-quantized` format have it."""

_TILE_BYTES = 1 << 20  # temporaries of one tile stay in the cache, and memory flat in the size of the weight


def packed_words(bits: int, axis: int = 1, *, dense: bool = True) -> Packing:
    """How `pack-quantized` stores codes: offset binary in int32; weights along axis 1, zero points along axis 0.

    Widths of 3, 5, 6 and 7 bits are one dense stream since 0.18.0; earlier releases left the highest bits of a word
    free.
    """
    return Packing(bits=bits, container=DType.I32, axis=1 if axis else 0, offset_binary=True, dense=dense)


def unpack_codes(packed_OP: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """The signed codes in a container.

    Takes a container of `packing.packed_shape(shape)`, or with surplus elements along either axis.
    Gives int8 of `shape`, each code in [-2^(bits-1), 2^(bits-1) - 1].
    """
    return _signed(unpack_fields(packed_OP, packing, shape), packing)


def unpack_fields(packed_OP: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """The bits of each code as they are stored: uint8 of `shape`, in [0, 2^bits - 1]."""
    streams = _byte_streams(packed_OP, packing)
    fields = _split_stream(streams, packing)
    if packing.axis == 0:
        fields = fields.T
    return fields[: shape[0], : shape[1]].contiguous()


def pack_codes(codes_OI: Tensor, packing: Packing) -> Tensor:
    """The inverse of `unpack_codes`: signed int8 codes into a container, the last element filled up with zero bits.

    Gives a contiguous tensor of `packing.packed_shape(codes.shape)` and the container's dtype.
    """
    import torch

    half = 1 << (packing.bits - 1)
    unsigned = codes_OI.view(torch.uint8) + half if packing.offset_binary else codes_OI.view(torch.uint8)
    return pack_fields(unsigned & ((1 << packing.bits) - 1), packing)


def pack_fields(fields_OI: Tensor, packing: Packing) -> Tensor:
    """The inverse of `unpack_fields`: uint8 fields of `packing.bits` bits into a container."""
    import torch

    lines = fields_OI if packing.axis == 1 else fields_OI.T
    width = packing.elements(lines.shape[1]) * packing.container.itemsize
    streams = _join_stream(lines, packing)
    whole = torch.zeros((lines.shape[0], width), dtype=torch.uint8, device=lines.device)
    used = min(width, streams.shape[1])
    whole[:, :used] = streams[:, :used]
    packed = whole.view(packing.container.torch_dtype)
    return packed if packing.axis == 1 else _transposed(packed)


def repack(packed: Tensor, source: Packing, target: Packing, shape: tuple[int, int]) -> Tensor:
    """Move codes of `shape` from one container to another, bit for bit.

    Equal packings give the very tensor that was put in: nothing is read or copied.
    The two pairs that common checkpoints need have a direct path; any other goes through int8 codes.
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
    """[N, K/8] int32 words along K, offset binary -> [N/2, K] byte pairs along N, two's complement.

    In memory a word is four bytes of two columns each. For a pair of rows (even, odd) and a byte of two columns,
    the two low nibbles make the byte of the first column and the two high nibbles that of the second. Offset binary
    and two's complement differ in the top bit of each nibble only, hence the 0x88.
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
    """The container as bytes [lines, bytes], one line for each row or column that codes run along.

    Relies on the little-endian order that safetensors prescribes and that this package's machines have.
    """
    import torch

    lines = packed.contiguous() if packing.axis == 1 else _transposed(packed)
    return lines.view(torch.uint8)


def _transposed(matrix: Tensor) -> Tensor:
    """A transposed copy.

    `.T.contiguous()` would leave a matrix of one row or column as it is: it counts as contiguous, with strides that no
    view to another dtype accepts.
    """
    import torch

    return matrix.T.clone(memory_format=torch.contiguous_format)


def _split_stream(streams: Tensor, packing: Packing) -> Tensor:
    """Bytes -> fields [lines, codes].

    A field stands in one byte, or in two neighbours: then the low bits are on top of the first one.
    """
    import torch

    size, count = run_of(packing)
    if count == 1:
        return streams
    whole = torch.nn.functional.pad(streams, (0, -streams.shape[1] % size))
    runs = whole.reshape(whole.shape[0], whole.shape[1] // size, size)
    fields = torch.empty((*runs.shape[:2], count), dtype=torch.uint8, device=streams.device)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        torch.bitwise_right_shift(runs[..., byte], shift, out=fields[..., i])
        if shift + packing.bits > 8:
            fields[..., i] |= runs[..., byte + 1] << (8 - shift)
    fields &= (1 << packing.bits) - 1
    return fields.flatten(1)


def _join_stream(lines: Tensor, packing: Packing) -> Tensor:
    """The inverse of `_split_stream`, the last run filled up with zero bits."""
    import torch

    size, count = run_of(packing)
    if count == 1:
        return lines
    whole = torch.nn.functional.pad(lines, (0, -lines.shape[1] % count))
    runs = whole.reshape(whole.shape[0], whole.shape[1] // count, count)
    joined = torch.zeros((*runs.shape[:2], size), dtype=torch.uint8, device=lines.device)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        joined[..., byte] |= runs[..., i] << shift
        if shift + packing.bits > 8:
            joined[..., byte + 1] |= runs[..., i] >> (8 - shift)
    return joined.flatten(1)


def run_of(packing: Packing) -> tuple[int, int]:
    """Bytes and codes of a run that begins and ends with a whole code: a byte, eight dense codes, or an element."""
    if 8 % packing.bits == 0:
        return 1, 8 // packing.bits
    if packing.dense:
        return packing.bits, 8
    return packing.container.itemsize, packing.container.bits // packing.bits


def _signed(unsigned: Tensor, packing: Packing) -> Tensor:
    """Unsigned fields of `packing.bits` bits as signed int8 codes."""
    import torch

    half = 1 << (packing.bits - 1)
    # In two's complement the top bit weighs -half; flipping it turns both kinds into code + half.
    offset = unsigned if packing.offset_binary else unsigned ^ half
    # Subtraction wraps in uint8, and the wrapped byte is the signed code.
    return (offset - half).view(torch.int8)

"""Integer codes and the containers that they lie in: unpack, pack and repack.

A `Packing` says how codes lie; these functions move them. Codes stay integers throughout, and no input is changed.
Axis letters: `O` out (rows, N), `I` in (columns, K), `P` packed.
Sources: compressed-tensors 0.20 `compressors/pack_quantized/helpers.py` for the int32 containers; ModelOpt 0.47
`export/quant_utils.py` and TensorRT-LLM `_torch/modules/linear.py` for the row pairs of the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.dtypes import DType
from trtllm_ct.schemes import Packing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INT4_ROW_PAIRS", "INT8_PLAIN", "pack_codes", "packed_words", "repack", "unpack_codes"]

INT4_ROW_PAIRS = Packing(bits=4, container=DType.U8, axis=0, offset_binary=False)
"""The engine's int4: byte (i, k) holds row 2i in its low and row 2i+1 in its high nibble, two's complement."""

INT8_PLAIN = Packing(bits=8, container=DType.I8, axis=1, offset_binary=False)
"""One signed byte a code, as the engine's W8A16 and the `int-quantized` format have it."""

_TILE_BYTES = 1 << 20  # temporaries of one tile stay in the cache, and memory flat in the size of the weight


def packed_words(bits: int, axis: int = 1) -> Packing:
    """How `pack-quantized` stores codes: offset binary in int32; weights along axis 1, zero points along axis 0."""
    return Packing(bits=bits, container=DType.I32, axis=1 if axis else 0, offset_binary=True)


def unpack_codes(packed_OP: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """The signed codes in a container.

    Takes a contiguous container of `packing.packed_shape(shape)`, or with surplus elements along either axis.
    Gives int8 of `shape`, each code in [-2^(bits-1), 2^(bits-1) - 1].
    """
    import torch

    bits, mask = packing.bits, (1 << packing.bits) - 1
    fields = _bytes_along_axis(packed_OP, packing)
    parts = [(fields >> (bits * i)) & mask for i in range(8 // bits)] if bits < 8 else [fields]
    rows, columns = fields.shape
    if packing.axis == 1:
        unsigned = torch.stack(parts, dim=2).reshape(rows, columns * len(parts))
    else:
        unsigned = torch.stack(parts, dim=1).reshape(rows * len(parts), columns)
    unsigned = unsigned[: shape[0], : shape[1]].contiguous()
    return _signed(unsigned, packing)


def pack_codes(codes_OI: Tensor, packing: Packing) -> Tensor:
    """The inverse of `unpack_codes`: signed int8 codes into a container; the last element is filled up with zero bits.

    Gives a contiguous tensor of `packing.packed_shape(codes.shape)` and the container's dtype.
    """
    import torch

    bits, axis = packing.bits, packing.axis
    half = 1 << (bits - 1)
    unsigned = (codes_OI.view(torch.uint8) + half if packing.offset_binary else codes_OI.view(torch.uint8)) & (
        (1 << bits) - 1
    )
    surplus = -codes_OI.shape[axis] % packing.per_element
    if surplus:
        unsigned = torch.nn.functional.pad(unsigned, (0, surplus, 0, 0) if axis == 1 else (0, 0, 0, surplus))
    per_byte = 8 // bits
    rows, columns = unsigned.shape
    parts = unsigned.view(rows, -1, per_byte).unbind(2) if axis == 1 else unsigned.view(-1, per_byte, columns).unbind(1)
    fields = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        fields |= part << (bits * i)
    return _container_of_bytes(fields, packing)


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


def _bytes_along_axis(packed: Tensor, packing: Packing) -> Tensor:
    """The container as bytes, lined up so that neighbours along the packed axis hold neighbouring codes.

    Relies on the little-endian order that safetensors prescribes and that this package's machines have.
    """
    import torch

    as_bytes = packed.contiguous().view(torch.uint8)
    if packing.axis == 1 or packing.container.itemsize == 1:
        return as_bytes
    rows, columns = packed.shape
    return as_bytes.view(rows, columns, packing.container.itemsize).transpose(1, 2).reshape(-1, columns)


def _container_of_bytes(fields: Tensor, packing: Packing) -> Tensor:
    """The inverse of `_bytes_along_axis`."""
    itemsize = packing.container.itemsize
    if packing.axis == 0 and itemsize > 1:
        rows, columns = fields.shape
        fields = fields.view(rows // itemsize, itemsize, columns).transpose(1, 2).reshape(rows // itemsize, -1)
    return fields.contiguous().view(packing.container.torch_dtype)


def _signed(unsigned: Tensor, packing: Packing) -> Tensor:
    """Unsigned fields of `packing.bits` bits as signed int8 codes."""
    import torch

    half = 1 << (packing.bits - 1)
    # In two's complement the top bit weighs -half; flipping it turns both kinds into code + half.
    offset = unsigned if packing.offset_binary else unsigned ^ half
    # Subtraction wraps in uint8, and the wrapped byte is the signed code.
    return (offset - half).view(torch.int8)

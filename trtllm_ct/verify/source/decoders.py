"""One decoder for each format: the table `DECODERS`. Names and dtypes of the tensors decide which one is used.

| format                 | codes                          | value                                             |
|------------------------|--------------------------------|---------------------------------------------------|
| `pack-quantized`       | `weight_packed` int32          | (code - 2^(b-1) - zero point) * scale             |
| `int-quantized`        | `weight` int8                  | (code - zero point) * scale                       |
| `float-quantized`      | `weight` float8                | code * scale                                      |
| `nvfp4-pack-quantized` | `weight_packed` uint8, E2M1    | code * E4M3 scale of 16 columns / global scale    |
| `mxfp4-pack-quantized` | `weight_packed` uint8, E2M1    | code * 2^(e - 127) of 32 columns                  |
| `mxfp6-pack-quantized` | `weight_packed` uint8, E2M3    | code * 2^(e - 127) of 32 columns                  |
| `mxfp8-quantized`      | `weight` float8                | code * 2^(e - 127) of 32 columns                  |
| `marlin-24`            | `weight_packed`, `meta`        | see marlin_24.py                                  |

Source: compressed-tensors 0.20 `compressors/*/base.py` and `helpers.py`; 0.10 for zero points with surplus columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import NumberType
from trtllm_ct.verify.source import marlin_24
from trtllm_ct.verify.source.files import SourceTensor
from trtllm_ct.verify.source.numbers import (
    E2M1_IN_E4M3,
    E2M3_IN_E4M3,
    E4M3,
    look_up,
    nibble_values,
    nibbles,
    to_numbers,
    unpack,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtllm_ct.verify.source.coded import Coded
    from trtllm_ct.verify.source.weights import Weight

__all__ = ["DECODERS", "Decoder", "decoder_for", "has_weight", "is_quantized", "plain_tensors"]

Tensors = Mapping[str, SourceTensor]
_Read = Callable[["Weight", int, int], "Coded"]

_WORD_BITS = 32
_DENSE_SINCE = (0, 18)
_EXPONENTS = frozenset({DType.U8, DType.F8_E8M0})
_FLOAT8 = frozenset({DType.F8_E4M3, DType.U8})
_BYTES_PER_SCALE = {"nvfp4": 8, "mxfp4": 16, "mxfp6": 24}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """How one format is read.

    `accepts` says whether the tensors of a module are of this format. `shape` returns (N, K) of the stored weight, and
    `read` returns rows of it as codes and scales. `codes` is the name of the codes, and `companions` are those of the
    other tensors that only this format has. `number` is the type of the codes, and their bits if they have always the
    same. Rows are decoded `block` at a time.
    """

    accepts: Callable[[Tensors], bool]
    shape: Callable[[Weight], tuple[int, int]]
    read: _Read
    number: tuple[NumberType, int | None]
    codes: str = "weight_packed"
    companions: frozenset[str] = frozenset()
    block: int = 1


def decoder_for(tensors: Tensors) -> str | None:
    """Return the name of the format that a quantized module is stored in; None if no decoder accepts it."""
    return next((name for name, decoder in DECODERS.items() if decoder.accepts(tensors)), None)


def is_quantized(tensors: Tensors) -> bool:
    """Whether the weight of a module is stored as codes: packed, or with a dtype that no plain weight has."""
    weight = tensors.get("weight")
    return not _CODES.isdisjoint(tensors) or (weight is not None and not weight.dtype.is_wide_float)


def has_weight(tensors: Tensors) -> bool:
    """Whether a module has a weight, plain or as codes."""
    return "weight" in tensors or not _CODES.isdisjoint(tensors)


def plain_tensors(tensors: Tensors) -> tuple[str, ...]:
    """Return the local names of a module's tensors beside the weight that no quantization has written."""
    return tuple(local for local in tensors if local != "weight" and local not in _QUANTIZATION)


def _has(tensors: Tensors, local: str, dtypes: frozenset[DType]) -> bool:
    return local in tensors and tensors[local].dtype in dtypes


def _is_packed_int(tensors: Tensors) -> bool:
    return _has(tensors, "weight_packed", frozenset({DType.I32})) and "scale_packed" not in tensors


def _is_float8(tensors: Tensors) -> bool:
    return _has(tensors, "weight", frozenset({DType.F8_E4M3}))


def _is_small_float(kind: str, dtypes: frozenset[DType]) -> Callable[[Tensors], bool]:
    """Return whether bytes of codes have as many scales as this kind has, of one of these dtypes."""

    def accepts(tensors: Tensors) -> bool:
        if not _has(tensors, "weight_packed", frozenset({DType.U8})) or not _has(tensors, "weight_scale", dtypes):
            return False
        return tensors["weight_packed"].shape[-1] == _BYTES_PER_SCALE[kind] * tensors["weight_scale"].shape[-1]

    return accepts


def _shape_of(local: str) -> Callable[[Weight], tuple[int, int]]:
    """Return the function that returns the shape of the weight, which is that of its codes `local`."""

    def shape(weight: Weight) -> tuple[int, int]:
        rows, columns = weight.tensor(local).shape
        return rows, columns

    return shape


def _packed_int_shape(weight: Weight) -> tuple[int, int]:
    """Return the shape: the columns are stored, or follow from the words, or from the groups for odd widths."""
    rows, words = weight.tensor("weight_packed").shape
    if "weight_shape" in weight.module.tensors:
        return rows, int(weight.tensor("weight_shape").whole().flatten()[-1])
    bits = weight.args.num_bits
    if _WORD_BITS % bits == 0:
        return rows, words * _WORD_BITS // bits
    return rows, weight.tensor("weight_scale").size // rows * (weight.args.group_size or 1)


def _bytes_shape(codes_per_byte: float) -> Callable[[Weight], tuple[int, int]]:
    """Return the function that returns the shape of a weight whose codes are packed in bytes along the columns."""

    def shape(weight: Weight) -> tuple[int, int]:
        rows, columns = weight.tensor("weight_packed").shape
        return rows, int(columns * codes_per_byte)

    return shape


def _packed_int(weight: Weight, begin: int, end: int) -> Coded:
    bits, columns = weight.args.num_bits, weight.shape[1]
    words = weight.rows("weight_packed", begin, end)
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits in {4, 8}:
        unsigned = (nibbles(packed) if bits == 4 else packed)[:, :columns]
    else:
        unsigned = unpack(packed, bits, columns, dense=_is_dense(weight, words.shape[1]))
    # Wraps around for 8 bits: 128 to 255 become 0 to 127, and 0 to 127 become -128 to -1.
    return weight.coded((unsigned - np.uint8(1 << (bits - 1))).view(np.int8), begin, end)


def _is_dense(weight: Weight, words: int) -> bool:
    """Whether codes are one stream of bits: by the number of words, and by the release where both need as many."""
    bits, columns = weight.args.num_bits, weight.shape[1]
    dense, padded = -(-columns * bits // _WORD_BITS), -(-columns // (_WORD_BITS // bits))
    if dense == padded:
        return not weight.release or weight.release >= _DENSE_SINCE
    return words == dense


def _plain_int(weight: Weight, begin: int, end: int) -> Coded:
    return weight.coded(weight.rows("weight", begin, end), begin, end)


def _float8(weight: Weight, begin: int, end: int) -> Coded:
    """Read float8 codes; stored zero points of float codes mean nothing, and `verify` demands that they are 0."""
    return weight.coded(weight.rows("weight", begin, end), begin, end, zero_point="")


def _exponents(weight: Weight, begin: int, end: int) -> NDArray[np.float64]:
    """Return the scales [n, G] that are stored as exponents."""
    return to_numbers(weight.rows("weight_scale", begin, end), DType.F8_E8M0)


def _mxfp8(weight: Weight, begin: int, end: int) -> Coded:
    codes = weight.rows("weight", begin, end)
    return weight.coded(codes, begin, end, scale=_exponents(weight, begin, end), zero_point="")


def _mxfp4(weight: Weight, begin: int, end: int) -> Coded:
    codes = nibble_values(weight.rows("weight_packed", begin, end), E2M1_IN_E4M3)
    return weight.coded(codes, begin, end, scale=_exponents(weight, begin, end), zero_point="")


def _mxfp6(weight: Weight, begin: int, end: int) -> Coded:
    packed = weight.rows("weight_packed", begin, end)
    codes = E2M3_IN_E4M3[unpack(packed, 6, packed.shape[1] * 8 // 6)]
    return weight.coded(codes, begin, end, scale=_exponents(weight, begin, end), zero_point="")


def _nvfp4(weight: Weight, begin: int, end: int) -> Coded:
    """Read codes with two scales, of which the global one divides; a global scale of 0 means a weight of 0."""
    codes = nibble_values(weight.rows("weight_packed", begin, end), E2M1_IN_E4M3)
    scale = look_up(weight.rows("weight_scale", begin, end).view(np.uint8), E4M3)
    divisor = weight.scalar("weight_global_scale")
    return weight.coded(codes, begin, end, scale=scale, zero_point="", divisor=divisor)


DECODERS: Mapping[str, Decoder] = {
    "pack-quantized": Decoder(
        accepts=_is_packed_int, shape=_packed_int_shape, read=_packed_int, number=(NumberType.INT, None)
    ),
    "marlin-24": Decoder(
        accepts=lambda tensors: "scale_packed" in tensors and "weight_packed" in tensors,
        shape=marlin_24.shape,
        read=marlin_24.read,
        number=(NumberType.INT, None),
        companions=frozenset({"scale_packed", "meta"}),
        block=marlin_24.BLOCK,
    ),
    "int-quantized": Decoder(
        accepts=lambda tensors: _has(tensors, "weight", frozenset({DType.I8})),
        shape=_shape_of("weight"),
        read=_plain_int,
        number=(NumberType.INT, None),
        codes="weight",
    ),
    "mxfp8-quantized": Decoder(
        accepts=lambda tensors: _is_float8(tensors) and _has(tensors, "weight_scale", _EXPONENTS),
        shape=_shape_of("weight"),
        read=_mxfp8,
        number=(NumberType.FLOAT, 8),
        codes="weight",
    ),
    "float-quantized": Decoder(
        accepts=lambda tensors: _is_float8(tensors) and not _has(tensors, "weight_scale", _EXPONENTS),
        shape=_shape_of("weight"),
        read=_float8,
        number=(NumberType.FLOAT, 8),
        codes="weight",
    ),
    "nvfp4-pack-quantized": Decoder(
        accepts=_is_small_float("nvfp4", _FLOAT8),
        shape=_bytes_shape(2),
        read=_nvfp4,
        number=(NumberType.FLOAT, 4),
    ),
    "mxfp4-pack-quantized": Decoder(
        accepts=_is_small_float("mxfp4", _EXPONENTS),
        shape=_bytes_shape(2),
        read=_mxfp4,
        number=(NumberType.FLOAT, 4),
    ),
    "mxfp6-pack-quantized": Decoder(
        accepts=_is_small_float("mxfp6", _EXPONENTS),
        shape=_bytes_shape(8 / 6),
        read=_mxfp6,
        number=(NumberType.FLOAT, 6),
    ),
}
"""The decoders by the name of their format. No two accept the same tensors."""

_CODES = frozenset(decoder.codes for decoder in DECODERS.values()) - {"weight"}
_QUANTIZATION = (
    _CODES
    | frozenset().union(*(decoder.companions for decoder in DECODERS.values()))
    | {f"weight_{name}" for name in ("scale", "zero_point", "shape", "g_idx", "global_scale")}
    | {f"{what}_{name}" for what in ("input", "output", "q", "k", "v") for name in ("scale", "zero_point")}
    | {"input_global_scale", "kv_scale"}
)

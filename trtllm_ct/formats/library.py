"""The compressed-tensors library: what each of its releases decodes rightly, and how it is called.

The library has had two interfaces. Up to 0.14 a decompressor is an instance whose `decompress_weight` takes the tensors
and the arguments of one weight, and its modules are below `compressors.quantized_compressors`. Since 0.15 `decompress`
is a class method that takes the tensors and a scheme, and each format has a folder of its own.
`LINES` is the result of an experiment: every format, width, strategy and zero point was decoded with 0.9.0, 0.9.3,
0.9.4, 0.10.2, 0.11.0, 0.12.2, 0.13.0, 0.14.0, 0.15.0, 0.16.0, 0.17.0, 0.18.0, 0.19.0 and 0.20.0, and compared.
The library is imported when a function is called, because the import takes seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.schemes import Element, NumberType, Strategy
from trtllm_ct.layouts.torch_tensors import array_of, tensor_of, tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.layouts.stored_array import StoredArray

__all__ = ["LINES", "LibraryLine", "decompress", "installed_line", "unpack_integers", "unpack_small_floats"]

_PACKED = "pack-quantized"
_PLAIN = frozenset({_PACKED, "int-quantized", "float-quantized"})
_NVFP4 = frozenset({"nvfp4-pack-quantized"})
_MXFP4 = frozenset({"mxfp4-pack-quantized"})
_MXFP6 = frozenset({"mxfp6-pack-quantized"})
_MXFP8 = frozenset({"mxfp8-quantized"})
_FP6 = ("mxfp6.helpers", "unpack_fp6_from_uint8")
_WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryLine:
    """One line of releases of compressed-tensors, from `since` to the next line.

    `formats` are those whose weights it decodes. `zero_points`: packed ones are unpacked when a weight is decompressed;
    before, groups and channels with them are refused, or their packed form is subtracted. `straddling`: codes of 3, 5,
    6 and 7 bits that continue in the next word are read; before, words are taken to be padded. `blocks`: blocks at the
    ragged edge of a weight and a single column of blocks are read; before, they get wrong scales or are refused.
    `schemes`: weights are decompressed by `decompress(tensors, scheme)`. `fp4_module` unpacks FP4 codes.
    """

    since: tuple[int, int]
    formats: frozenset[str]
    zero_points: bool = True
    straddling: bool = True
    blocks: bool = True
    schemes: bool = True
    fp4_module: str = "nvfp4.helpers"

    def reads(self, weight: StoredWeight) -> bool:
        """Whether these releases decode the weight, and rightly."""
        args = weight.args
        return (
            weight.format.name in self.formats
            and (self.zero_points or not _has_packed_zero_points(weight))
            and (self.straddling or args.type is not NumberType.INT or _WORD_BITS % args.num_bits == 0)
            and (self.blocks or args.strategy is not Strategy.BLOCK)
        )


# 0.13.0 alone multiplies NVFP4 scales by float8 values, which torch refuses. 0.13 to 0.15 have a class for MXFP4 that
# raises NotImplementedError.
LINES = (
    LibraryLine(since=(0, 9), formats=_PLAIN, zero_points=False, straddling=False, blocks=False, schemes=False),
    LibraryLine(
        since=(0, 10),
        formats=_PLAIN | _NVFP4,
        zero_points=False,
        straddling=False,
        blocks=False,
        schemes=False,
        fp4_module="quantized_compressors.nvfp4_quantized",
    ),
    LibraryLine(since=(0, 13), formats=_PLAIN, straddling=False, blocks=False, schemes=False),
    LibraryLine(
        since=(0, 14),
        formats=_PLAIN | _NVFP4,
        straddling=False,
        blocks=False,
        schemes=False,
        fp4_module="quantized_compressors.fp4_quantized",
    ),
    LibraryLine(since=(0, 15), formats=_PLAIN | _NVFP4 | _MXFP8, straddling=False, blocks=False),
    LibraryLine(since=(0, 16), formats=_PLAIN | _NVFP4 | _MXFP8 | _MXFP4, straddling=False, blocks=False),
    LibraryLine(since=(0, 18), formats=_PLAIN | _NVFP4 | _MXFP8 | _MXFP4, blocks=False),
    LibraryLine(since=(0, 19), formats=_PLAIN | _NVFP4 | _MXFP8 | _MXFP4),
    LibraryLine(since=(0, 20), formats=_PLAIN | _NVFP4 | _MXFP8 | _MXFP4 | _MXFP6),
)
"""The lines of releases, oldest first; a newer release than the last line's is taken to be of that line."""


@cache
def installed_line() -> LibraryLine:
    """Return the line of the installed compressed-tensors; the first one for releases that are older still."""
    from importlib import metadata  # which imports email: see `base/packages.py`

    numbers = re.findall(r"\d+", metadata.version("compressed-tensors"))
    release = int(numbers[0]), int(numbers[1])
    return next((line for line in reversed(LINES) if line.since <= release), LINES[0])


def unpack_integers(packed: StoredArray, bits: int, shape: tuple[int, int], *, along_rows: bool = False) -> StoredArray:
    """Return int8 codes [N, K] that the library unpacks from int32 words; `along_rows` for packed zero points."""
    import torch

    place = "pack_quantized.helpers" if installed_line().schemes else "quantized_compressors.pack_quantized"
    unpack = import_module(f"compressed_tensors.compressors.{place}").unpack_from_int32
    # The first releases of 0.9 unpack along rows only, and do not know the argument.
    axis = {"packed_dim": 0} if along_rows else {}
    return array_of(unpack(tensor_of(packed), bits, torch.Size(shape), **axis))


def unpack_small_floats(packed: StoredArray, element: Element, shape: tuple[int, int]) -> StoredArray:
    """Return the float values [N, K] that the library unpacks from uint8, for a format that its line reads."""
    six_bits = element is Element.E2M3
    place, name = _FP6 if six_bits else (installed_line().fp4_module, "unpack_fp4_from_uint8")
    unpack = getattr(import_module(f"compressed_tensors.compressors.{place}"), name)
    return array_of(unpack(tensor_of(packed), *shape))


def decompress(weight: StoredWeight, arrays: Mapping[str, StoredArray], dtype: DType) -> StoredArray:
    """Return the weight [N, K] of `dtype` as the library decompresses it from arrays that its own writer stores."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    name, fields, tensors = weight.format.name, _fields(weight), tensors_of(arrays)
    if not installed_line().schemes:
        old: Tensor = BaseCompressor.load_from_registry(name).decompress_weight(
            tensors, quantization_args=QuantizationArgs(**fields)
        )
        return array_of(old.to(dtype.torch_dtype))
    args = QuantizationArgs(**fields, scale_dtype=weight.args.scale_dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    plain: Tensor = BaseCompressor.get_value_from_registry(name).decompress(tensors, scheme)["weight"]
    return array_of(plain.to(dtype.torch_dtype))


def _fields(weight: StoredWeight) -> dict[str, Any]:
    """Return the arguments of the weight that all releases know; old ones take no lists of blocks, and need none."""
    args = weight.args
    fields = {
        "num_bits": args.num_bits,
        "type": str(args.type),
        "symmetric": not weight.has_zero_point,
        "strategy": str(args.strategy),
        "group_size": args.group_size,
    }
    return fields | ({"block_structure": args.block_structure} if args.strategy is Strategy.BLOCK else {})


def _has_packed_zero_points(weight: StoredWeight) -> bool:
    """Whether the library's writer packs the zero points of the weight; those of a whole tensor it stores plain."""
    return weight.has_zero_point and weight.format.name == _PACKED and weight.args.strategy is not Strategy.TENSOR

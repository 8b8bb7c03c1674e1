"""`pack-quantized`: integer codes of b bits (1 to 8), packed along K in int32 words.

| local name          | dtype                  | shape                                                                |
|---------------------|------------------------|----------------------------------------------------------------------|
| `weight_packed`     | int32                  | [N, ceil(K * b / 32)] dense, [N, ceil(K / (32 // b))] padded         |
| `weight_scale`      | bf16, f16, f32         | [N, ceil(K / g)], [N, 1] or one element                              |
| `weight_shape`      | int64 (int32)          | [2]: the numbers N, K                                                |
| `weight_zero_point` | int32; int8, bf16, ... | [ceil(N * b / 32), G] packed along N, or plain in the scale's shape  |
| `weight_g_idx`      | int32                  | [K]: the group of each column                                        |

b is the number of bits, g the group size and G = ceil(K / g). A code is stored as code + 2^(b-1).

For 3, 5, 6 and 7 bits there are two layouts under the same names. Up to 0.17.1 words are padded: each holds 32 // b
whole codes. Since 0.18 the codes are one dense bit stream, in which a code may straddle two words. A packed zero point
has the same layout as its weight.

A zero point is applied whenever the tensor exists, whatever `symmetric` says. Writers up to 0.9.3 store it as plain
int8, and omit it if it is all zeros. For strategy tensor every release stores it plain.
Source: compressed-tensors 0.20 and 0.17.1 `compressors/pack_quantized/{base,helpers}.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, NumberType, Packing, QuantArgs, Strategy
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat, scale_shape
from trtllm_ct.formats.companions import (
    check_codes,
    check_plain_zero_point,
    check_scale,
    check_shape,
    plain_zero_point,
    scale_name,
)
from trtllm_ct.formats.group_index import GROUP_INDEX, check_group_index, group_of_columns
from trtllm_ct.layouts.packing import pack_codes, packed_words
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = ["PACKED_INT"]

_FIRST_DENSE = (0, 18)
_STRATEGIES_WITH_PACKED_ZERO_POINTS = frozenset({Strategy.GROUP, Strategy.CHANNEL})


class _PackedInt(WeightFormat):
    name = "pack-quantized"
    declared_as = frozenset({CompressionFormat.PACK_QUANTIZED})
    codes = "weight_packed"
    axes: Mapping[str, Axis] = {
        "weight_packed": Axis.ROWS,
        "weight_scale": Axis.SCALE_ROWS,
        "weight_scale_inv": Axis.SCALE_ROWS,
        "weight_shape": Axis.SHAPE,
        "weight_zero_point": Axis.SCALE_ROWS,
        GROUP_INDEX: Axis.COLUMNS,
    }

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Accept integer arguments with int32 words in `weight_packed`, unless a `scale_packed` shows marlin-24."""
        packed = stored.get("weight_packed")
        is_words = packed is not None and packed.dtype is DType.I32
        return args.type is NumberType.INT and is_words and "scale_packed" not in stored

    def describe(
        self,
        module: str,
        args: QuantArgs,
        stored: StoredSpecs,
        expected_shape: tuple[int, int] | None,
        faults: FaultCollector,
        version: Version = (),
    ) -> StoredWeight | None:
        """Return the weight that the tensors in the table above make up.

        The number of words does not determine K exactly; `expected_shape` or the number of groups does.
        """
        if not check_codes(module, "weight_packed", stored["weight_packed"], DType.I32, faults):
            return None
        packing = _packing(args, stored, expected_shape, version)
        shape = stored["weight_packed"].shape[0], _columns(args, stored, expected_shape, packing)
        check_shape(module, shape, expected_shape, faults)
        check_scale(module, args, stored, shape, faults)
        scale = scale_name(stored)
        names = ("weight_packed", scale, "weight_shape", "weight_zero_point", GROUP_INDEX)
        return StoredWeight(
            format=self,
            args=args,
            shape=shape,
            codes="weight_packed",
            packing=packing,
            scale=scale,
            zero_point=self.zero_point if self.zero_point in stored else None,
            zero_point_packing=_zero_point_packing(module, args, stored, shape, packing, faults),
            group_index=check_group_index(module, args, stored, shape, faults),
            axes={name: self.axes[name] for name in names if name in stored},
        )

    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return the codes and packed zero points still packed; plain zero points become int8 (rows, groups)."""
        zero_point = stored[weight.zero_point] if weight.zero_point else None
        if zero_point is not None and weight.zero_point_packing is None:
            zero_point = plain_zero_point(weight, zero_point)
        return Codes(
            values=stored[weight.codes],
            packing=weight.packing,
            shape=weight.shape,
            scale=stored[weight.scale].reshape(*weight.scale_shape),
            zero_point=zero_point,
            zero_point_packing=weight.zero_point_packing,
            group_index=group_of_columns(weight, stored),
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, StoredArray]:
        """Return the tensors by local name, as the library has written them since 0.18; `codes` may have any packing.

        A group index is included if `codes` have one, although the library stopped writing it after 0.18.
        """
        import numpy as np

        tensors = {
            "weight_packed": codes.repacked(packed_words(args.num_bits)),
            "weight_scale": codes.scale,
            "weight_shape": StoredArray(np.array(codes.shape, np.int64), DType.I64),
        }
        zero_point = codes.plain_zero_point
        if zero_point is not None:
            stored = StoredArray(zero_point, DType.I8)
            if args.strategy in _STRATEGIES_WITH_PACKED_ZERO_POINTS:
                stored = StoredArray(pack_codes(zero_point, packed_words(args.num_bits, axis=0)), DType.I32)
            tensors["weight_zero_point"] = stored
        if codes.group_index is not None:
            tensors[GROUP_INDEX] = codes.group_index
        return tensors


PACKED_INT = _PackedInt()


def _packing(args: QuantArgs, stored: StoredSpecs, expected_shape: tuple[int, int] | None, version: Version) -> Packing:
    """Return the packing of the words: dense or padded.

    The number of words along K decides, then the number of words of the zero point along N. If both packings need the
    same numbers of words (K = 12, or 40 at 3 bits; never a multiple of 32), the writer's version decides. An unknown
    version counts as older than 0.18, because configurations name the version reliably only since 0.11.
    """
    dense, padded = (packed_words(args.num_bits, dense=dense) for dense in (True, False))
    if 32 % args.num_bits == 0:
        return dense
    packed, zero_point = stored["weight_packed"], stored.get("weight_zero_point")
    columns = _known_columns(args, stored, expected_shape)
    zero_point_words = zero_point.shape[:1] if zero_point is not None and zero_point.dtype is DType.I32 else ()

    def fit(packing: Packing) -> tuple[bool, bool]:
        rows_fit = zero_point_words in {(), (packing.elements(packed.shape[0]),)}
        return columns is None or packing.elements(columns) == packed.shape[1], rows_fit

    # If both fit equally well, max returns the first.
    return max((dense, padded) if version >= _FIRST_DENSE else (padded, dense), key=fit)


def _columns(args: QuantArgs, stored: StoredSpecs, expected_shape: tuple[int, int] | None, packing: Packing) -> int:
    """Return K: the known number of columns if it needs exactly these words, else as many columns as fit in them.

    A number of words fits a range of K, because the last word need not be full. When the tensors are loaded, the result
    is compared with the numbers in `weight_shape`.
    """
    words = stored["weight_packed"].shape[1]
    known = _known_columns(args, stored, expected_shape)
    if known is not None and packing.elements(known) == words:
        return known
    return words * 32 // packing.bits if packing.dense else words * (32 // packing.bits)


def _known_columns(args: QuantArgs, stored: StoredSpecs, expected_shape: tuple[int, int] | None) -> int | None:
    """Return K as the model gives it, else G * g, which is K if the last group is full; None if neither is known."""
    if expected_shape is not None:
        return expected_shape[1]
    scale = stored.get(scale_name(stored))
    if args.group_size is None or scale is None or not scale.shape:
        return None
    return scale.shape[-1] * args.group_size


def _zero_point_packing(
    module: str, args: QuantArgs, stored: StoredSpecs, shape: tuple[int, int], words: Packing, faults: FaultCollector
) -> Packing | None:
    """Return the packing of the zero point: that of the weight, but along the rows.

    Returns None if there is no zero point or it is plain. Adds a fault if the zero point has the wrong shape or dtype.
    Writers 0.9.4 to 0.10.2 add surplus columns if N does not fill the last word; only the first G columns are valid.
    """
    spec = stored.get("weight_zero_point")
    if spec is None:
        return None
    if spec.dtype is not DType.I32:
        check_plain_zero_point(module, args, spec, shape, faults)
        return None
    packing = replace(words, axis=0)
    rows, groups = packing.packed_shape(scale_shape(args, shape))
    if len(spec.shape) != 2 or spec.shape[0] != rows or spec.shape[1] < groups:
        faults.add(
            where=f"{module}.weight_zero_point",
            expected=f"int32 {[rows, groups]}: packed along the rows, one column a group",
            found=str(spec),
            remedy="Check group_size and num_bits in config_groups against the tool that wrote the file"
            + ("; or remove the zero points, if the scheme really is symmetric." if args.symmetric else "."),
        )
    return packing

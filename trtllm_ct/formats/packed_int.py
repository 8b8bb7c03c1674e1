"""`pack-quantized`: integer codes of b bits, 1 to 8, in int32 words along K.

| local name          | dtype                  | shape                                                                |
|---------------------|------------------------|----------------------------------------------------------------------|
| `weight_packed`     | int32                  | [N, ceil(K * b / 32)] dense, [N, ceil(K / (32 // b))] padded         |
| `weight_scale`      | bf16, f16, f32         | [N, ceil(K / g)], [N, 1] or one element                              |
| `weight_shape`      | int64 (int32)          | [2]: the numbers N, K                                                |
| `weight_zero_point` | int32; int8, bf16, ... | [ceil(N * b / 32), G] packed along the rows, or plain, as the scale  |
| `weight_g_idx`      | int32                  | [K]: the group of each column                                        |

A code is stored as code + 2^(b-1). For 3, 5, 6 and 7 bits there are two layouts under the same names: up to 0.17.1
words are padded, each holding 32 // b whole codes; since 0.18 codes are one dense stream of bits and straddle words.
A zero point follows the layout of its weight.

A zero point counts whenever the tensor exists, whatever `symmetric` says. Writers up to 0.9.3 store it as plain
int8 and leave it out when all of it is zero; for a whole tensor it is plain in every release.
Source: compressed-tensors 0.20 and 0.17.1 `compressors/pack_quantized/{base,helpers}.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, NumberType, Packing, QuantArgs, Strategy
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat, scale_shape
from trtllm_ct.formats.companions import check_codes, check_plain_zero_point, check_scale, check_shape, scale_name
from trtllm_ct.formats.group_index import GROUP_INDEX, check_group_index, group_of_columns
from trtllm_ct.layouts.loops.dispatch import repack
from trtllm_ct.layouts.packing import INT8_PLAIN, pack_codes, packed_words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["PACKED_INT"]

_FIRST_DENSE = (0, 18)
_PACKS_ZERO_POINTS = frozenset({Strategy.GROUP, Strategy.CHANNEL})


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
        """Integer arguments and int32 words, which are not those of marlin-24."""
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
        """See the table above; words don't tell K to the last column, so `expected_shape` and the groups help."""
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
            has_zero_point="weight_zero_point" in stored,
            zero_point_packing=_zero_point_packing(module, args, stored, shape, packing, faults),
            group_index=check_group_index(module, args, stored, shape, faults),
            axes={name: self.axes[name] for name in names if name in stored},
        )

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """Words stay packed, those of zero points too; plain zero points become int8 (rows, groups)."""
        import torch

        zero_point = stored["weight_zero_point"] if weight.has_zero_point else None
        if zero_point is not None and weight.zero_point_packing is None:
            zero_point = zero_point.reshape(weight.scale_shape).to(torch.int8)
        return Codes(
            values=stored[weight.codes],
            packing=weight.packing,
            shape=weight.shape,
            scale=stored[weight.scale].reshape(weight.scale_shape),
            zero_point=zero_point,
            zero_point_packing=weight.zero_point_packing,
            group_index=group_of_columns(weight, stored),
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, Tensor]:
        """What the library writes since 0.18, and the index that it wrote before; `codes` may come in any packing."""
        import torch

        words = packed_words(args.num_bits)
        tensors = {
            "weight_packed": repack(codes.values, codes.packing or INT8_PLAIN, words, codes.shape),
            "weight_scale": codes.scale,
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        zero_point = codes.plain_zero_point
        if zero_point is not None:
            packs = args.strategy in _PACKS_ZERO_POINTS
            along_rows = packed_words(args.num_bits, axis=0)
            tensors["weight_zero_point"] = pack_codes(zero_point, along_rows) if packs else zero_point
        if codes.group_index is not None:
            tensors[GROUP_INDEX] = codes.group_index
        return tensors


PACKED_INT = _PackedInt()


def _packing(args: QuantArgs, stored: StoredSpecs, expected_shape: tuple[int, int] | None, version: Version) -> Packing:
    """Which of the two layouts the words have.

    The number of words along K decides, then that of the zero point's words along N. Where both layouts ask for the
    same numbers (K = 12, or 40 at 3 bits; never a multiple of 32), the writer's version does. An unknown one counts as
    old: configurations name it reliably from 0.11 on.
    """
    dense, padded = (packed_words(args.num_bits, dense=dense) for dense in (True, False))
    if 32 % args.num_bits == 0:
        return dense
    packed, zero_point = stored["weight_packed"], stored.get("weight_zero_point")
    columns = _known_columns(args, stored, expected_shape)
    zero_words = zero_point.shape[:1] if zero_point is not None and zero_point.dtype is DType.I32 else ()

    def fit(packing: Packing) -> tuple[bool, bool]:
        rows_fit = zero_words in {(), (packing.elements(packed.shape[0]),)}
        return columns is None or packing.elements(columns) == packed.shape[1], rows_fit

    # Of equal fits the first is taken.
    return max((dense, padded) if version >= _FIRST_DENSE else (padded, dense), key=fit)


def _columns(args: QuantArgs, stored: StoredSpecs, expected_shape: tuple[int, int] | None, packing: Packing) -> int:
    """K of the codes: the number that is known from elsewhere if the words hold just that, else as many as fit them.

    W words hold any K of a whole range, the last word perhaps not full. Loading compares the result with the numbers
    in `weight_shape`.
    """
    words = stored["weight_packed"].shape[1]
    known = _known_columns(args, stored, expected_shape)
    if known is not None and packing.elements(known) == words:
        return known
    return words * 32 // packing.bits if packing.dense else words * (32 // packing.bits)


def _known_columns(args: QuantArgs, stored: StoredSpecs, expected_shape: tuple[int, int] | None) -> int | None:
    """K by the model, or by the number of groups if they are whole; None when neither says."""
    if expected_shape is not None:
        return expected_shape[1]
    scale = stored.get(scale_name(stored))
    if args.group_size is None or scale is None or not scale.shape:
        return None
    return scale.shape[-1] * args.group_size


def _zero_point_packing(
    module: str, args: QuantArgs, stored: StoredSpecs, shape: tuple[int, int], words: Packing, faults: FaultCollector
) -> Packing | None:
    """How the zero point is packed: as the words of the weight, along the rows; None when there is none or it is plain.

    Writers 0.9.4 to 0.10.2 add surplus columns when N does not fill the last word; the first G are valid.
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
            remedy="Check group_size and num_bits in config_groups against the tool that wrote the file.",
        )
    return packing

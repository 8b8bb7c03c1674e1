"""`pack-quantized`: integer codes of b bits in int32 words along K.

| local name          | dtype           | shape                                                               |
|---------------------|-----------------|---------------------------------------------------------------------|
| `weight_packed`     | int32           | [N, ceil(K * b / 32)], code + 2^(b-1), element k in bits b*k and up |
| `weight_scale`      | bf16, f16, f32  | [N, ceil(K / g)], [N, 1] or one element                             |
| `weight_shape`      | int64 (int32)   | [2]: the numbers N, K                                               |
| `weight_zero_point` | int32           | [ceil(N * b / 32), G], packed along the rows; int8 for a tensor     |
| `weight_g_idx`      | int32           | [K]; activation ordering by group, refused here                     |

A zero point counts whenever the tensor exists, whatever `symmetric` says. Writers up to 0.9.3 store it as plain
int8 and leave it out when all of it is zero. Source: compressed-tensors 0.20
`compressors/pack_quantized/{base,helpers}.py`; releases 0.4 to 0.20 write the same bytes for 4 and 8 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.dtypes import DType
from trtllm_ct.formats.base import Codes, StoredSpecs, StoredWeight, WeightFormat, scale_shape
from trtllm_ct.formats.companions import check_codes, check_plain_zero_point, check_scale, check_shape
from trtllm_ct.layouts.packing import INT8_PLAIN, pack_codes, packed_words, repack, unpack_codes
from trtllm_ct.schemes import CompressionFormat, NumberType, Packing, QuantArgs, Strategy, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.errors import FaultCollector

__all__ = ["PACKED_INT"]

_BITS = frozenset({4, 8})


class _PackedInt(WeightFormat):
    name = "pack-quantized"
    declared_as = frozenset({CompressionFormat.PACK_QUANTIZED})

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Integer arguments and int32 words."""
        packed = stored.get("weight_packed")
        return args.type is NumberType.INT and packed is not None and packed.dtype is DType.I32

    def describe(
        self,
        module: str,
        args: QuantArgs,
        stored: StoredSpecs,
        expected_shape: tuple[int, int] | None,
        faults: FaultCollector,
    ) -> StoredWeight | None:
        """See the table above; K comes from the words, and from `expected_shape` where the last word is not full."""
        _refuse_unsupported(module, args, stored, faults)
        check_codes(module, "weight_packed", stored["weight_packed"], DType.I32, faults)
        if faults.faults:
            return None
        packing = packed_words(args.num_bits)
        shape = _logical_shape(stored["weight_packed"], 32 // args.num_bits, expected_shape)
        check_shape(module, shape, expected_shape, faults)
        check_scale(module, args, stored, shape, faults)
        names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        return StoredWeight(
            format=self,
            args=args,
            shape=shape,
            codes="weight_packed",
            packing=packing,
            has_zero_point="weight_zero_point" in stored,
            zero_point_packing=_zero_point_packing(module, args, stored, shape, faults),
            consumed=tuple(name for name in names if name in stored),
        )

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """Words stay packed; zero points are unpacked to int8 (rows, groups)."""
        zero_point = None
        if weight.has_zero_point:
            zero_point = stored["weight_zero_point"]
            if weight.zero_point_packing is not None:
                zero_point = unpack_codes(zero_point, weight.zero_point_packing, weight.scale_shape)
            zero_point = zero_point.reshape(weight.scale_shape)
        return Codes(
            values=stored[weight.codes],
            packing=weight.packing,
            shape=weight.shape,
            scale=stored["weight_scale"].reshape(weight.scale_shape),
            zero_point=zero_point,
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, Tensor]:
        """What the library writes since 0.9.4; `codes` may come in any packing."""
        import torch

        words = packed_words(args.num_bits)
        tensors = {
            "weight_packed": repack(codes.values, codes.packing or INT8_PLAIN, words, codes.shape),
            "weight_scale": codes.scale,
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if codes.zero_point is not None and args.strategy is Strategy.TENSOR:
            tensors["weight_zero_point"] = codes.zero_point
        elif codes.zero_point is not None:
            tensors["weight_zero_point"] = pack_codes(codes.zero_point, packed_words(args.num_bits, axis=0))
        return tensors


PACKED_INT = _PackedInt()


def _logical_shape(packed: TensorSpec, per_word: int, expected_shape: tuple[int, int] | None) -> tuple[int, int]:
    """(N, K) of the codes.

    W words hold any K in (per_word * (W - 1), per_word * W]: the model's own K decides when it is one of these, else
    the words are taken as full. Loading compares the result with the numbers in `weight_shape`.
    """
    rows, words = packed.shape
    columns = words * per_word
    if expected_shape is not None and columns - per_word < expected_shape[1] <= columns:
        columns = expected_shape[1]
    return rows, columns


def _refuse_unsupported(module: str, args: QuantArgs, stored: StoredSpecs, faults: FaultCollector) -> None:
    if args.num_bits not in _BITS:
        faults.add(
            where=module,
            expected="4 or 8 bits in pack-quantized",
            found=args.label(),
            remedy="Quantize again with a W4A16 or W8A16 scheme.",
        )
    if "weight_g_idx" in stored:
        faults.add(
            where=f"{module}.weight_g_idx",
            expected="contiguous groups (actorder null, static or weight)",
            found="activation ordering by group",
            remedy="Quantize again with actorder=static; no TensorRT-LLM kernel reads permuted groups.",
        )


def _zero_point_packing(
    module: str, args: QuantArgs, stored: StoredSpecs, shape: tuple[int, int], faults: FaultCollector
) -> Packing | None:
    """How the zero point is packed; None when there is none or it is plain.

    Writers 0.9.4 to 0.10.2 add surplus columns when N does not fill the last word; the first G are valid.
    """
    spec = stored.get("weight_zero_point")
    if spec is None:
        return None
    if spec.dtype is not DType.I32:
        check_plain_zero_point(module, args, spec, shape, faults)
        return None
    packing = packed_words(args.num_bits, axis=0)
    words, groups = packing.packed_shape(scale_shape(args, shape))
    if len(spec.shape) != 2 or spec.shape[0] != words or spec.shape[1] < groups:
        faults.add(
            where=f"{module}.weight_zero_point",
            expected=f"int32 {[words, groups]}: packed along the rows, one column a group",
            found=str(spec),
            remedy="Check group_size and num_bits in config_groups against the tool that wrote the file.",
        )
    return packing

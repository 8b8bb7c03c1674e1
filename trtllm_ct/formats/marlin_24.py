"""`marlin-24`: 4 or 8 bit codes of a 2:4 sparse weight, arranged for one GPU kernel.

| local name      | dtype   | shape                                                                  |
|-----------------|---------|------------------------------------------------------------------------|
| `weight_packed` | int32   | [K / 32, 2 N] for 4 bits, [K / 32, 4 N] for 8: code + 2^(b-1)          |
| `scale_packed`  | float16 | [G, N], or [1, N] for strategy channel                                 |
| `meta`          | int16   | [K / 32, 2 N]: which two of each four columns are kept, a nibble each  |

Symmetric only; N is a multiple of 64 and K one of 32. No release could read what it wrote: here the permutations are
undone, and the codes that were left out are zeros. Scales by group are interleaved when a group is shorter than half
of K, but only since 0.8.0; earlier writers forgot it. Nothing in the tensors tells, so the version must.
Source: compressed-tensors 0.6 and 0.14 `compressors/.../marlin_24.py`; later releases have no such code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.base.schemes import CompressionFormat, NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat, scale_shape
from trtllm_ct.formats.companions import check_codes, check_shape
from trtllm_ct.layouts import marlin_24 as layout
from trtllm_ct.layouts.loops.dispatch import repack
from trtllm_ct.layouts.packing import INT8_PLAIN, packed_words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["MARLIN_24"]

_FIRST_INTERLEAVED = (0, 8)


class _Marlin24(WeightFormat):
    """The format as one generation of writers has it: with scales by group interleaved, or not."""

    name = "marlin-24"
    declared_as = frozenset({CompressionFormat.MARLIN_24})
    codes = "weight_packed"
    axes: Mapping[str, Axis] = dict.fromkeys(("weight_packed", "scale_packed", "meta"), Axis.TILES)

    def __init__(self, *, interleaves: bool) -> None:
        self.interleaves = interleaves

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Integer arguments, and int32 words with a scale that is packed too."""
        packed = stored.get("weight_packed")
        is_words = packed is not None and packed.dtype is DType.I32
        return args.type is NumberType.INT and is_words and "scale_packed" in stored

    def describe(
        self,
        module: str,
        args: QuantArgs,
        stored: StoredSpecs,
        expected_shape: tuple[int, int] | None,
        faults: FaultCollector,
        version: Version = (),
    ) -> StoredWeight | None:
        """See the table above; `packing` says how wide the codes are, but not the order that they lie in.

        An unknown `version` counts as a new one: most files are of 0.8 or later.
        """
        words = stored["weight_packed"]
        if not _check_args(module, args, faults) or not check_codes(module, self.codes, words, DType.I32, faults):
            return None
        shape = words.shape[1] * 2 // args.num_bits, words.shape[0] * 32
        check_shape(module, shape, expected_shape, faults)
        _check_multiples(module, args, words, faults)
        groups = scale_shape(args, shape)[1]
        _check_companion(module, "scale_packed", stored, TensorSpec(DType.F16, (groups, shape[0])), faults)
        _check_companion(module, "meta", stored, TensorSpec(DType.I16, (words.shape[0], 2 * shape[0])), faults)
        return StoredWeight(
            format=_EARLY if version and version < _FIRST_INTERLEAVED else self,
            args=args,
            shape=shape,
            codes="weight_packed",
            packing=packed_words(args.num_bits),
            scale="scale_packed",
            axes={name: axis for name, axis in self.axes.items() if name in stored},
        )

    def decode(self, weight: StoredWeight, stored: Mapping[str, Tensor]) -> Codes:
        """Plain int8 codes [N, K] with the zeros put back, and scales [N, G].

        Raises `PayloadError` where `meta` does not name two different positions of four.
        """
        nibbles = layout.restore_nibbles(stored["meta"])
        _check_nibbles(nibbles)
        scale = stored["scale_packed"]
        if self._interleaved(weight.args, weight.shape):
            scale = layout.restore_scales(scale)
        return Codes(
            values=layout.expand_fours(layout.restore_codes(stored["weight_packed"], weight.args.num_bits), nibbles),
            packing=INT8_PLAIN,
            shape=weight.shape,
            scale=scale.T.contiguous(),
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, Tensor]:
        """What the library wrote up to 0.14; raises `ValueError` for codes that are not 2:4 or have zero points."""
        import torch

        if codes.zero_point is not None:
            raise ValueError("marlin-24 has no place for zero points")
        plain = repack(codes.values, codes.packing or INT8_PLAIN, INT8_PLAIN, codes.shape)
        kept, nibbles = layout.pick_fours(plain)
        scale = codes.scale.to(torch.float16).T.contiguous()
        return {
            "weight_packed": layout.arrange_codes(kept, args.num_bits),
            "scale_packed": layout.arrange_scales(scale) if self._interleaved(args, codes.shape) else scale,
            "meta": layout.arrange_nibbles(nibbles),
        }

    def _interleaved(self, args: QuantArgs, shape: tuple[int, int]) -> bool:
        """Writers compared the group size, which counts all columns, with the number of kept ones."""
        return self.interleaves and args.group_size is not None and args.group_size < shape[1] // 2


MARLIN_24 = _Marlin24(interleaves=True)
_EARLY = _Marlin24(interleaves=False)


def _check_args(module: str, args: QuantArgs, faults: FaultCollector) -> bool:
    if args.num_bits in {4, 8} and args.symmetric and args.strategy in {Strategy.GROUP, Strategy.CHANNEL}:
        return True
    faults.add(
        where=module,
        expected="symmetric int4 or int8 with strategy group or channel in marlin-24",
        found=args.label(),
        remedy="The tensors are those of marlin-24, which holds nothing else; correct config_groups.",
    )
    return False


def _check_multiples(module: str, args: QuantArgs, words: TensorSpec, faults: FaultCollector) -> None:
    """Whether the words make whole blocks of 64 rows; whole blocks of columns they always make."""
    step = layout.N_MULTIPLE * args.num_bits // 2
    if words.shape[1] % step:
        faults.add(
            where=f"{module}.weight_packed",
            expected=f"int32 words in a multiple of {step} columns for {args.num_bits} bits",
            found=str(words),
            remedy="Check num_bits in config_groups against the tool that wrote the file.",
        )


def _check_companion(module: str, name: str, stored: StoredSpecs, wanted: TensorSpec, faults: FaultCollector) -> None:
    found = stored.get(name)
    if found == wanted:
        return
    remedy = "Check num_bits, strategy and group_size in config_groups against the tool that wrote the file."
    faults.add(
        where=f"{module}.{name}",
        expected=f"{wanted} beside the codes",
        found=str(found) if found else "no such tensor",
        remedy=remedy if found else "Without it the weight has no value; look for a lost shard.",
    )


def _check_nibbles(nibbles_OF: Tensor) -> None:
    import torch

    bad = torch.isin(nibbles_OF, torch.tensor(layout.NIBBLES, dtype=torch.uint8), invert=True)
    if not bool(bad.any()):
        return
    row, four = (int(index) for index in bad.nonzero()[0])
    raise PayloadError(
        Fault(
            where="meta",
            expected="two different positions for each four columns, the lower one first",
            found=f"{int(nibbles_OF[row, four]):04b} for row {row}, columns {4 * four} to {4 * four + 3}",
            remedy="The file was damaged, or is no marlin-24; download the checkpoint again.",
        )
    )

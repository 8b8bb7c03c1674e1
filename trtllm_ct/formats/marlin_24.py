"""`marlin-24`: 4-bit or 8-bit codes of a 2:4 sparse weight, in the layout of the Marlin 2:4 GPU kernel.

| local name      | dtype   | shape                                                                  |
|-----------------|---------|------------------------------------------------------------------------|
| `weight_packed` | int32   | [K / 32, 2 N] for 4 bits, [K / 32, 4 N] for 8: code + 2^(b-1)          |
| `scale_packed`  | float16 | [G, N], or [1, N] for strategy channel                                 |
| `meta`          | int16   | [K / 32, 2 N]: a nibble for each four columns, with the two kept ones  |

The codes are symmetric; N is a multiple of 64 and K is a multiple of 32. No release of compressed-tensors could read
this format back. This module undoes the permutations and restores the codes that were left out as zeros.

Since 0.8.0 writers interleave scales per group if the group size is less than K / 2; earlier writers forgot to do so.
The tensors do not show whether scales are interleaved, so the version of the writer decides.
Source: compressed-tensors 0.6 and 0.14 `compressors/.../marlin_24.py`; later releases have no such code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.base.lost_remedies import FETCH
from trtllm_ct.base.schemes import CompressionFormat, NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, Version, WeightFormat, scale_shape
from trtllm_ct.formats.companions import check_codes, check_shape
from trtllm_ct.layouts import marlin_24 as layout
from trtllm_ct.layouts.packing import INT8_PLAIN, packed_words
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = ["MARLIN_24"]

_FIRST_INTERLEAVED = (0, 8)


class _Marlin24(WeightFormat):
    """The format of one generation of writers, which interleave scales per group or do not."""

    name = "marlin-24"
    declared_as = frozenset({CompressionFormat.MARLIN_24})
    codes = "weight_packed"
    axes: Mapping[str, Axis] = dict.fromkeys(("weight_packed", "scale_packed", "meta"), Axis.TILES)

    def __init__(self, *, interleaves: bool) -> None:
        self.interleaves = interleaves

    def accepts(self, args: QuantArgs, stored: StoredSpecs) -> bool:
        """Accept integer arguments with int32 words in `weight_packed` and a `scale_packed`."""
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
        """Return the weight that the tensors in the table above make up.

        The `packing` of the result gives the width of the codes, but not their order. A weight whose `version` is
        unknown counts as written by 0.8.0 or later, as most files are.
        """
        words = stored["weight_packed"]
        if not _check_args(module, args, faults) or not check_codes(module, self.codes, words, DType.I32, faults):
            return None
        shape = words.shape[1] * 2 // args.num_bits, words.shape[0] * layout.K_MULTIPLE
        check_shape(module, shape, expected_shape, faults)
        _check_multiples(module, args, words, faults)
        groups = scale_shape(args, shape)[1]
        _check_companion(module, "scale_packed", stored, TensorSpec(DType.F16, (groups, shape[0])), faults)
        _check_companion(module, "meta", stored, TensorSpec(DType.I16, (words.shape[0], 2 * shape[0])), faults)
        return StoredWeight(
            format=_MARLIN_24_BEFORE_0_8 if version and version < _FIRST_INTERLEAVED else self,
            args=args,
            shape=shape,
            codes="weight_packed",
            packing=packed_words(args.num_bits),
            scale="scale_packed",
            axes={name: axis for name, axis in self.axes.items() if name in stored},
        )

    def decode(self, weight: StoredWeight, stored: StoredTensors) -> Codes:
        """Return int8 codes [N, K], with zeros for the columns that were left out, and scales [N, G].

        Raises `PayloadError` where `meta` does not give two different positions for four columns.
        """
        import numpy as np

        nibbles = layout.restore_nibbles(stored["meta"].elements)
        _check_nibbles(nibbles)
        scale, words = stored["scale_packed"].elements, stored["weight_packed"].elements
        if self._has_interleaved_scales(weight.args, weight.shape):
            scale = layout.restore_scales(scale)
        return Codes(
            values=StoredArray(
                layout.expand_fours(layout.restore_codes(words, weight.args.num_bits), nibbles), DType.I8
            ),
            packing=INT8_PLAIN,
            shape=weight.shape,
            scale=StoredArray(np.ascontiguousarray(scale.T), DType.F16),
        )

    def encode(self, codes: Codes, args: QuantArgs) -> dict[str, StoredArray]:
        """Return the tensors by local name, as the library wrote them up to 0.14.

        Raises `ValueError` if the codes are not 2:4 sparse or have zero points.
        """
        import numpy as np

        if codes.zero_point is not None:
            raise ValueError("marlin-24 has no place for zero points")
        kept, nibbles = layout.pick_fours(codes.repacked(INT8_PLAIN).elements)
        scale = np.ascontiguousarray(codes.scale.numbers.astype(np.float16).T)
        if self._has_interleaved_scales(args, codes.shape):
            scale = layout.arrange_scales(scale)
        return {
            "weight_packed": StoredArray(layout.arrange_codes(kept, args.num_bits), DType.I32),
            "scale_packed": StoredArray(scale, DType.F16),
            "meta": StoredArray(layout.arrange_nibbles(nibbles), DType.I16),
        }

    def _has_interleaved_scales(self, args: QuantArgs, shape: tuple[int, int]) -> bool:
        """Whether the stored scales are interleaved.

        The group size counts all columns, but the writers compared it with the number of kept columns, K / 2.
        """
        return self.interleaves and args.group_size is not None and args.group_size < shape[1] // 2


MARLIN_24 = _Marlin24(interleaves=True)
_MARLIN_24_BEFORE_0_8 = _Marlin24(interleaves=False)


def _check_args(module: str, args: QuantArgs, faults: FaultCollector) -> bool:
    """Return whether marlin-24 can store codes with these arguments; add a fault if not."""
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
    """Add a fault if N is not a multiple of 64; K always is a multiple of 32, the columns that a row of words holds."""
    step = layout.N_MULTIPLE * args.num_bits // 2
    if words.shape[1] % step:
        faults.add(
            where=f"{module}.weight_packed",
            expected=f"int32 words in a multiple of {step} columns for {args.num_bits} bits",
            found=str(words),
            remedy="Check num_bits in config_groups against the tool that wrote the file.",
        )


def _check_companion(module: str, name: str, stored: StoredSpecs, wanted: TensorSpec, faults: FaultCollector) -> None:
    """Add a fault if the tensor `name` is missing or differs from `wanted`."""
    spec = stored.get(name)
    if spec == wanted:
        return
    remedy = "Check num_bits, strategy and group_size in config_groups against the tool that wrote the file."
    faults.add(
        where=f"{module}.{name}",
        expected=f"{wanted} beside the codes",
        found=str(spec) if spec else "no such tensor",
        remedy=remedy if spec else f"Without it the weight has no value. {FETCH}.",
    )


def _check_nibbles(nibbles_OF: NDArray[np.uint8]) -> None:
    """Raise `PayloadError` for the first invalid nibble in `nibbles_OF`, [N, K / 4]."""
    import numpy as np

    invalid = np.isin(nibbles_OF, layout.NIBBLES, invert=True)
    if not invalid.any():
        return
    row, four = (int(index) for index in np.argwhere(invalid)[0])
    raise PayloadError(
        Fault(
            where="meta",
            expected="two different positions for each four columns, the lower one first",
            found=f"{int(nibbles_OF[row, four]):04b} for row {row}, columns {4 * four} to {4 * four + 3}",
            remedy="The file was damaged, or is no marlin-24; download the checkpoint again.",
        )
    )

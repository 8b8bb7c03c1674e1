"""Which code runs: compiled loops for large CPU tensors, torch operations for all others. The bits are the same.

Formats and operations call the functions here. A loop takes a tensor when it lies in CPU memory, is large enough that
loading machine code pays, and has one of the arrangements that checkpoints have. What is left goes to `packing.py` and
`scales.py`, which know every arrangement and every device and refuse sizes that contradict each other.

`out` is a contiguous tensor of the shape and dtype of the result, which is then written there and returned.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing
from trtllm_ct.layouts import packing as plain
from trtllm_ct.layouts import scales
from trtllm_ct.layouts.floats import element_values
from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, run_of

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from trtllm_ct.layouts.scales import Scaling

__all__ = [
    "ScalingArrays",
    "additive_zero",
    "can_repack",
    "dequantize",
    "dequantize_bytes",
    "repack",
    "repack_bytes",
    "unpack_codes",
]

_SMALL = 1 << 16
"""Fewer codes than these take torch about a millisecond; loading machine code takes 40, and compiling it seconds."""

_TARGETS = (INT4_ROW_PAIRS, INT8_PLAIN)
"""What codes are repacked to by loops."""

_FLOATS = {Element.E4M3: (3, 7, 0x7F), Element.E2M1: (1, 1, -1), Element.E2M3: (3, 1, -1)}
"""Bits of the mantissa, bias of the exponent, and the magnitude that is NaN, or -1 where none is."""


def repack(
    packed: Tensor, source: Packing, target: Packing, shape: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """Move codes of `shape` from one container to another, bit for bit; see `packing.repack`.

    Equal packings hand on the input.
    """
    if source == target:
        return packed
    if not (_has_loop(packed, source, target, shape) and _is_large(shape, packed)):
        return _into(out, plain.repack(packed, source, target, shape))
    result = _target(out, target.packed_shape(shape), target.container.torch_dtype)
    repack_bytes(_octets(packed), source, target, shape, _octets(result))
    return result


def repack_bytes(
    octets: NDArray[np.uint8], source: Packing, target: Packing, shape: tuple[int, int], out: NDArray[np.uint8]
) -> None:
    """The same by loops, between the bytes of containers, [lines, bytes]; for packings that `can_repack` names.

    Bytes behind the codes of a line, and lines behind the last row, are passed over.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    lines, run, flip = octets[: shape[0]], _run(source), _flip(source)
    if target == INT8_PLAIN:
        kernels.plain_codes(lines, run, flip, out)
    elif source.bits == 4 and shape[0] % 2 == 0 and shape[1] % 4 == 0:
        halves = lines[:, : shape[1] // 2].view(np.uint16)
        kernels.row_pairs_of_nibbles(halves, 0x11111111 * (flip ^ 8), out.view(np.uint32))
    else:
        kernels.row_pairs(lines, run, flip, np.empty((2, shape[1]), np.uint8), out)


def can_repack(source: Packing, target: Packing) -> bool:
    """Whether there is a loop from one container to another."""
    return source.axis == 1 and target in _TARGETS


def unpack_codes(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """The signed codes in a container, int8 of `shape`; see `packing.unpack_codes`. The loop is for zero points."""
    if not _has_columns(packed, packing, shape) or not _is_large(shape, packed):
        return plain.unpack_codes(packed, packing, shape)
    import numpy as np
    import torch

    from trtllm_ct.layouts.loops import kernels

    codes = torch.empty(shape, dtype=torch.int8)
    per_word = 0 if packing.dense else _whole_codes(packing)
    kernels.plain_codes_along_rows(_octets(packed).view(np.uint32), packing.bits, per_word, _octets(codes))
    return codes


def additive_zero(
    scale_OG: Tensor, zero_point: Tensor, packing: Packing | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The offset that an engine adds after scaling, float32 [N, G]; see `scales.additive_zero`.

    `zero_point` is int8 [N, G], or packed as `packing` says.
    """
    import torch

    shape = (scale_OG.shape[0], scale_OG.shape[1])
    large = _is_large(shape, scale_OG, zero_point)
    if packing is not None and not (large and _has_whole_words(zero_point, packing, shape)):
        zero_point, packing = unpack_codes(zero_point, packing, shape), None
    known = packing is not None or (zero_point.shape == scale_OG.shape and zero_point.dtype == torch.int8)
    if not (large and known):
        return _into(out, scales.additive_zero(scale_OG, zero_point))
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    offset = _target(out, shape, torch.float32)
    scale, halves = _scale_bits(scale_OG)
    if packing is None:
        kernels.additive_zero(_array(zero_point), scale, halves, _array(offset))
    else:
        words = _octets(zero_point).view(np.uint32)
        kernels.additive_zero_of_words(words, packing.bits, _whole_codes(packing), scale, halves, _array(offset))
    return offset


def dequantize(
    values: Tensor,
    packing: Packing | None,
    element: Element,
    shape: tuple[int, int],
    scaling: Scaling,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Codes of `shape` in a container to weights of `dtype`, each the exact value rounded once.

    `packing` is None for float8 codes [N, K] in the dtype of torch that says so. Peak memory: the result and a row;
    with torch operations also the codes as int8 and a tile.
    """
    known = _is_known(values, packing, shape, scaling) and DType.from_torch(dtype).is_wide_float
    if not known or not _is_large(shape, *_tensors(values, scaling)):
        numbers = values if packing is None else _numbers(values, packing, element, shape)
        return _into(out, scales.dequantize(numbers, scaling, dtype))
    import torch

    zero_point, index = scaling.zero_point, scaling.group_index if scaling.scale.shape[1] > 1 else None
    arrays = ScalingArrays(
        scale=_array(scales.scale_values(scaling.scale, torch.float32)),
        block_rows=scaling.block_rows,
        group_columns=scaling.group_columns,
        in_float64=scales.computing_dtype(scaling, dtype) == torch.float64,
        zero_point=None if zero_point is None else _array(zero_point.to(torch.float32)),
        divisor=1.0 if scaling.divisor is None else float(scaling.divisor),
        group_index=None if index is None else _array(index.long()),
    )
    dense = _target(out, shape, dtype)
    dequantize_bytes(_octets(values[: shape[0]]), packing, element, arrays, DType.from_torch(dtype), _octets(dense))
    return dense


class ScalingArrays(NamedTuple):
    """A `Scaling` for loops: float32 arrays, int64 for the index, and whether products need float64 to be exact."""

    scale: NDArray[np.float32]
    block_rows: int
    group_columns: int | None
    in_float64: bool
    zero_point: NDArray[np.float32] | None = None
    divisor: float = 1.0
    group_index: NDArray[np.int64] | None = None


def dequantize_bytes(
    octets: NDArray[np.uint8],
    packing: Packing | None,
    element: Element,
    scaling: ScalingArrays,
    dtype: DType,
    out: NDArray[np.uint8],
) -> None:
    """The same by the loop, from the bytes of codes [N, B] to those of weights [N, K * itemsize]."""
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    columns, groups = out.shape[1] // dtype.itemsize, scaling.scale.shape[1]
    kernels.dequantize(
        octets,
        (8, 1, 1) if packing is None else _run(packing),
        _FLOATS[Element.E4M3] if packing is None else _meaning(packing, element),
        scaling.scale,
        np.zeros((1, groups), np.float32) if scaling.zero_point is None else scaling.zero_point,
        scaling.divisor,
        (scaling.block_rows, scaling.group_columns if scaling.group_columns and groups > 1 else columns),
        np.empty(0, np.int64) if scaling.group_index is None else scaling.group_index,
        np.empty(columns, np.uint8),
        np.empty(columns, np.float64 if scaling.in_float64 else np.float32),
        kernels.KINDS[dtype],
        out,
    )


def _is_large(shape: tuple[int, ...], *tensors: Tensor) -> bool:
    """Whether compiled loops can run, and are worth being loaded."""
    return prod(shape) >= _SMALL and all(tensor.device.type == "cpu" for tensor in tensors)


def _tensors(values: Tensor, scaling: Scaling) -> list[Tensor]:
    candidates = (values, scaling.scale, scaling.zero_point, scaling.group_index, scaling.divisor)
    return [tensor for tensor in candidates if tensor is not None]


def _has_loop(packed: Tensor, source: Packing, target: Packing, shape: tuple[int, int]) -> bool:
    return can_repack(source, target) and _has_rows(packed, source, shape)


def _has_rows(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes lie along the columns, all of them."""
    return packing.axis == 1 and packed.shape[0] >= shape[0] and packed.shape[1] >= packing.elements(shape[1])


def _has_columns(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes lie along the rows in words, all of them, as zero points do."""
    rows, columns = packing.packed_shape(shape)
    along_rows = (packing.container, packing.axis, packing.offset_binary) == (DType.I32, 0, True)
    return along_rows and packed.shape[0] >= rows and packed.shape[1] >= columns


def _has_whole_words(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> bool:
    """The same, and whether no code straddles two words."""
    straddles = packing.dense and packing.container.bits % packing.bits
    return not straddles and _has_columns(packed, packing, shape)


def _scale_bits(scale: Tensor) -> tuple[NDArray[Any], bool]:
    """A scale as loops take it: the bits of bfloat16, and true, or float32."""
    import torch

    if scale.dtype == torch.bfloat16:
        return _array(scale.view(torch.uint16)), True
    return _array(scale.to(torch.float32)), False


def _whole_codes(packing: Packing) -> int:
    """How many whole codes a word holds."""
    return packing.container.bits // packing.bits


def _is_known(values: Tensor, packing: Packing | None, shape: tuple[int, int], scaling: Scaling) -> bool:
    """Whether the loop reads this arrangement, and sizes agree: it doesn't look where it reads."""
    import torch

    if packing is None:
        if values.dtype != torch.float8_e4m3fn or tuple(values.shape) != shape:
            return False
    elif not _has_rows(values, packing, shape):
        return False
    scale, zero_point, index = scaling.scale, scaling.zero_point, scaling.group_index
    rows, groups = scale.shape
    if scale.dtype == torch.float64 or rows not in {1, -(-shape[0] // scaling.block_rows)}:
        return False
    if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype != torch.int8):
        return False
    if groups == 1:
        return True
    if index is not None:
        return index.shape == shape[1:] and int(index.min()) >= 0 and int(index.max()) < groups
    return groups == -(-shape[1] // (scaling.group_columns or shape[1]))


def _numbers(values: Tensor, packing: Packing, element: Element, shape: tuple[int, int]) -> Tensor:
    """The codes [N, K] as numbers: int8 codes, or small floats by their table in bfloat16."""
    import torch

    if element is Element.INT:
        return plain.unpack_codes(values, packing, shape)
    return element_values(plain.unpack_fields(values, packing, shape), element, torch.bfloat16)


def _run(packing: Packing) -> tuple[int, int, int]:
    """Bits of a code, and bytes and codes of a run, as the loops take them."""
    return (packing.bits, *run_of(packing))


def _flip(packing: Packing) -> int:
    """What makes offset binary of a field: its top bit, unless it is that already."""
    return 0 if packing.offset_binary else 1 << (packing.bits - 1)


def _meaning(packing: Packing, element: Element) -> tuple[int, int, int]:
    """As `kernels.decode_row` takes it."""
    return (-1, _flip(packing), 0) if element is Element.INT else _FLOATS[element]


def _target(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where a result is written: loops check nothing themselves, and torch would convert and repeat."""
    if out is None:
        return empty(shape, dtype)
    if tuple(out.shape) != shape or out.dtype != dtype or _in_a_row(out) is not out:
        raise ValueError(f"out must be a contiguous {dtype} {list(shape)}, not {out.dtype} {list(out.shape)}")
    return out


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """The result itself, or a copy in `out`."""
    return result if out is None else _target(out, tuple(result.shape), result.dtype).copy_(result)


def _array(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor; of a copy, where its elements are not one behind the other."""
    array: NDArray[Any] = _in_a_row(tensor).detach().numpy()
    return array


def _octets(tensor: Tensor) -> NDArray[Any]:
    """The bytes of a matrix, [lines, bytes]."""
    import torch

    array: NDArray[Any] = _in_a_row(tensor).detach().view(torch.uint8).numpy()
    return array


def _in_a_row(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose last axis has stride 1.

    A matrix of one column counts as contiguous with any stride, and no view to another dtype takes it then.
    """
    import torch

    if tensor.is_contiguous() and tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

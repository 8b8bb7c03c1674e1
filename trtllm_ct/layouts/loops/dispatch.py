"""Repacking and dequantization by compiled loops for large CPU tensors, and by torch operations for all others.

Formats and operations call the functions of this module. Both implementations give the same bits. A loop runs when all
tensors are in CPU memory, the weight is large enough to justify loading machine code, and its layout is one that
checkpoints use. All other calls go to `packing.py` and `scales.py`, which support every layout and device, and reject
sizes that contradict each other.
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
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, run_size

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

_MIN_CODES = 1 << 16
"""Loops run from this number of codes on.

For fewer codes torch takes about a millisecond, while loading machine code takes 40 ms, and compiling
it takes seconds.
"""

_TARGETS = (INT4_ROW_PAIRS, INT8_PLAIN)
"""The packings that loops can repack to."""

_FLOATS = {Element.E4M3: (3, 7, 0x7F), Element.E2M1: (1, 1, -1), Element.E2M3: (3, 1, -1)}
"""Per small float: mantissa bits, exponent bias, and the magnitude bits of NaN (-1 when the format has no NaN)."""


def repack(packed: Tensor, source: Packing, target: Packing, shape: tuple[int, int]) -> Tensor:
    """Convert codes of `shape` from one packing to another; see `packing.repack`.

    For equal packings the result is the input tensor itself.
    """
    if source == target:
        return packed
    if not (_has_loop(packed, source, target, shape) and _is_large(shape, packed)):
        return plain.repack(packed, source, target, shape)
    result = empty(target.packed_shape(shape), target.container.torch_dtype)
    repack_bytes(_bytes_of(packed), source, target, shape, _bytes_of(result))
    return result


def repack_bytes(
    packed: NDArray[np.uint8], source: Packing, target: Packing, shape: tuple[int, int], out: NDArray[np.uint8]
) -> None:
    """Repack codes of `shape` by a loop, from the bytes of one container to the bytes of another.

    `packed` is [lines, bytes], and `out` holds the bytes of the result. `can_repack(source, target)` must be true.
    Surplus bytes at the end of a line, and lines behind the last row, are ignored.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    lines, run, flip = packed[: shape[0]], _run(source), _sign_flip(source)
    if target == INT8_PLAIN:
        kernels.plain_codes(lines, run, flip, out)
    elif source.bits == 4 and shape[0] % 2 == 0 and shape[1] % 4 == 0:
        half_words = lines[:, : shape[1] // 2].view(np.uint16)
        kernels.row_pairs_of_nibbles(half_words, 0x11111111 * (flip ^ 8), out.view(np.uint32))
    else:
        kernels.row_pairs(lines, run, flip, np.empty((2, shape[1]), np.uint8), out)


def can_repack(source: Packing, target: Packing) -> bool:
    """Whether a loop can repack codes from `source` to `target`."""
    return source.axis == 1 and target in _TARGETS


def unpack_codes(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """Return the signed codes in a container, int8 of `shape`; see `packing.unpack_codes`.

    The loop handles zero points: offset binary in int32 words along the rows.
    """
    if not _is_packed_along_rows(packed, packing, shape) or not _is_large(shape, packed):
        return plain.unpack_codes(packed, packing, shape)
    import numpy as np
    import torch

    from trtllm_ct.layouts.loops import kernels

    codes = torch.empty(shape, dtype=torch.int8)
    per_word = 0 if packing.dense else _whole_codes(packing)
    kernels.plain_codes_along_rows(_bytes_of(packed).view(np.uint32), packing.bits, per_word, _bytes_of(codes))
    return codes


def additive_zero(scale_OG: Tensor, zero_point: Tensor, packing: Packing | None = None) -> Tensor:
    """Return the offset that the engine adds after scaling, float32 [N, G]; see `scales.additive_zero`.

    `zero_point` is int8 [N, G], or a container when `packing` is given.
    """
    import torch

    shape = (scale_OG.shape[0], scale_OG.shape[1])
    large = _is_large(shape, scale_OG, zero_point)
    if packing is not None and not (large and _has_whole_codes(zero_point, packing, shape)):
        zero_point, packing = unpack_codes(zero_point, packing, shape), None
    supported = packing is not None or (zero_point.shape == scale_OG.shape and zero_point.dtype == torch.int8)
    if not (large and supported):
        return scales.additive_zero(scale_OG, zero_point)
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    offset = empty(shape, torch.float32)
    scale, is_bfloat16 = _scale_array(scale_OG)
    if packing is None:
        kernels.additive_zero(_array(zero_point), scale, is_bfloat16, _array(offset))
    else:
        words = _bytes_of(zero_point).view(np.uint32)
        kernels.additive_zero_of_words(words, packing.bits, _whole_codes(packing), scale, is_bfloat16, _array(offset))
    return offset


def dequantize(
    values: Tensor,
    packing: Packing | None,
    element: Element,
    shape: tuple[int, int],
    scaling: Scaling,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize codes of `shape` in a container to weights of `dtype`; each is the exact value, rounded once.

    `packing` is None for float8 codes [N, K], stored with a float8 dtype of torch. Peak memory: the result and one row;
    with torch operations also the codes as int8, and a tile.
    """
    supported = _loop_supports(values, packing, shape, scaling) and DType.from_torch(dtype).is_wide_float
    if not supported or not _is_large(shape, *_tensors(values, scaling)):
        numbers = values if packing is None else _decoded(values, packing, element, shape)
        return scales.dequantize(numbers, scaling, dtype)
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
    dense = empty(shape, dtype)
    dequantize_bytes(_bytes_of(values[: shape[0]]), packing, element, arrays, DType.from_torch(dtype), _bytes_of(dense))
    return dense


class ScalingArrays(NamedTuple):
    """A `Scaling` as numpy arrays for the loops.

    `in_float64` says whether products of codes and scales must be computed in float64 to be exact.
    """

    scale: NDArray[np.float32]
    block_rows: int
    group_columns: int | None
    in_float64: bool
    zero_point: NDArray[np.float32] | None = None
    divisor: float = 1.0
    group_index: NDArray[np.int64] | None = None


def dequantize_bytes(
    codes: NDArray[np.uint8],
    packing: Packing | None,
    element: Element,
    scaling: ScalingArrays,
    dtype: DType,
    out: NDArray[np.uint8],
) -> None:
    """Dequantize by the loop: from the bytes of the codes [N, B] to the bytes of the weights [N, K * itemsize].

    `packing` is None for float8 E4M3 codes, one per byte.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    columns, groups = out.shape[1] // dtype.itemsize, scaling.scale.shape[1]
    kernels.dequantize(
        codes,
        (8, 1, 1) if packing is None else _run(packing),
        _FLOATS[Element.E4M3] if packing is None else _decoding(packing, element),
        scaling.scale,
        np.zeros((1, groups), np.float32) if scaling.zero_point is None else scaling.zero_point,
        scaling.divisor,
        (scaling.block_rows, scaling.group_columns if scaling.group_columns and groups > 1 else columns),
        np.empty(0, np.int64) if scaling.group_index is None else scaling.group_index,
        np.empty(columns, np.uint8),
        np.empty(columns, np.float64 if scaling.in_float64 else np.float32),
        kernels.OUTPUT_DTYPES[dtype],
        out,
    )


def _is_large(shape: tuple[int, ...], *tensors: Tensor) -> bool:
    """Whether all tensors are in CPU memory, and `shape` has enough codes to justify loading a loop."""
    return prod(shape) >= _MIN_CODES and all(tensor.device.type == "cpu" for tensor in tensors)


def _tensors(values: Tensor, scaling: Scaling) -> list[Tensor]:
    """Return all tensors that dequantization reads."""
    candidates = (values, scaling.scale, scaling.zero_point, scaling.group_index, scaling.divisor)
    return [tensor for tensor in candidates if tensor is not None]


def _has_loop(packed: Tensor, source: Packing, target: Packing, shape: tuple[int, int]) -> bool:
    """Whether a loop can repack this container."""
    return can_repack(source, target) and _is_packed_along_columns(packed, source, shape)


def _is_packed_along_columns(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes are packed along axis 1, and the container is large enough for codes of `shape`."""
    return packing.axis == 1 and packed.shape[0] >= shape[0] and packed.shape[1] >= packing.elements(shape[1])


def _is_packed_along_rows(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes are packed as zero points are, and the container is large enough for codes of `shape`.

    Zero points are offset binary in int32 words along axis 0.
    """
    rows, columns = packing.packed_shape(shape)
    along_rows = (packing.container, packing.axis, packing.offset_binary) == (DType.I32, 0, True)
    return along_rows and packed.shape[0] >= rows and packed.shape[1] >= columns


def _has_whole_codes(packed: Tensor, packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes are packed as zero points are, and no code straddles two words."""
    straddles = packing.dense and packing.container.bits % packing.bits
    return not straddles and _is_packed_along_rows(packed, packing, shape)


def _scale_array(scale: Tensor) -> tuple[NDArray[Any], bool]:
    """Return a scale in the form that loops read, and whether that form is the bits of bfloat16 as uint16.

    All other dtypes are converted to float32.
    """
    import torch

    if scale.dtype == torch.bfloat16:
        return _array(scale.view(torch.uint16)), True
    return _array(scale.to(torch.float32)), False


def _whole_codes(packing: Packing) -> int:
    """Return how many whole codes one element of the container holds."""
    return packing.container.bits // packing.bits


def _loop_supports(values: Tensor, packing: Packing | None, shape: tuple[int, int], scaling: Scaling) -> bool:
    """Whether the loop can dequantize this layout, and all sizes agree; the loop itself checks no bounds."""
    import torch

    if packing is None:
        if values.dtype != torch.float8_e4m3fn or tuple(values.shape) != shape:
            return False
    elif not _is_packed_along_columns(values, packing, shape):
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


def _decoded(values: Tensor, packing: Packing, element: Element, shape: tuple[int, int]) -> Tensor:
    """Unpack codes [N, K] to numbers: integer codes to int8, small floats to bfloat16."""
    import torch

    if element is Element.INT:
        return plain.unpack_codes(values, packing, shape)
    return element_values(plain.unpack_fields(values, packing, shape), element, torch.bfloat16)


def _run(packing: Packing) -> tuple[int, int, int]:
    """Return (bits of a code, bytes of a run, codes of a run), which the loops take as `run`."""
    return (packing.bits, *run_size(packing))


def _sign_flip(packing: Packing) -> int:
    """Return the XOR mask that turns a field into offset binary: its top bit for two's complement, else 0."""
    return 0 if packing.offset_binary else 1 << (packing.bits - 1)


def _decoding(packing: Packing, element: Element) -> tuple[int, int, int]:
    """Return the `decoding` parameter of `kernels.decode_row`."""
    return (-1, _sign_flip(packing), 0) if element is Element.INT else _FLOATS[element]


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as a numpy array that shares its memory; a tensor that is not contiguous is copied."""
    array: NDArray[Any] = _contiguous(tensor).detach().numpy()
    return array


def _bytes_of(tensor: Tensor) -> NDArray[Any]:
    """Return the bytes of a matrix, uint8 [lines, bytes]; they share its memory if the matrix is contiguous."""
    import torch

    array: NDArray[Any] = _contiguous(tensor).detach().view(torch.uint8).numpy()
    return array


def _contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor itself when it is contiguous and its last axis has stride 1, else a contiguous copy.

    torch treats a matrix of one column as contiguous with any stride, but can't view it as another dtype unless the
    stride is 1.
    """
    import torch

    if tensor.is_contiguous() and tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

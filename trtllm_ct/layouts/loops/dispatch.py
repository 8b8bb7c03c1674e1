"""Repacking and dequantization by compiled loops for large weights, and by numpy's operations for all others.

Formats and operations call the functions of this module. Both implementations give the same bits. A loop runs when the
weight is large enough to justify loading machine code, and its layout is one that checkpoints use. All other calls go
to `packing.py` and `scales.py`, which support every layout, and reject sizes that contradict each other.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing
from trtllm_ct.layouts import packing as plain
from trtllm_ct.layouts import scales
from trtllm_ct.layouts.floats import element_values
from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN, run_size
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.layouts.scales import Scaling

__all__ = ["additive_zero", "dequantize", "repack", "unpack_codes"]

_MIN_CODES = 1 << 16
"""Loops run from this number of codes on.

For fewer codes numpy takes about a millisecond, while loading machine code takes 40 ms, and compiling it takes seconds.
"""

_TARGETS = (INT4_ROW_PAIRS, INT8_PLAIN)
"""The packings that loops can repack to."""

_FLOATS = {Element.E4M3: (3, 7, 0x7F), Element.E2M1: (1, 1, -1), Element.E2M3: (3, 1, -1)}
"""Per small float: mantissa bits, exponent bias, and the magnitude bits of NaN (-1 when the format has no NaN)."""


def repack(packed: NDArray[Any], source: Packing, target: Packing, shape: tuple[int, int]) -> NDArray[Any]:
    """Convert codes of `shape` from one packing to another; see `packing.repack`.

    For equal packings the result is the input array itself.
    """
    if source == target:
        return packed
    has_loop = target in _TARGETS and _is_packed_along_columns(packed, source, shape)
    if not has_loop or not _is_large(shape):
        return plain.repack(packed, source, target, shape)
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    result = empty(target.packed_shape(shape), target.container)
    lines, out, run, flip = _bytes_of(packed)[: shape[0]], _bytes_of(result), _run(source), _sign_flip(source)
    if target == INT8_PLAIN:
        kernels.plain_codes(lines, run, flip, out)
    elif source.bits == 4 and shape[0] % 2 == 0 and shape[1] % 4 == 0:
        half_words = lines[:, : shape[1] // 2].view(np.uint16)
        kernels.row_pairs_of_nibbles(half_words, 0x11111111 * (flip ^ 8), out.view(np.uint32))
    else:
        kernels.row_pairs(lines, run, flip, np.empty((2, shape[1]), np.uint8), out)
    return result


def unpack_codes(packed: NDArray[Any], packing: Packing, shape: tuple[int, int]) -> NDArray[np.int8]:
    """Return the signed codes in a container, int8 of `shape`; see `packing.unpack_codes`.

    The loop handles zero points: offset binary in int32 words along the rows.
    """
    if not _is_packed_along_rows(packed, packing, shape) or not _is_large(shape):
        return plain.unpack_codes(packed, packing, shape)
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    codes = np.empty(shape, np.int8)
    per_word = 0 if packing.dense else _whole_codes(packing)
    kernels.plain_codes_along_rows(_contiguous(packed).view(np.uint32), packing.bits, per_word, codes.view(np.uint8))
    return codes


def additive_zero(
    scale_OG: StoredArray, zero_point: NDArray[Any], packing: Packing | None = None
) -> NDArray[np.float32]:
    """Return the offset that the engine adds after scaling, float32 [N, G]; see `scales.additive_zero`.

    `zero_point` is int8 [N, G], or a container when `packing` is given.
    """
    import numpy as np

    shape = (scale_OG.shape[0], scale_OG.shape[1])
    large = _is_large(shape)
    if packing is not None and not (large and _has_whole_codes(zero_point, packing, shape)):
        zero_point, packing = unpack_codes(zero_point, packing, shape), None
    supported = packing is not None or (zero_point.shape == scale_OG.shape and zero_point.dtype == np.int8)
    if not (large and supported):
        return scales.additive_zero(scale_OG.numbers, zero_point)
    from trtllm_ct.layouts.loops import kernels

    offset = empty(shape, DType.F32)
    is_bfloat16 = scale_OG.dtype is DType.BF16
    scale = _contiguous(scale_OG.elements if is_bfloat16 else scale_OG.numbers.astype(np.float32, copy=False))
    if packing is None:
        kernels.additive_zero(_contiguous(zero_point), scale, is_bfloat16, offset)
    else:
        words = _contiguous(zero_point).view(np.uint32)
        kernels.additive_zero_of_words(words, packing.bits, _whole_codes(packing), scale, is_bfloat16, offset)
    return offset


def dequantize(
    values: StoredArray,
    packing: Packing | None,
    element: Element,
    shape: tuple[int, int],
    scaling: Scaling,
    dtype: DType,
) -> StoredArray:
    """Dequantize codes of `shape` in a container to weights of `dtype`; each is the exact value, rounded once.

    `packing` is None for float8 codes [N, K]. Peak memory: the result and one row; with numpy's operations also the
    codes as int8 or float32, and a tile.
    """
    supported = _loop_supports(values, packing, shape, scaling) and dtype.is_wide_float
    if not supported or not _is_large(shape):
        return scales.dequantize(_decoded(values, packing, element, shape), scaling, dtype)
    import numpy as np

    from trtllm_ct.layouts.loops import kernels

    groups, columns = scaling.scale.shape[1], shape[1]
    zero_point, index = scaling.zero_point, scaling.group_index if groups > 1 else None
    in_float64 = scales.computing_dtype(scaling, dtype) is DType.F64
    dense = empty(shape, dtype)
    kernels.dequantize(
        _bytes_of(values.elements[: shape[0]]),
        (8, 1, 1) if packing is None else _run(packing),
        _FLOATS[Element.E4M3] if packing is None else _decoding(packing, element),
        _contiguous(scales.scale_values(scaling.scale).astype(np.float32, copy=False)),
        np.zeros((1, groups), np.float32) if zero_point is None else zero_point.astype(np.float32),
        scaling.divisor,
        (scaling.block_rows, scaling.group_columns if scaling.group_columns and groups > 1 else columns),
        np.empty(0, np.int64) if index is None else index.astype(np.int64),
        np.empty(columns, np.uint8),
        np.empty(columns, np.float64 if in_float64 else np.float32),
        kernels.OUTPUT_DTYPES[dtype],
        _bytes_of(dense),
    )
    return StoredArray(dense, dtype)


def _is_large(shape: tuple[int, ...]) -> bool:
    """Whether `shape` has enough codes to justify loading a loop."""
    return prod(shape) >= _MIN_CODES


def _is_packed_along_columns(packed: NDArray[Any], packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes are packed along axis 1, and the container is large enough for codes of `shape`."""
    return packing.axis == 1 and packed.shape[0] >= shape[0] and packed.shape[1] >= packing.elements(shape[1])


def _is_packed_along_rows(packed: NDArray[Any], packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes are packed as zero points are, and the container is large enough for codes of `shape`.

    Zero points are offset binary in int32 words along axis 0.
    """
    rows, columns = packing.packed_shape(shape)
    along_rows = (packing.container, packing.axis, packing.offset_binary) == (DType.I32, 0, True)
    return along_rows and packed.shape[0] >= rows and packed.shape[1] >= columns


def _has_whole_codes(packed: NDArray[Any], packing: Packing, shape: tuple[int, int]) -> bool:
    """Whether codes are packed as zero points are, and no code straddles two words."""
    straddles = packing.dense and packing.container.bits % packing.bits
    return not straddles and _is_packed_along_rows(packed, packing, shape)


def _whole_codes(packing: Packing) -> int:
    """Return how many whole codes one element of the container holds."""
    return packing.container.bits // packing.bits


def _loop_supports(values: StoredArray, packing: Packing | None, shape: tuple[int, int], scaling: Scaling) -> bool:
    """Whether the loop can dequantize this layout, and all sizes agree; the loop itself checks no bounds."""
    import numpy as np

    if packing is None:
        if values.dtype is not DType.F8_E4M3 or values.shape != shape:
            return False
    elif not _is_packed_along_columns(values.elements, packing, shape):
        return False
    scale, zero_point, index = scaling.scale, scaling.zero_point, scaling.group_index
    rows, groups = scale.shape
    if scale.dtype is DType.F64 or rows not in {1, -(-shape[0] // scaling.block_rows)}:
        return False
    if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype != np.int8):
        return False
    if groups == 1:
        return True
    if index is not None:
        return index.shape == shape[1:] and int(index.min()) >= 0 and int(index.max()) < groups
    return groups == -(-shape[1] // (scaling.group_columns or shape[1]))


def _decoded(values: StoredArray, packing: Packing | None, element: Element, shape: tuple[int, int]) -> NDArray[Any]:
    """Unpack codes [N, K] to numbers: integer codes to int8, small floats to float32."""
    if packing is None:
        return values.numbers
    if element is Element.INT:
        return plain.unpack_codes(values.elements, packing, shape)
    return element_values(plain.unpack_fields(values.elements, packing, shape), element)


def _run(packing: Packing) -> tuple[int, int, int]:
    """Return (bits of a code, bytes of a run, codes of a run), which the loops take as `run`."""
    return (packing.bits, *run_size(packing))


def _sign_flip(packing: Packing) -> int:
    """Return the XOR mask that turns a field into offset binary: its top bit for two's complement, else 0."""
    return 0 if packing.offset_binary else 1 << (packing.bits - 1)


def _decoding(packing: Packing, element: Element) -> tuple[int, int, int]:
    """Return the `decoding` parameter of `kernels.decode_row`."""
    return (-1, _sign_flip(packing), 0) if element is Element.INT else _FLOATS[element]


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array itself when it is contiguous, else a contiguous copy."""
    import numpy as np

    return np.ascontiguousarray(array)


def _bytes_of(matrix: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of a matrix, uint8 [lines, bytes]; they share its memory if the matrix is contiguous."""
    import numpy as np

    return _contiguous(matrix).view(np.uint8)

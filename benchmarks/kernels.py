"""Time compiled loops against memcpy of as many bytes as they output, in one process and on one thread.

All buffers are touched before the clock starts, so that the time to allocate memory is not measured. memcpy copies
from a third buffer, so that neither side finds its input in the cache because of the other.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.stored_array import StoredArray

__all__ = ["KERNELS", "Kernel", "time_kernels"]

_GROUP = 128
_LEAST_SECONDS = 0.002
"""The minimum time of one sample; a shorter loop is repeated, and the time divided by the number of calls."""

Shape = tuple[int, int]
Prepared = tuple[Callable[[], object], int]
"""A function that runs a loop on prepared buffers, and the number of bytes that it outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A loop: its name, its title in the tables, and a function that prepares it for a weight [N, K]."""

    name: str
    title: str
    prepare: Callable[[Shape], Prepared]


def time_kernels(rows: int, columns: int, runs: int) -> dict[str, Any]:
    """Return the seconds of each kernel and of memcpy, measured alternately, for a weight of this shape."""
    return {kernel.name: _time_kernel(kernel, (rows, columns), runs) for kernel in KERNELS}


def _time_kernel(kernel: Kernel, shape: Shape, runs: int) -> dict[str, Any]:
    run, nbytes = kernel.prepare(shape)
    copy = _prepare_memcpy(nbytes)
    run_calls, copy_calls = _calls_per_sample(run), _calls_per_sample(copy)
    samples = [(_sample(run, run_calls), _sample(copy, copy_calls)) for _ in range(runs)]
    return {"bytes": nbytes, "ours": [sample[0] for sample in samples], "memcpy": [sample[1] for sample in samples]}


def _sample(run: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of one call."""
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def _calls_per_sample(run: Callable[[], object]) -> int:
    """Return how many calls a sample needs; the first call is not timed: it loads machine code and touches memory."""
    run()
    return max(1, round(_LEAST_SECONDS / _sample(run, 3)))


def _prepare_memcpy(nbytes: int) -> Callable[[], object]:
    """Return a memcpy between two buffers, whose memory is allocated like that of the loops' results."""
    from trtllm_ct.base.dtypes import DType

    source, target = _touched((nbytes,), DType.U8), _touched((nbytes,), DType.U8)
    return lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, nbytes)


def _prepare_int4(shape: Shape) -> Prepared:
    """Repack the words of `pack-quantized` to the row pairs of the engine."""
    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.loops.kernels import row_pairs_of_nibbles

    rows, columns = shape
    half_words = _random_bytes((rows, columns // 2)).view("u2")
    lanes = _touched((rows // 2, columns // 4), DType.U32)
    return lambda: row_pairs_of_nibbles(half_words, 0x88888888, lanes), lanes.nbytes


def _prepare_int8(shape: Shape) -> Prepared:
    """Turn offset binary into signed bytes."""
    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.loops.kernels import plain_codes

    packed, out = _random_bytes(shape), _touched(shape, DType.U8)
    return lambda: plain_codes(packed, (8, 1, 1), 0, out), out.nbytes


def _prepare_zero_points(shape: Shape) -> Prepared:
    """Unpack zero points and compute the float32 offsets that an engine adds."""
    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.loops.kernels import additive_zero_of_words

    groups, bits = (shape[0], shape[1] // _GROUP), 4
    words = _random_bytes((groups[0] // 8, 4 * groups[1])).view("u4")
    scale, is_bfloat16 = _random_scale(groups).elements, True
    out = _touched(groups, DType.F32)
    return lambda: additive_zero_of_words(words, bits, 32 // bits, scale, is_bfloat16, out), out.nbytes


def _prepare_fp8_rows(shape: Shape) -> Prepared:
    """Copy FP8 codes unchanged, and widen one scale per row to float32."""
    import numpy as np

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.scales import widen_scale

    codes, scale = _random_bytes(shape), _random_scale((shape[0], 1))
    out, wide = _touched(shape, DType.F8_E4M3), _touched((shape[0],), DType.F32)

    def run() -> None:
        np.copyto(out, codes)
        np.copyto(wide, widen_scale(scale.numbers, (shape[0],)))

    return run, out.nbytes + wide.nbytes


def _prepare_nvfp4(shape: Shape) -> Prepared:
    """Copy NVFP4 codes and the scales of groups of 16, both unchanged."""
    import numpy as np

    from trtllm_ct.base.dtypes import DType

    codes, scales = _random_bytes((shape[0], shape[1] // 2)), _random_bytes((shape[0], shape[1] // 16))
    out, out_scales = _touched(codes.shape, DType.U8), _touched(scales.shape, DType.F8_E4M3)

    def run() -> None:
        np.copyto(out, codes)
        np.copyto(out_scales, scales)

    return run, out.nbytes + out_scales.nbytes


def _prepare_dequantize(shape: Shape) -> Prepared:
    """Widen the bfloat16 scales to float32, as each call of `dispatch.dequantize` does, and dequantize int4 codes."""
    import numpy as np

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.loops.kernels import OUTPUT_DTYPES, dequantize
    from trtllm_ct.layouts.scales import scale_values

    rows, columns = shape
    packed, scale = _random_bytes((rows, columns // 2)), _random_scale((rows, columns // _GROUP))
    zeros, index = np.zeros((1, columns // _GROUP), np.float32), np.empty(0, np.int64)
    fields, numbers = np.empty(columns, np.uint8), np.empty(columns, np.float32)
    out, kind = _touched(shape, DType.BF16).view(np.uint8), OUTPUT_DTYPES[DType.BF16]

    def run() -> None:
        wide = scale_values(scale)
        dequantize(packed, (4, 1, 2), (-1, 0, 0), wide, zeros, 1.0, (1, _GROUP), index, fields, numbers, kind, out)

    return run, out.nbytes


def _random_bytes(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return random bytes, in memory pages of the same size as those of the memcpy."""
    import numpy as np

    from trtllm_ct.base.dtypes import DType

    out = _touched(shape, DType.U8)
    out[...] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return out


def _random_scale(shape: tuple[int, ...]) -> StoredArray:
    """Return random bfloat16 numbers from 0 to 1."""
    import numpy as np

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.layouts.rounding import round_once

    return round_once(np.random.default_rng(0).random(shape, np.float32), DType.BF16)


def _touched(shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
    """Return a buffer whose memory was written to once, allocated like the results of the loops."""
    from trtllm_ct.layouts.loops.huge_pages import empty

    out = empty(shape, dtype)
    out.fill(0)
    return out


KERNELS = (
    Kernel(name="int4-repack", title="int4: words to row pairs", prepare=_prepare_int4),
    Kernel(name="int8-rebias", title="int8: words to signed bytes", prepare=_prepare_int8),
    Kernel(name="zero-points", title="int4 zero points: words to float32 offsets", prepare=_prepare_zero_points),
    Kernel(name="fp8-rows", title="FP8 rows: codes as they are, scales widened", prepare=_prepare_fp8_rows),
    Kernel(name="nvfp4", title="NVFP4: codes and scales as they are", prepare=_prepare_nvfp4),
    Kernel(name="dequantize", title="int4 to bfloat16", prepare=_prepare_dequantize),
)

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
    from torch import Tensor

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
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
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
    import torch

    from trtllm_ct.layouts.loops.huge_pages import empty

    source, target = (empty((nbytes,), torch.uint8).fill_(value) for value in (1, 0))
    return lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)


def _prepare_int4(shape: Shape) -> Prepared:
    from trtllm_ct.layouts.packing import INT4_ROW_PAIRS

    return _prepare_repack(shape, 4, INT4_ROW_PAIRS)


def _prepare_int8(shape: Shape) -> Prepared:
    from trtllm_ct.layouts.packing import INT8_PLAIN

    return _prepare_repack(shape, 8, INT8_PLAIN)


def _prepare_repack(shape: Shape, bits: int, target: Any) -> Prepared:
    from trtllm_ct.layouts.loops.dispatch import repack_bytes
    from trtllm_ct.layouts.packing import packed_words

    source = packed_words(bits)
    packed = _bytes_of(_random_words(source.packed_shape(shape)))
    out = _bytes_of(_touched(target.packed_shape(shape), target.container.torch_dtype))
    return lambda: repack_bytes(packed, source, target, shape, out), out.nbytes


def _prepare_zero_points(shape: Shape) -> Prepared:
    """Unpack zero points and compute the float32 offsets that an engine adds."""
    import numpy as np
    import torch

    from trtllm_ct.layouts.loops.kernels import additive_zero_of_words
    from trtllm_ct.layouts.packing import packed_words

    groups, bits = (shape[0], shape[1] // _GROUP), 4
    words = _bytes_of(_random_words(packed_words(bits, axis=0).packed_shape(groups))).view(np.uint32)
    scale, is_bfloat16 = torch.rand(groups).to(torch.bfloat16).view(torch.uint16).numpy(), True
    out = _touched(groups, torch.float32).numpy()
    return lambda: additive_zero_of_words(words, bits, 32 // bits, scale, is_bfloat16, out), out.nbytes


def _prepare_fp8_rows(shape: Shape) -> Prepared:
    """Copy FP8 codes unchanged, and widen one scale per row to float32."""
    import torch

    from trtllm_ct.layouts.scales import widen_scale

    codes = _random_words((shape[0], shape[1] // 4)).view(torch.float8_e4m3fn)
    scale = torch.rand(shape[0], 1).to(torch.bfloat16)
    out, wide = _touched(shape, torch.float8_e4m3fn), _touched((shape[0],), torch.float32)
    copy = _plain_copy(codes, out)

    def run() -> None:
        copy()
        wide.copy_(widen_scale(scale, (shape[0],)))

    return run, out.nbytes + wide.nbytes


def _prepare_nvfp4(shape: Shape) -> Prepared:
    """Copy NVFP4 codes and the scales of groups of 16, both unchanged."""
    import torch

    codes = _random_words((shape[0], shape[1] // 8)).view(torch.uint8)
    scales = _random_words((shape[0], shape[1] // 64)).view(torch.float8_e4m3fn)
    out = _touched(tuple(codes.shape), torch.uint8)
    out_scales = _touched(tuple(scales.shape), torch.float8_e4m3fn)
    copies = _plain_copy(codes, out), _plain_copy(scales, out_scales)

    def run() -> None:
        for copy in copies:
            copy()

    return run, out.nbytes + out_scales.nbytes


def _plain_copy(source: Tensor, target: Tensor) -> Callable[[], object]:
    """Return a copy with numpy: tensors that are delivered unchanged are copied as bytes, without torch."""
    import numpy as np

    target_bytes, source_bytes = _bytes_of(target), _bytes_of(source)
    return lambda: np.copyto(target_bytes, source_bytes)


def _prepare_dequantize(shape: Shape) -> Prepared:
    """Widen the bfloat16 scales to float32, as each call of `dispatch.dequantize` does, and dequantize int4 codes."""
    import torch

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.schemes import Element
    from trtllm_ct.layouts.loops.dispatch import ScalingArrays, dequantize_bytes
    from trtllm_ct.layouts.packing import packed_words
    from trtllm_ct.layouts.scales import scale_values

    source = packed_words(4)
    packed = _bytes_of(_random_words(source.packed_shape(shape)))
    scale = torch.rand(shape[0], shape[1] // _GROUP).to(torch.bfloat16)
    out = _bytes_of(_touched(shape, torch.bfloat16))

    def run() -> None:
        wide = scale_values(scale, torch.float32).numpy()
        scaling = ScalingArrays(scale=wide, block_rows=1, group_columns=_GROUP, in_float64=False)
        dequantize_bytes(packed, source, Element.INT, scaling, DType.BF16, out)

    return run, out.nbytes


def _random_words(shape: tuple[int, ...]) -> Tensor:
    """Return random int32 words, in memory pages of the same size as those of the memcpy."""
    import torch

    from trtllm_ct.layouts.loops.huge_pages import empty

    return empty(shape, torch.int32).random_(-(2**31), 2**31 - 1)


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a contiguous tensor, uint8 [..., bytes of the last axis], which share its memory."""
    import torch

    data: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return data


def _touched(shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Return a buffer whose memory was written to once, allocated like the results of the loops."""
    import torch

    from trtllm_ct.layouts.loops.huge_pages import empty

    out = empty(shape, dtype)
    out.view(torch.uint8).fill_(0)
    return out


KERNELS = (
    Kernel(name="int4-repack", title="int4: words to row pairs", prepare=_prepare_int4),
    Kernel(name="int8-rebias", title="int8: words to signed bytes", prepare=_prepare_int8),
    Kernel(name="zero-points", title="int4 zero points: words to float32 offsets", prepare=_prepare_zero_points),
    Kernel(name="fp8-rows", title="FP8 rows: codes as they are, scales widened", prepare=_prepare_fp8_rows),
    Kernel(name="nvfp4", title="NVFP4: codes and scales as they are", prepare=_prepare_nvfp4),
    Kernel(name="dequantize", title="int4 to bfloat16", prepare=_prepare_dequantize),
)

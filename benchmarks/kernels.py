"""Loops over memory against memcpy of their output, in one process and on one thread.

All buffers are in use before the clock starts: what is timed is the loop, and not the kernel of the system that hands
out memory. memcpy copies from a third buffer, so that neither side finds its input in the cache because of the other.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_ct.layouts.scales import Scaling

__all__ = ["KERNELS", "Kernel", "time_kernels"]

_GROUP = 128
_LEAST_SECONDS = 0.002
"""What one sample takes at least; a loop that takes less is repeated, and the sample divided."""

Shape = tuple[int, int]
Prepared = tuple[Callable[[], object], int]
"""A loop with its buffers, and how many bytes it puts out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A loop: what it is, and how to prepare it for a weight [N, K]."""

    name: str
    title: str
    prepare: Callable[[Shape], Prepared]


def time_kernels(rows: int, columns: int, runs: int) -> dict[str, Any]:
    """Seconds of each kernel and of memcpy, in turn, for a weight of that shape."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {kernel.name: _time_kernel(kernel, (rows, columns), runs) for kernel in KERNELS}


def _time_kernel(kernel: Kernel, shape: Shape, runs: int) -> dict[str, Any]:
    run, nbytes = kernel.prepare(shape)
    copy = _prepare_memcpy(nbytes)
    ours, memcpy = _repeats(run), _repeats(copy)
    samples = [(_sample(run, ours), _sample(copy, memcpy)) for _ in range(runs)]
    return {"bytes": nbytes, "ours": [sample[0] for sample in samples], "memcpy": [sample[1] for sample in samples]}


def _sample(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, over several of them."""
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats


def _repeats(run: Callable[[], object]) -> int:
    """How many calls make a sample; the first call, which loads machine code and touches memory, does not count."""
    run()
    return max(1, round(_LEAST_SECONDS / _sample(run, 3)))


def _prepare_memcpy(nbytes: int) -> Callable[[], object]:
    """A copy by the C library between two buffers, in pages of the size that results get."""
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
    from trtllm_ct.layouts.loops.dispatch import repack
    from trtllm_ct.layouts.packing import packed_words

    source = packed_words(bits)
    packed = _random_words(source.packed_shape(shape))
    out = _warm(target.packed_shape(shape), target.container.torch_dtype)
    return lambda: repack(packed, source, target, shape, out=out), out.nbytes


def _prepare_zero_points(shape: Shape) -> Prepared:
    """Packed zero points to the offsets that an engine adds, unpacked on the way."""
    import torch

    from trtllm_ct.layouts.loops.dispatch import additive_zero
    from trtllm_ct.layouts.packing import packed_words

    groups, source = (shape[0], shape[1] // _GROUP), packed_words(4, axis=0)
    packed = _random_words(source.packed_shape(groups))
    scale = torch.rand(groups).to(torch.bfloat16)
    out = _warm(groups, torch.float32)
    return lambda: additive_zero(scale, packed, source, out=out), out.nbytes


def _prepare_fp8_rows(shape: Shape) -> Prepared:
    """FP8 codes as they are, and one scale a row, widened."""
    import torch

    from trtllm_ct.layouts.scales import widen_scale

    codes = _random_words((shape[0], shape[1] // 4)).view(torch.float8_e4m3fn)
    scale = torch.rand(shape[0], 1).to(torch.bfloat16)
    out, wide = _warm(shape, torch.float8_e4m3fn), _warm((shape[0],), torch.float32)
    copy = _plain_copy(codes, out)

    def run() -> None:
        copy()
        wide.copy_(widen_scale(scale, (shape[0],)))

    return run, out.nbytes + wide.nbytes


def _prepare_nvfp4(shape: Shape) -> Prepared:
    """NVFP4 codes and the scales of groups of 16, both as they are."""
    import torch

    codes = _random_words((shape[0], shape[1] // 8)).view(torch.uint8)
    scales = _random_words((shape[0], shape[1] // 64)).view(torch.float8_e4m3fn)
    out = _warm(tuple(codes.shape), torch.uint8)
    out_scales = _warm(tuple(scales.shape), torch.float8_e4m3fn)
    copies = _plain_copy(codes, out), _plain_copy(scales, out_scales)

    def run() -> None:
        for copy in copies:
            copy()

    return run, out.nbytes + out_scales.nbytes


def _plain_copy(source: Tensor, target: Tensor) -> Callable[[], object]:
    """What is delivered as it is goes from file to file, or is a view: no operation of torch touches it."""
    import numpy as np
    import torch

    into, octets = (tensor.view(torch.uint8).numpy() for tensor in (target, source))
    return lambda: np.copyto(into, octets)


def _prepare_dequantize(shape: Shape) -> Prepared:
    import torch

    from trtllm_ct.base.schemes import Element
    from trtllm_ct.layouts.loops.dispatch import dequantize
    from trtllm_ct.layouts.packing import packed_words

    source, scaling = packed_words(4), _scaling(shape)
    packed = _random_words(source.packed_shape(shape))
    out = _warm(shape, torch.bfloat16)
    return lambda: dequantize(packed, source, Element.INT, shape, scaling, torch.bfloat16, out=out), out.nbytes


def _scaling(shape: Shape) -> Scaling:
    import torch

    from trtllm_ct.layouts.scales import Scaling

    return Scaling(scale=torch.rand(shape[0], shape[1] // _GROUP).to(torch.bfloat16), group_columns=_GROUP)


def _random_words(shape: tuple[int, ...]) -> Tensor:
    """Words in pages of the same size as those of the copy beside it."""
    import torch

    from trtllm_ct.layouts.loops.huge_pages import empty

    return empty(shape, torch.int32).random_(-(2**31), 2**31 - 1)


def _warm(shape: tuple[int, ...], dtype: Any) -> Tensor:
    """A buffer in use, of the kind of memory that results get."""
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

"""Direct conversion: convert modules from file to file with compiled loops, without torch.

The import of torch takes longer than the conversion of a small model. `is_direct` decides from headers alone whether a
module can be converted here: integer codes that a loop repacks or dequantizes, scales that are widened to float32,
tensors of ones, and tensors that are copied. That covers all modules of most checkpoints. The values are checked here
too, but faults are not reported: when a value is unusual, nothing is written, and the caller converts the module with
torch, where each case has its check and its error message.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.checkpoint.transfer import CHUNK_BYTES
from trtllm_ct.formats.base import Axis
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.formats.plain_codes import FLOAT8, INT8
from trtllm_ct.layouts.loops.dispatch import ScalingArrays, can_repack, dequantize_bytes, repack_bytes
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.plan.ops import Dequantize, Ones, Operation, Repack, WidenScale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.checkpoint.byte_reader import ByteReader
    from trtllm_ct.checkpoint.writer import TensorWriter
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.plan.plan import Delivery, ModulePlan
    from trtllm_ct.plan.stored import View

    ByteArray = NDArray[np.uint8]
    Chunks = Iterator[tuple[int, memoryview]]

__all__ = ["DirectConverter", "is_copied", "is_direct"]

_AS_STORED = frozenset({PACKED_INT, INT8, FLOAT8})
"""Formats whose stored tensors are the codes and scales themselves, if there is no zero point and no group index."""

_INPUT_SCALE = "input_scale"


class _Stored(NamedTuple):
    """A stored tensor: its dtype and shape, and its bytes as a view of the memory-mapped file."""

    spec: TensorSpec
    data: ByteArray


class _FloatFormat(NamedTuple):
    """The encoding of a float dtype.

    `word` is the numpy name of the unsigned integer of the same width, `infinity` and `one` are the bits of these
    values, and `largest` is the largest finite number.
    """

    word: str
    infinity: int
    one: int
    largest: float


_FLOAT_FORMATS = {
    DType.BF16: _FloatFormat("<u2", 0x7F80, 0x3F80, 0xFF * 2.0**120),
    DType.F16: _FloatFormat("<u2", 0x7C00, 0x3C00, 65504.0),
    DType.F32: _FloatFormat("<u4", 0x7F800000, 0x3F800000, 0xFFFFFF * 2.0**104),
}
_LARGEST_E4M3 = 448.0


def is_copied(delivery: Delivery, module: ModulePlan) -> bool:
    """Whether a delivered tensor has the same bytes as one contiguous range of a stored tensor."""
    source = delivery.operation.source
    return delivery.operation.same_bytes and source is not None and module.views[source].offset is not None


def is_direct(module: ModulePlan) -> bool:
    """Whether compiled loops and copies can make all delivered tensors of a module and check all its values."""
    weight = module.weight
    if weight is None or weight.format not in _AS_STORED or module.share is not None or module.transforms:
        return False
    if weight.has_zero_point or weight.group_index is not None or not _every_code_fits(weight):
        return False
    supported = {weight.codes, weight.scale, _INPUT_SCALE, *_shapes(weight), "bias"}
    return (
        all(local in supported and view.offset is not None for local, view in module.views.items())
        and all(module.views[local].spec.dtype in _FLOAT_FORMATS for local in _scales(weight, module.views))
        and all(is_copied(delivery, module) or _has_loop(delivery.operation, weight) for delivery in module.deliveries)
    )


def _every_code_fits(weight: StoredWeight) -> bool:
    """Whether every bit pattern of the container is a valid code, so that codes need no check."""
    packing = weight.packing
    return packing is None or (packing.dense and (packing != INT8_PLAIN or weight.args.num_bits == packing.bits))


def _shapes(weight: StoredWeight) -> list[str]:
    """Return the local names of the tensors that say the shape of a weight."""
    return [local for local, axis in weight.axes.items() if axis is Axis.SHAPE]


def _scales(weight: StoredWeight, stored: Iterable[str]) -> list[str]:
    """Return the local names of the scales in `stored`, the local names of a module's tensors."""
    return [local for local in stored if local in {weight.scale, _INPUT_SCALE}]


def _has_loop(operation: Operation, weight: StoredWeight) -> bool:
    """Whether an operation on a weight can run here."""
    is_supported = _SUPPORT_TESTS.get(type(operation))
    return is_supported is not None and is_supported(operation, weight)


def _is_supported_repack(operation: Operation, weight: StoredWeight) -> bool:
    return (
        isinstance(operation, Repack)
        and weight.packing is not None
        and weight.packing.bits <= operation.packing.bits
        and can_repack(weight.packing, operation.packing)
    )


def _is_supported_widening(operation: Operation, weight: StoredWeight) -> bool:
    """Whether the source is the weight's scale or `input_scale`, and has the delivered number of elements or one."""
    size = prod(weight.scale_shape) if operation.source is None else 1
    return operation.source in {None, _INPUT_SCALE} and size in {1, operation.result.numel}


def _is_supported_fill(operation: Operation, weight: StoredWeight) -> bool:  # noqa: ARG001 (see _SUPPORT_TESTS)
    return operation.result.dtype in _FLOAT_FORMATS


def _is_supported_dequantization(operation: Operation, weight: StoredWeight) -> bool:
    """Whether the delivered dtype has a known range and the delivered tensor the shape of the weight."""
    return operation.result.dtype in _FLOAT_FORMATS and operation.result.shape == weight.shape


_SUPPORT_TESTS: dict[type[Operation], Callable[[Operation, StoredWeight], bool]] = {
    Repack: _is_supported_repack,
    Dequantize: _is_supported_dequantization,
    WidenScale: _is_supported_widening,
    Ones: _is_supported_fill,
}
"""For each type of operation that can run here, the test whether an operation on a weight is supported."""


class DirectConverter:
    """Converts direct modules, one after another. Memory: one tile, and the scales of one weight."""

    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader
        self._tile_buffer: ByteArray | None = None

    def convert(self, module: ModulePlan, writer: TensorWriter | None) -> bool:
        """Write the delivered tensors of a module that are not copied, or only check its values if `writer` is None.

        Returns false, and writes nothing, when a value is unusual: the module must then be converted with torch.
        Raises `CatalogError` when a file has changed since it was cataloged.
        """
        weight = module.weight
        if weight is None:
            raise AssertionError("only quantized modules are direct")
        stored = {local: self._stored(view) for local, view in module.views.items()}
        operations = [delivery.operation for delivery in module.deliveries]
        if not (_are_values_usual(weight, stored) and all(_stays_finite(step, weight, stored) for step in operations)):
            return False
        for delivery in module.deliveries:
            if writer is not None and not is_copied(delivery, module):
                for begin, data in self._result_chunks(delivery.operation, weight, stored):
                    writer.write_bytes(delivery.name, data, begin)
        return True

    def _stored(self, view: View) -> _Stored:
        import numpy as np

        begin = (view.offset or 0) * view.spec.dtype.itemsize
        data = self._reader.read(view.sources[0], begin, view.spec.nbytes)
        return _Stored(view.spec, np.frombuffer(data, np.uint8))

    def _result_chunks(self, operation: Operation, weight: StoredWeight, stored: Mapping[str, _Stored]) -> Chunks:
        """Yield the delivered tensor of an operation in chunks: byte offset in the tensor, and bytes.

        The bytes of a chunk are valid only until the next chunk is requested.
        """
        if isinstance(operation, Repack):
            yield from self._repacked(operation, weight, stored[weight.codes].data)
        elif isinstance(operation, Dequantize):
            yield from self._dequantized(operation, weight, stored)
        elif isinstance(operation, WidenScale):
            yield 0, _as_bytes(_widened(stored[operation.source or weight.scale], operation.result.numel))
        else:
            yield 0, _as_bytes(_ones(operation.result))

    def _repacked(self, operation: Repack, weight: StoredWeight, codes: ByteArray) -> Chunks:
        """Yield the repacked codes, a few rows at a time, so that they stay in the processor's cache until written."""
        if weight.packing is None:
            raise AssertionError("float8 codes are copied")
        rows, columns = weight.shape
        stored_rows = codes.reshape(rows, -1)
        rows_per_line = -(-rows // operation.result.shape[0])  # A word of the delivered packing may hold several rows.
        for offset, line, tile in self._tiles(operation.result, 1):
            begin, end = line * rows_per_line, min((line + len(tile)) * rows_per_line, rows)
            repack_bytes(stored_rows[begin:end], weight.packing, operation.packing, (end - begin, columns), tile)
            yield offset, _as_bytes(tile)

    def _dequantized(self, operation: Dequantize, weight: StoredWeight, stored: Mapping[str, _Stored]) -> Chunks:
        """Yield the dequantized weight, a few rows at a time."""
        import numpy as np

        stored_scale = stored[weight.scale]
        scale = _widened(stored_scale, stored_scale.spec.numel).view(np.float32).reshape(weight.scale_shape)
        stored_rows = stored[weight.codes].data.reshape(weight.shape[0], -1)
        for offset, begin, tile in self._tiles(operation.result, weight.block_rows):
            end = begin + len(tile)
            scale_rows = slice(begin // weight.block_rows, -(-end // weight.block_rows))
            scaling = ScalingArrays(
                scale=scale if len(scale) == 1 else scale[scale_rows],
                block_rows=weight.block_rows,
                group_columns=weight.group_columns,
                # The product of a code and a 16-bit scale is exact in float32; with a float32 scale it may not be.
                in_float64=stored_scale.spec.dtype is DType.F32,
            )
            dtype = operation.result.dtype
            dequantize_bytes(stored_rows[begin:end], weight.packing, weight.element, scaling, dtype, tile)
            yield offset, _as_bytes(tile)

    def _tiles(self, spec: TensorSpec, unit: int) -> Iterator[tuple[int, int, ByteArray]]:
        """Yield an output buffer for every few lines of a delivered tensor: byte offset, first line, buffer.

        A line is one index of the tensor's first axis; the buffer has shape [lines, bytes]. Each tile but the last has
        a multiple of `unit` lines. All tiles share one buffer.
        """
        lines, line_bytes = spec.shape[0], spec.nbytes // spec.shape[0]
        step = max(1, CHUNK_BYTES // line_bytes // unit) * unit
        for line in range(0, lines, step):
            buffer = self._buffer(min(step, lines - line) * line_bytes)
            yield line * line_bytes, line, buffer.reshape(-1, line_bytes)

    def _buffer(self, nbytes: int) -> ByteArray:
        """Return the first `nbytes` of the shared buffer, which is replaced if it is too small."""
        import numpy as np

        if self._tile_buffer is None or len(self._tile_buffer) < nbytes:
            self._tile_buffer = np.empty(max(nbytes, CHUNK_BYTES), np.uint8)
        return self._tile_buffer[:nbytes]


def _are_values_usual(weight: StoredWeight, stored: Mapping[str, _Stored]) -> bool:
    """Whether `weight_shape` and the scales are valid, and all tensors are aligned to their items in memory."""
    for tensor in stored.values():
        if tensor.data.__array_interface__["data"][0] % tensor.spec.dtype.itemsize:
            return False
    for shape in (stored[local] for local in _shapes(weight)):
        if shape.data.view(f"<i{shape.spec.dtype.itemsize}").tolist() != list(weight.shape):
            return False
    # A row or group may have scale zero, since all its codes are then zeros; a whole tensor may not.
    zero_allowed = {weight.scale} if weight.scale_shape != (1, 1) else frozenset[str]()
    return all(
        _are_scales_valid(stored[local], zero_allowed=local in zero_allowed) for local in _scales(weight, stored)
    )


def _are_scales_valid(scale: _Stored, *, zero_allowed: bool) -> bool:
    """Whether all scales are finite and positive, or zero where `zero_allowed`.

    The bits are compared as unsigned integers: non-negative floats have the same order as their bits, and NaN and
    negative numbers have larger bits than infinity.
    """
    encoding = _FLOAT_FORMATS[scale.spec.dtype]
    bits = scale.data.view(encoding.word)
    return bits.size > 0 and int(bits.max()) < encoding.infinity and (zero_allowed or int(bits.min()) > 0)


def _stays_finite(operation: Operation, weight: StoredWeight, stored: Mapping[str, _Stored]) -> bool:
    """Whether the largest scale times the largest code does not overflow the delivered dtype."""
    if not isinstance(operation, Dequantize):
        return True
    scale = stored[weight.scale]
    largest_code = _LARGEST_E4M3 if weight.packing is None else 2.0 ** (weight.args.num_bits - 1)
    largest_scale = float(_widened(scale, scale.spec.numel).view("<f4").max())
    return largest_code * largest_scale <= _FLOAT_FORMATS[operation.result.dtype].largest


def _widened(scale: _Stored, size: int) -> NDArray[np.generic]:
    """Return `size` scales as float32 (as an array of float32 or of its bits); a single stored scale is repeated."""
    import numpy as np

    wide: NDArray[np.generic]
    if scale.spec.dtype is DType.BF16:
        wide = scale.data.view("<u2").astype(np.uint32) << 16
    elif scale.spec.dtype is DType.F16:
        wide = scale.data.view("<f2").astype(np.float32)
    else:
        wide = scale.data.view(np.float32)
    return wide if wide.size == size else np.repeat(wide, size)


def _ones(spec: TensorSpec) -> NDArray[np.generic]:
    import numpy as np

    encoding = _FLOAT_FORMATS[spec.dtype]
    return np.full(spec.numel, encoding.one, encoding.word)


def _as_bytes(array: NDArray[np.generic]) -> memoryview:
    """Return the memory of a contiguous array."""
    return array.reshape(-1).view("u1").data

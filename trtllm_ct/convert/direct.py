"""Modules that loops take from file to file without torch, whose import takes longer than converting a small model.

What headers can tell `is_direct` decides: integer codes that a loop repacks, scales that are widened, ones, and what is
copied anyway. That is all of most checkpoints. Values are looked at here too, but not judged: where one is out of the
ordinary nothing is written, and the module goes the way of all others, which knows what it means and how to say it.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.checkpoint.transfer import CHUNK_BYTES
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

    Octets = NDArray[np.uint8]
    Made = Iterator[tuple[int, memoryview]]

__all__ = ["DirectConverter", "is_copied", "is_direct"]

_AS_STORED = frozenset({PACKED_INT, INT8, FLOAT8})
"""Formats that decode to the stored tensors themselves, as long as there is neither zero point nor group index."""

_INPUT_SCALE = "input_scale"


class _Stored(NamedTuple):
    """A stored tensor: what it is, and its bytes as a window on its file."""

    spec: TensorSpec
    octets: Octets


class _Float(NamedTuple):
    """A float dtype: the integer of its width as numpy calls it, the bits of infinity and one, the largest number."""

    word: str
    infinity: int
    one: int
    largest: float


_FLOATS = {
    DType.BF16: _Float("<u2", 0x7F80, 0x3F80, 0xFF * 2.0**120),
    DType.F16: _Float("<u2", 0x7C00, 0x3C00, 65504.0),
    DType.F32: _Float("<u4", 0x7F800000, 0x3F800000, 0xFFFFFF * 2.0**104),
}
_LARGEST_E4M3 = 448.0


def is_copied(delivery: Delivery, module: ModulePlan) -> bool:
    """Whether a delivered tensor lies in a file as it is delivered."""
    source = delivery.operation.source
    return delivery.operation.same_bytes and source is not None and module.views[source].offset is not None


def is_direct(module: ModulePlan) -> bool:
    """Whether loops alone make what a module delivers, and know all values that have to be looked at."""
    weight = module.weight
    if weight is None or weight.format not in _AS_STORED or module.share is not None or module.transforms:
        return False
    if weight.has_zero_point or weight.group_index is not None or not _every_code_fits(weight):
        return False
    known = {weight.codes, weight.scale, _INPUT_SCALE, "weight_shape", "bias"}
    return (
        all(local in known and view.offset is not None for local, view in module.views.items())
        and all(module.views[local].spec.dtype in _FLOATS for local in _scales(weight, module.views))
        and all(is_copied(each, module) or _is_step(each.operation, weight) for each in module.deliveries)
    )


def _every_code_fits(weight: StoredWeight) -> bool:
    """Whether the container has no room for what no code can be."""
    packing = weight.packing
    return packing is None or (packing.dense and (packing != INT8_PLAIN or weight.args.num_bits == packing.bits))


def _scales(weight: StoredWeight, stored: Iterable[str]) -> list[str]:
    """The scales among the tensors of a module, by local name."""
    return [local for local in stored if local in {weight.scale, _INPUT_SCALE}]


def _is_step(operation: Operation, weight: StoredWeight) -> bool:
    test = _STEPS.get(type(operation))
    return test is not None and test(operation, weight)


def _is_known_repack(operation: Operation, weight: StoredWeight) -> bool:
    return (
        isinstance(operation, Repack)
        and weight.packing is not None
        and weight.packing.bits <= operation.packing.bits
        and can_repack(weight.packing, operation.packing)
    )


def _is_known_widening(operation: Operation, weight: StoredWeight) -> bool:
    """The scale of the weight itself, as it is or one for all rows; or that of its inputs, which is one."""
    size = prod(weight.scale_shape) if operation.source is None else 1
    return operation.source in {None, _INPUT_SCALE} and size in {1, operation.result.numel}


def _is_known_fill(operation: Operation, weight: StoredWeight) -> bool:  # noqa: ARG001 (one of several tests)
    return operation.result.dtype in _FLOATS


def _is_known_dequantizing(operation: Operation, weight: StoredWeight) -> bool:
    """Weights of a dtype whose range is known."""
    return operation.result.dtype in _FLOATS and operation.result.shape == weight.shape


_STEPS: dict[type[Operation], Callable[[Operation, StoredWeight], bool]] = {
    Repack: _is_known_repack,
    Dequantize: _is_known_dequantizing,
    WidenScale: _is_known_widening,
    Ones: _is_known_fill,
}
"""Operations that are known here, and which of them."""


class DirectConverter:
    """Converts direct modules, one after another; memory: a tile, and the scales of a weight."""

    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader
        self._tile: Octets | None = None

    def convert(self, module: ModulePlan, writer: TensorWriter | None) -> bool:
        """Deliver what is not copied, or only look at the values when there is no writer.

        Returns false, with nothing written, when a value is not as it should be. Raises `CatalogError` for a file that
        changed since.
        """
        weight = module.weight
        if weight is None:
            raise AssertionError("only quantized modules are direct")
        stored = {local: self._stored(view) for local, view in module.views.items()}
        operations = [delivery.operation for delivery in module.deliveries]
        if not (_is_ordinary(weight, stored) and all(_stays_finite(each, weight, stored) for each in operations)):
            return False
        for delivery in module.deliveries:
            if writer is not None and not is_copied(delivery, module):
                for begin, octets in self._made(delivery.operation, weight, stored):
                    writer.write_bytes(delivery.name, octets, begin)
        return True

    def _stored(self, view: View) -> _Stored:
        import numpy as np

        begin = (view.offset or 0) * view.spec.dtype.itemsize
        octets = self._reader.read(view.sources[0], begin, view.spec.nbytes)
        return _Stored(view.spec, np.frombuffer(octets, np.uint8))

    def _made(self, operation: Operation, weight: StoredWeight, stored: Mapping[str, _Stored]) -> Made:
        """What an operation delivers: places in it, and the bytes from there on, valid until the next ones."""
        if isinstance(operation, Repack):
            yield from self._repacked(operation, weight, stored[weight.codes].octets)
        elif isinstance(operation, Dequantize):
            yield from self._dequantized(operation, weight, stored)
        elif isinstance(operation, WidenScale):
            yield 0, _memory(_widened(stored[operation.source or weight.scale], operation.result.numel))
        else:
            yield 0, _memory(_ones(operation.result))

    def _repacked(self, operation: Repack, weight: StoredWeight, octets: Octets) -> Made:
        """Codes, some rows at a time; what is made stays in the processor's cache until it is written."""
        if weight.packing is None:
            raise AssertionError("float8 codes are copied")
        rows, columns = weight.shape
        stored_lines, rows_in_one = octets.reshape(rows, -1), -(-rows // operation.result.shape[0])
        for place, line, tile in self._tiles(operation.result, 1):
            begin, end = line * rows_in_one, min((line + len(tile)) * rows_in_one, rows)
            repack_bytes(stored_lines[begin:end], weight.packing, operation.packing, (end - begin, columns), tile)
            yield place, _memory(tile)

    def _dequantized(self, operation: Dequantize, weight: StoredWeight, stored: Mapping[str, _Stored]) -> Made:
        """Plain weights, some rows at a time."""
        import numpy as np

        own = stored[weight.scale]
        scale = _widened(own, own.spec.numel).view(np.float32).reshape(weight.scale_shape)
        lines = stored[weight.codes].octets.reshape(weight.shape[0], -1)
        for place, begin, tile in self._tiles(operation.result, weight.block_rows):
            end = begin + len(tile)
            rows_of_scales = slice(begin // weight.block_rows, -(-end // weight.block_rows))
            scaling = ScalingArrays(
                scale=scale if len(scale) == 1 else scale[rows_of_scales],
                block_rows=weight.block_rows,
                group_columns=weight.group_columns,
                # A code times a scale of 16 bits is exact in float32.
                in_float64=own.spec.dtype is DType.F32,
            )
            dequantize_bytes(lines[begin:end], weight.packing, weight.element, scaling, operation.result.dtype, tile)
            yield place, _memory(tile)

    def _tiles(self, spec: TensorSpec, unit: int) -> Iterator[tuple[int, int, Octets]]:
        """Room for some lines of a tensor at a time, a multiple of `unit`: place of the first byte, first line, lines.

        It is the same room every time.
        """
        lines, line_bytes = spec.shape[0], spec.nbytes // spec.shape[0]
        step = max(1, CHUNK_BYTES // line_bytes // unit) * unit
        for line in range(0, lines, step):
            octets = self._room(min(step, lines - line) * line_bytes)
            yield line * line_bytes, line, octets.reshape(-1, line_bytes)

    def _room(self, nbytes: int) -> Octets:
        """So many bytes, the same ones every time unless they are too few."""
        import numpy as np

        if self._tile is None or len(self._tile) < nbytes:
            self._tile = np.empty(max(nbytes, CHUNK_BYTES), np.uint8)
        return self._tile[:nbytes]


def _is_ordinary(weight: StoredWeight, stored: Mapping[str, _Stored]) -> bool:
    """Whether `weight_shape` and the scales say nothing that has to be thought about, and all elements lie aligned."""
    if any(each.octets.__array_interface__["data"][0] % each.spec.dtype.itemsize for each in stored.values()):
        return False
    shape = stored.get("weight_shape")
    if shape is not None and shape.octets.view(f"<i{shape.spec.dtype.itemsize}").tolist() != list(weight.shape):
        return False
    many = {weight.scale} if weight.scale_shape != (1, 1) else frozenset[str]()
    return all(_is_good(stored[local], zero_allowed=local in many) for local in _scales(weight, stored))


def _is_good(scale: _Stored, *, zero_allowed: bool) -> bool:
    """Whether all scales are finite and not negative: of such floats the bits compare as the numbers do."""
    kind = _FLOATS[scale.spec.dtype]
    bits = scale.octets.view(kind.word)
    return bits.size > 0 and int(bits.max()) < kind.infinity and (zero_allowed or int(bits.min()) > 0)


def _stays_finite(operation: Operation, weight: StoredWeight, stored: Mapping[str, _Stored]) -> bool:
    """Whether no number can come out that the delivered dtype does not have: by the largest scale and code."""
    if not isinstance(operation, Dequantize):
        return True
    own = stored[weight.scale]
    code = _LARGEST_E4M3 if weight.packing is None else 2.0 ** (weight.args.num_bits - 1)
    largest = float(_widened(own, own.spec.numel).view("<f4").max())
    return code * largest <= _FLOATS[operation.result.dtype].largest


def _widened(scale: _Stored, size: int) -> NDArray[np.generic]:
    """`size` scales as float32, bit for bit; one may stand for all."""
    import numpy as np

    wide: NDArray[np.generic]
    if scale.spec.dtype is DType.BF16:
        wide = scale.octets.view("<u2").astype(np.uint32) << 16
    elif scale.spec.dtype is DType.F16:
        wide = scale.octets.view("<f2").astype(np.float32)
    else:
        wide = scale.octets.view(np.float32)
    return wide if wide.size == size else np.repeat(wide, size)


def _ones(spec: TensorSpec) -> NDArray[np.generic]:
    import numpy as np

    kind = _FLOATS[spec.dtype]
    return np.full(spec.numel, kind.one, kind.word)


def _memory(array: NDArray[np.generic]) -> memoryview:
    """The bytes of an array whose elements lie one behind the other."""
    return array.reshape(-1).view("u1").data

"""`run_unit`: read, check, convert and write one unit of a conversion, in a worker thread or worker process.

`is_done` says whether an earlier run did so.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CheckpointError
from trtllm_ct.checkpoint.copies import Copied, stretches
from trtllm_ct.checkpoint.guarded_maps import guarded_maps
from trtllm_ct.checkpoint.open_files import OpenFiles
from trtllm_ct.checkpoint.output_files import copies_are_intact, pieces_are_intact
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.checkpoint.staged import Staged
from trtllm_ct.checkpoint.windows import WINDOW_BYTES
from trtllm_ct.checkpoint.write_plan import merged_ranges
from trtllm_ct.checkpoint.writer import TensorWriter
from trtllm_ct.convert.journal import UnitRecord
from trtllm_ct.convert.source_files import sample_hash
from trtllm_ct.convert.tiles import TileReader, converted_tensors, is_copied
from trtllm_ct.pipeline.fused_scalars import FusedScalars
from trtllm_ct.pipeline.mapper import ModuleMapper
from trtllm_ct.pipeline.payload import has_values_to_check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.convert.job import Conversion
    from trtllm_ct.convert.units import Unit
    from trtllm_ct.plan.plan import Delivery, ModulePlan

__all__ = ["UnitResult", "is_done", "run_unit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """The result of a unit: its record, and the errors that its values caused."""

    record: UnitRecord
    errors: tuple[CheckpointError, ...] = ()


def is_done(conversion: Conversion, number: int, earlier: UnitRecord) -> bool:
    """Whether an earlier run has written the unit `number`, of which `earlier` is the record.

    The files must still hold the bytes of the record, and it must be made from what the source still holds. Of a source
    far away nothing is read. Raises `CatalogError` when a source file changed.
    """
    unit = conversion.units[number]
    if _is_staged(conversion):
        return _is_intact(conversion, unit, earlier)
    with _unchanged_source(conversion, unit):
        return earlier.sample == _sample(conversion, unit) and _is_intact(conversion, unit, earlier)


def run_unit(conversion: Conversion, number: int, *, ahead: int = 0, writes: bool = True) -> UnitResult:
    """Convert the unit `number`, or only check its values when `writes` is false.

    The stored tensors of this unit and of the unit `ahead` positions later are prefetched from disk.
    Memory: one tile, and the tensors that can't be tiled. Raises `OSError` when files can't be written, `CatalogError`
    when a source file changed, and `HubError` when one can't be fetched.
    """
    unit = conversion.units[number]
    conversion.shards.lend(number)
    with _unchanged_source(conversion, unit):
        return _converted(conversion, unit, _sample(conversion, unit), ahead=ahead, writes=writes)


def _converted(conversion: Conversion, unit: Unit, sample: str, *, ahead: int, writes: bool) -> UnitResult:
    """Convert a unit, whose source has the hash `sample`."""
    number = unit.number
    with (
        TensorReader(conversion.checkpoint.catalog, in_windows=True) as reader,
        TensorWriter(conversion.job.files, conversion.write_plan, conversion.locks) as writer,
    ):
        following = conversion.units[number + ahead : number + ahead + 1] if ahead else ()
        to_prefetch = [module for needed in (unit, *following) for module in conversion.modules(needed)]
        reader.prefetch(run for module in to_prefetch for run in module.runs)
        if writes:
            _copy(conversion, unit, writer)
        converter = _UnitConverter(conversion, reader, writer if writes else None)
        for module in conversion.modules(unit):
            converter.convert(module)
        record = UnitRecord(unit=number, pieces=tuple(writer.pieces), sample=sample, seen=tuple(converter.seen))
    return UnitResult(record=record, errors=tuple(converter.errors))


@contextmanager
def _unchanged_source(conversion: Conversion, unit: Unit) -> Iterator[None]:
    """Raise `CatalogError` if a source file of the unit changed since the plan was made, or changes inside.

    The error comes before any other: zeros in place of lost bytes look like bad values.
    """
    files = conversion.files_of(unit)
    with guarded_maps([file.path for file in files]) as damaged:
        try:
            yield
        finally:
            for file in files:
                file.require_same(conversion.checkpoint.directory)
                if file.path in damaged:
                    raise file.unreadable()


def _is_staged(conversion: Conversion) -> bool:
    """Whether the source's files are fetched when they are needed, and removed later: the journal sums copies too."""
    return isinstance(conversion.checkpoint.source, Staged)


def _sample(conversion: Conversion, unit: Unit) -> str:
    """Return a hash of samples of what a unit is made from."""
    runs = [run for module in conversion.modules(unit) for run in module.runs]
    return sample_hash(conversion.checkpoint.catalog, runs)


def _copied(conversion: Conversion, unit: Unit) -> list[Copied]:
    """Return the tensors of a unit that are copied from file to file; rows of stacked ones have no place of their own.

    The journal does not name them, unless the source is removed: the plan says which bytes of the source they are.
    """
    tensors, stacks = conversion.checkpoint.catalog.tensors, conversion.write_plan.stacks
    copied = []
    for module in conversion.modules(unit):
        for piece in module.pieces or (module,):
            for delivery in piece.deliveries:
                if is_copied(delivery, piece) and delivery.name not in stacks:
                    stored, first = _stored_bytes(delivery, piece)
                    copied.append(Copied(delivery.name, tensors[stored], first))
    return copied


def _stored_bytes(delivery: Delivery, module: ModulePlan) -> tuple[str, int]:
    """Return the name of the stored tensor that a delivered one is copied from, and the first of the copied bytes."""
    view = module.views[delivery.operation.source or ""]
    return view.sources[0], (view.offset or 0) * view.spec.dtype.itemsize


def _copy(conversion: Conversion, unit: Unit, writer: TensorWriter) -> None:
    """Copy the tensors of a unit whose bytes do not change."""
    with OpenFiles(conversion.checkpoint.catalog.directory) as sources:
        writer.copy(_copied(conversion, unit), sources, recorded=_is_staged(conversion))


def _is_intact(conversion: Conversion, unit: Unit, record: UnitRecord) -> bool:
    """Whether the pieces of a record and what is copied are exactly the places of a unit's tensors, and still there."""
    names = [delivery.name for module in conversion.modules(unit) for delivery in module.deliveries]
    copied = [] if _is_staged(conversion) else _copied(conversion, unit)
    copies = stretches(copied, conversion.write_plan.places)
    ranges = [(piece.file, piece.offset, piece.offset + piece.nbytes) for piece in record.pieces]
    ranges += [(stretch.file, stretch.offset, stretch.offset + stretch.nbytes) for stretch in copies]
    if sum(end - begin for _, begin, end in ranges) != unit.nbytes:
        return False
    if merged_ranges(ranges) != conversion.write_plan.ranges(names):
        return False
    with OpenFiles(conversion.checkpoint.catalog.directory) as sources:
        return pieces_are_intact(conversion.job.files, record.pieces) and copies_are_intact(
            conversion.job.files, copies, sources
        )


@dataclass(slots=True)
class _UnitConverter:
    """Converts the modules of one unit; without a writer it only checks their values.

    `errors` and `seen` collect the errors and the warnings (pairs of module name and text) of all modules.
    """

    conversion: Conversion
    reader: TensorReader
    writer: TensorWriter | None
    errors: list[CheckpointError] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    fused_scalars: FusedScalars = field(default_factory=FusedScalars)
    mapper: ModuleMapper = field(init=False)
    tile_reader: TileReader = field(init=False)

    def __post_init__(self) -> None:
        # The callback must not refer to `self`: the reference cycle would keep files open until the garbage collector
        # runs, and the collector is paused during a conversion.
        seen = self.seen
        self.tile_reader = TileReader(self.reader)
        self.mapper = ModuleMapper(on_warning=lambda module, warning: seen.append((module, warning)))

    def convert(self, module: ModulePlan) -> None:
        """Convert and write one module; if its values are wrong, keep the error and write nothing more."""
        for piece in module.pieces or (module,):
            self._convert(piece)

    def _convert(self, module: ModulePlan) -> None:
        """Convert and write a module without pieces, or one piece."""
        try:
            copied = [delivery for delivery in module.deliveries if is_copied(delivery, module)]
            if self.writer is not None:
                for delivery in copied:
                    if delivery.name in self.conversion.write_plan.stacks:
                        self._put_rows(self.writer, module, delivery)
            if has_values_to_check(module) or len(copied) < len(module.deliveries):
                self._convert_values(module)
        except CheckpointError as error:
            self.errors.append(error.with_traceback(None))  # The frames of a traceback keep files open.
            self.writer = None
            return
        if self.writer is not None:
            names = [delivery.name for delivery in module.deliveries]
            missing = [name for name in names if not self.writer.is_complete(name)]
            if missing:
                raise AssertionError(f"{module.name}: {missing} were not written in full")

    def _put_rows(self, writer: TensorWriter, module: ModulePlan, delivery: Delivery) -> None:
        """Write a tensor whose rows are lines of a stacked one, a window at a time."""
        stored, first = _stored_bytes(delivery, module)
        for begin in range(0, delivery.spec.nbytes or 1, WINDOW_BYTES):
            nbytes = min(WINDOW_BYTES, delivery.spec.nbytes - begin)
            writer.write_bytes(delivery.name, self.reader.read_bytes(stored, first + begin, nbytes), begin)

    def _convert_values(self, module: ModulePlan) -> None:
        """Check the values of a module, and convert and write all tensors that are not copied."""
        stored = {run.name: self.reader.read(run.name, run.begin, run.end) for run in module.runs}
        local = self.mapper.checked(module, stored)
        scalars = {}
        for name, tensor, row in converted_tensors(module, local, self.mapper, self.tile_reader):
            if row is None and tensor.elements.size == 1:
                scalars[name] = tensor
            if self.writer is not None:
                self.writer.write(name, tensor, row)
        self.fused_scalars.check(module, scalars)

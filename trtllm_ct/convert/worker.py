"""One unit of a conversion: read, checked, converted and written by one worker, in a thread or a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CheckpointError
from trtllm_ct.checkpoint.byte_reader import ByteReader
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.checkpoint.writer import TensorWriter, pieces_are_there
from trtllm_ct.convert.direct import DirectConverter, is_copied, is_direct
from trtllm_ct.convert.journal import UnitRecord
from trtllm_ct.convert.tiles import made_tensors
from trtllm_ct.pipeline.fused_scalars import FusedScalars
from trtllm_ct.pipeline.mapper import CompressedTensorsWeightMapper
from trtllm_ct.pipeline.payload import looks_at

if TYPE_CHECKING:
    from trtllm_ct.convert.job import Conversion
    from trtllm_ct.convert.units import Unit
    from trtllm_ct.plan.plan import Delivery, ModulePlan

__all__ = ["UnitResult", "run_unit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """What became of a unit: its record, or what is wrong with its values.

    `resumed` says that an earlier run had written it.
    """

    record: UnitRecord
    errors: tuple[CheckpointError, ...] = ()
    resumed: bool = False


def run_unit(
    conversion: Conversion, number: int, *, earlier: UnitRecord | None = None, ahead: int = 0, writes: bool = True
) -> UnitResult:
    """Convert a unit, or only check its values when `writes` is false.

    `earlier` is what an earlier run says to have written: where it is found in the files, nothing is left to do. The
    unit `ahead` places further on is asked of the disk meanwhile. Memory: one tile, and what can't be tiled.
    Raises `OSError` when files can't be written.
    """
    unit = conversion.units[number]
    if earlier is not None and _is_whole(unit, earlier) and pieces_are_there(conversion.job.files, earlier.pieces):
        return UnitResult(record=earlier, resumed=True)
    with (
        TensorReader(conversion.checkpoint.catalog) as reader,
        TensorWriter(conversion.job.files, conversion.write_plan, conversion.locks) as writer,
    ):
        following = conversion.units[number + ahead : number + ahead + 1] if ahead else ()
        needed = [module for each in (unit, *following) for module in conversion.modules(each)]
        reader.prefetch(run for module in needed for run in module.runs)
        work = _Work(conversion, reader, writer if writes else None)
        for module in conversion.modules(unit):
            work.convert(module)
        record = UnitRecord(unit=number, pieces=tuple(writer.pieces), seen=tuple(work.seen))
    return UnitResult(record=record, errors=tuple(work.errors))


def _is_whole(unit: Unit, record: UnitRecord) -> bool:
    return sum(piece.nbytes for piece in record.pieces) == unit.nbytes


@dataclass(slots=True)
class _Work:
    """What the modules of one unit share; without a writer their values are only checked."""

    conversion: Conversion
    reader: TensorReader
    writer: TensorWriter | None
    errors: list[CheckpointError] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    fused_scalars: FusedScalars = field(default_factory=FusedScalars)
    mapper: CompressedTensorsWeightMapper = field(init=False)
    octets: ByteReader = field(init=False)
    direct: DirectConverter = field(init=False)

    def __post_init__(self) -> None:
        self.octets = ByteReader(self.conversion.checkpoint.catalog)
        self.direct = DirectConverter(self.octets)
        # Not by way of `self`: a cycle would live, and hold files, until the collector runs, which is paused.
        seen = self.seen
        self.mapper = CompressedTensorsWeightMapper(
            device=self.conversion.job.device, on_warning=lambda module, warning: seen.append((module, warning))
        )

    def convert(self, module: ModulePlan) -> None:
        """Deliver one module; what is wrong with its values is gathered, and nothing more is written then."""
        try:
            copied = [delivery for delivery in module.deliveries if is_copied(delivery, module)]
            if self.writer is not None:
                for delivery in copied:
                    self._copy(self.writer, module, delivery)
            needs_more = looks_at(module) or len(copied) < len(module.deliveries)
            if needs_more and not self._convert_directly(module):
                self._make(module)
        except CheckpointError as error:
            self.errors.append(error.with_traceback(None))  # whose frames hold files too
            self.writer = None
            return
        if self.writer is not None:
            missing = [each.name for each in module.deliveries if not self.writer.is_complete(each.name)]
            if missing:
                raise AssertionError(f"{module.name}: {missing} were not written in full")

    def _copy(self, writer: TensorWriter, module: ModulePlan, delivery: Delivery) -> None:
        """Bytes from file to file."""
        view = module.views[delivery.operation.source or ""]
        begin = (view.offset or 0) * view.spec.dtype.itemsize
        writer.write_bytes(delivery.name, self.octets.read(view.sources[0], begin, view.spec.nbytes))

    def _convert_directly(self, module: ModulePlan) -> bool:
        """Whether that could be done, and was."""
        on_cpu = self.conversion.job.device == "cpu"
        return on_cpu and is_direct(module) and self.direct.convert(module, self.writer)

    def _make(self, module: ModulePlan) -> None:
        """Values checked and converted."""
        stored = {run.name: self.reader.read(run.name, run.begin, run.end) for run in module.runs}
        local = self.mapper.checked(module, stored)
        scalars = {}
        for name, tensor, row in made_tensors(module, local, self.mapper):
            if row is None and tensor.numel() == 1:
                scalars[name] = tensor
            if self.writer is not None:
                self.writer.write(name, tensor.cpu(), row)
        self.fused_scalars.check(module, scalars)

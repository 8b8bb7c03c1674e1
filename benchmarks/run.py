"""`run_bench`: write checkpoints, time every case and its peers on them, and compare with the target figures."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases import (
    CASES,
    DIRECTORY,
    KERNEL_ROWS,
    KERNEL_SHAPE,
    NO_SHAPE,
    PEERS,
    SWEEPS,
    Case,
    Place,
    Sweep,
    Table,
    convert_job,
    kernels_job,
)
from benchmarks.figures import find
from benchmarks.kernels import KERNELS
from benchmarks.machine import describe_machine
from benchmarks.measure import measure_in_turn, run_job
from benchmarks.results import Clock, Measurement, Point, Report, Sample, Series, Side
from benchmarks.shapes import DEFAULT_SHAPES, SHAPES
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from benchmarks.shapes import Shape

__all__ = ["run_bench"]

DEFAULT_RUNS = 5
_KERNEL_SAMPLES = 5
"""Samples of a kernel per requested run: a sample takes only milliseconds, and its time varies more."""

OnStep = Callable[[str], None]


def run_bench(
    directory: str | Path | None = None,
    *,
    shapes: Sequence[str] = (),
    against: Sequence[str] = tuple(PEERS),
    tables: Sequence[str] = tuple(Table),
    runs: int = DEFAULT_RUNS,
    sweep: bool = False,
    on_step: OnStep = lambda _step: None,
) -> Report:
    """Time the cases of `tables` on the checkpoint `directory`, or on synthetic checkpoints.

    `shapes` names the synthetic checkpoints (1b if empty). `against` names the peers; peers that are not installed are
    left out and named in the report. `runs` is the number of runs of each side. `sweep` adds runs at four sizes for
    each plot. `on_step` is called with a text before each step. Checkpoints and outputs are written to a temporary
    directory, which is removed at the end. A side that fails is reported as failed.

    Raises `UsageError` before anything is written.
    """
    _require_known("--shape", shapes, SHAPES)
    _require_known("--against", against, PEERS)
    _require_known("--table", tables, tuple(Table))
    _require_runs(runs)
    if directory is not None and shapes:
        raise _both_given()
    names = () if directory is not None else tuple(shapes) or DEFAULT_SHAPES
    skipped = {name: f"{PEERS[name].missing} not installed" for name in against if PEERS[name].missing}
    with tempfile.TemporaryDirectory(prefix="trtllm-ct-bench-") as work:
        bench = _Bench(
            work=Path(work),
            tables=frozenset(Table(table) for table in tables),
            against=tuple(name for name in against if name not in skipped),
            skipped=skipped,
            runs=runs,
            on_step=on_step,
        )
        bench.require_room([SHAPES[name] for name in names])
        measurements = [*bench.without_checkpoint()]
        if directory is not None:
            measurements += bench.on_checkpoint(Path(directory), DIRECTORY)
        for name in names:
            with bench.written(SHAPES[name]) as source:
                measurements += bench.on_checkpoint(source, name)
        series = tuple(bench.series()) if sweep else ()
    return Report(
        machine=describe_machine(),
        runs=runs,
        skipped=skipped,
        measurements=tuple(measurements),
        findings=find(measurements, bench.tables, names),
        series=series,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """The steps of one benchmark, and the options that they share."""

    work: Path
    tables: frozenset[Table]
    against: tuple[str, ...]
    skipped: Mapping[str, str]
    runs: int
    on_step: OnStep

    def without_checkpoint(self) -> Iterator[Measurement]:
        """Measure the kernels and the cases that need no checkpoint.

        Before that, all loops are compiled by numba, so that later processes only load the machine code.
        """
        if self.tables - {Table.HEADERS}:
            self._compile()
        if Table.KERNELS in self.tables:
            yield from self._kernels(KERNEL_SHAPE[0])
        yield from self._measured(self._cases(NO_SHAPE), NO_SHAPE, _no_checkpoint(self.work))

    def on_checkpoint(self, source: Path, shape: str) -> Iterator[Measurement]:
        """Measure all cases of this shape on one checkpoint."""
        cases = self._cases(shape)
        if cases:
            yield from self._measured(cases, shape, self._place(source, cases))

    def series(self) -> Iterator[Series]:
        """Measure the cases of `SWEEPS` and the kernels at four sizes, for the plots of the tables."""
        points_by_line: dict[tuple[Table, str], list[Point]] = defaultdict(list)
        if Table.KERNELS in self.tables:
            for rows in KERNEL_ROWS:
                _add_points(points_by_line, Table.KERNELS, _with_one_memcpy(self._kernels(rows)))
        for name, layers, sweeps in _by_checkpoint(self.tables):
            with self.written(SHAPES[name].with_layers(layers)) as source:
                for sweep in sweeps:
                    case = _swept_case(sweep)
                    _add_points(points_by_line, case.table, self._measured([case], name, self._place(source, [case])))
        for (table, label), points in points_by_line.items():
            yield Series(table=str(table), label=label, points=tuple(points))

    @contextmanager
    def written(self, shape: Shape) -> Iterator[Path]:
        """Write a synthetic checkpoint and yield its directory, which is removed at the end."""
        self.on_step(f"writing {shape.name} with {shape.layers} layers")
        source = self.work / "source"
        source.mkdir()
        try:
            shape.write(source)
            yield source
        finally:
            shutil.rmtree(source)

    def require_room(self, shapes: Sequence[Shape]) -> None:
        """Raise `UsageError` when the disk is too small for the largest checkpoint and its converted output."""
        converts = Table.CONVERT in self.tables
        dense = next(case.shapes for case in CASES if case.name == "convert-dense")
        outputs = {shape.name: shape.dense_bytes if shape.name in dense else shape.disk_bytes for shape in shapes}
        needed = max((shape.disk_bytes + converts * outputs[shape.name] for shape in shapes), default=0)
        free = shutil.disk_usage(self.work).free
        if free < needed:
            raise UsageError(
                Fault(
                    where=str(self.work.parent),
                    expected=f"room for {needed} bytes",
                    found=f"{free} bytes free",
                    remedy="Set TMPDIR to a folder on a larger disk, or choose a smaller --shape.",
                )
            )

    def _cases(self, shape: str) -> list[Case]:
        return [case for case in CASES if shape in case.shapes and case.table in self.tables]

    def _measured(self, cases: Sequence[Case], shape: str, place: Place) -> Iterator[Measurement]:
        for case in cases:
            peers = {name: make for name, make in case.peers.items() if name in self.against}
            self.on_step(" ".join(part for part in (case.title, shape, *(f"against {name}" for name in peers)) if part))
            jobs = {"ours": case.ours(place), **{name: make(place) for name, make in peers.items()}}
            source = place.source if case.shapes != {NO_SHAPE} else None
            ours, *peer_sides = measure_in_turn(jobs, case.clock, 1 if case.once else self.runs, source)
            yield Measurement(
                case=case.name,
                shape=shape,
                size=place.tensors if case.table is Table.HEADERS else place.stored_bytes,
                moved_bytes=place.bytes_of.get(case.moves),
                ours=ours,
                peers=tuple(peer_sides),
                skipped={name: reason for name, reason in self.skipped.items() if name in case.peers},
            )

    def _place(self, source: Path, cases: Sequence[Case]) -> Place:
        catalog = Catalog.from_directory(source)
        targets = {case.moves for case in cases if case.moves}
        return Place(
            source=source,
            work=self.work,
            tensors=len(catalog.tensors),
            stored_bytes=sum(tensor.spec.nbytes for tensor in catalog.tensors.values()),
            bytes_of={target: plan_checkpoint(source, target).delivered_bytes for target in targets},
        )

    def _compile(self) -> None:
        """Run every compiled loop once, on a small checkpoint, so that its machine code is cached on disk."""
        with self.written(SHAPES["tiny"]) as source:
            place = replace(_no_checkpoint(self.work), source=source)
            for to in ("modelopt", "dense"):
                job = convert_job(to)(place)
                run_job(job)
                shutil.rmtree(place.work / "out")

    def _kernels(self, rows: int) -> Iterator[Measurement]:
        columns = KERNEL_SHAPE[1]
        self.on_step(f"kernels against memcpy, {rows} x {columns}")
        timed = run_job(kernels_job(rows, columns, self.runs * _KERNEL_SAMPLES)).facts["kernels"]
        for kernel in KERNELS:
            timing = timed[kernel.name]
            yield Measurement(
                case=kernel.name,
                shape=NO_SHAPE,
                size=timing["bytes"],
                moved_bytes=timing["bytes"],
                ours=_loop_side("ours", timing["ours"]),
                peers=(_loop_side("memcpy", timing["memcpy"]),),
            )


def _with_one_memcpy(kernels: Iterable[Measurement]) -> Iterator[Measurement]:
    """Yield the kernels, with the peer memcpy only for the first: the lines of memcpy would overlap in a plot."""
    for number, kernel in enumerate(kernels):
        yield replace(kernel, peers=()) if number else kernel


def _loop_side(name: str, seconds: Sequence[float]) -> Side:
    return Side(name=name, clock=Clock.LOOP, samples=tuple(Sample(call_seconds=value) for value in seconds))


def _no_checkpoint(work: Path) -> Place:
    return Place(source=work, work=work, tensors=0, stored_bytes=0, bytes_of={})


def _add_points(
    points_by_line: dict[tuple[Table, str], list[Point]], table: Table, measurements: Iterable[Measurement]
) -> None:
    """Add a point for each side that was measured; a line is known by its table and label."""
    for measurement in measurements:
        for side in (measurement.ours, *measurement.peers):
            if side.seconds is not None:
                label = measurement.case if side.name == "ours" else _peer_label(measurement, side)
                points_by_line[table, label].append(Point(size=measurement.size, seconds=side.seconds))


def _peer_label(measurement: Measurement, side: Side) -> str:
    return side.name if side.clock is Clock.LOOP else f"{side.name} beside {measurement.case}"


def _by_checkpoint(tables: frozenset[Table]) -> Iterator[tuple[str, int, list[Sweep]]]:
    """Yield the sweeps of these tables, grouped by shape and number of layers: each checkpoint is written only once."""
    grouped: dict[tuple[str, int], list[Sweep]] = defaultdict(list)
    for sweep in SWEEPS:
        if _swept_case(sweep).table in tables:
            for layers in sweep.layers:
                grouped[sweep.shape, layers].append(sweep)
    for (name, layers), sweeps in sorted(grouped.items()):
        yield name, layers, sweeps


def _swept_case(sweep: Sweep) -> Case:
    """Return the case of a sweep, with only the peers that are plotted."""
    case = next(case for case in CASES if case.name == sweep.case)
    return replace(case, peers={name: make for name, make in case.peers.items() if name in sweep.peers})


def _require_known(option: str, names: Sequence[str], known: Mapping[str, object] | Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(
                Fault(
                    where=option,
                    expected=", ".join(known),
                    found=repr(name),
                    remedy="Give one of these, or several with commas between them.",
                )
            )


def _require_runs(runs: int) -> None:
    if runs < 1:
        raise UsageError(
            Fault(where="--runs", expected="at least 1", found=str(runs), remedy="Leave it out for 5 runs.")
        )


def _both_given() -> UsageError:
    return UsageError(
        Fault(
            where="--shape",
            expected="a directory or shapes",
            found="both",
            remedy="Leave --shape out to measure on your own checkpoint.",
        )
    )

"""`run_units`: run all units of a conversion in an executor, record them in the journal and collect their faults."""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, wait
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from trtllm_ct.convert.worker import UnitResult, is_done, run_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from trtllm_ct.base.errors import CheckpointError
    from trtllm_ct.convert.executors import Pool
    from trtllm_ct.convert.job import Conversion
    from trtllm_ct.convert.journal import Journal

__all__ = ["run_units"]

logger = logging.getLogger("trtllm_ct")

_T = TypeVar("_T")

_IN_FLIGHT = 4
"""Units that are submitted at a time for each worker.

Enough that no worker waits for its next unit, and few enough that a fault can still keep most units from being written.
"""


def run_units(conversion: Conversion, pool: Pool, journal: Journal, progress: Callable[[int], object]) -> int:
    """Convert every unit that no earlier run has converted; return the bytes that an earlier run had converted.

    `progress` is called with the delivered bytes of each finished unit. After a fault, the remaining units are only
    checked and not written, so that all faults are reported together, independent of the order in which units run.

    Raises a `CheckpointError` with all faults in the values of the checkpoint. Any other error of a worker is raised at
    once, after the running units have ended.
    """
    coordinator = _Coordinator(conversion, pool, journal, progress)
    coordinator.run()
    coordinator.log_warnings()
    coordinator.raise_faults()
    return coordinator.resumed_bytes


class _Coordinator:
    """Submits units and collects their results; used from one thread only."""

    def __init__(self, conversion: Conversion, pool: Pool, journal: Journal, progress: Callable[[int], object]) -> None:
        self._conversion = conversion
        self._pool = pool
        self._journal = journal
        self._progress = progress
        known = range(len(conversion.units))
        self._earlier_records = {number: record for number, record in journal.records.items() if number in known}
        self._results: dict[int, UnitResult] = {}
        self._no_fault_yet = True
        self.resumed_bytes = 0

    def run(self) -> None:
        """Look which units an earlier run has converted, and convert the others."""
        self._each(self._earlier_records, self._submit_check, self._take_check)
        left = [unit.number for unit in self._conversion.units if unit.number not in self._results]
        with self._conversion.shards.opened(left):
            self._each(left, self._submit, self._process_result)

    def _each(
        self, numbers: Iterable[int], submit: Callable[[int], Future[_T]], take: Callable[[int, _T], None]
    ) -> None:
        """Submit units, a few at a time, and take their results as they complete, in any order."""
        waiting = iter(numbers)
        running: dict[Future[_T], int] = {}
        max_running = _IN_FLIGHT * self._pool.workers
        try:
            while True:
                for number in islice(waiting, max_running - len(running)):
                    running[submit(number)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    take(running.pop(future), future.result())
        except BaseException:
            for future in running:
                future.cancel()
            self._conversion.shards.stop()
            wait(running)
            raise

    def log_warnings(self) -> None:
        """Log each warning about values once, with the first module in plan order that it applies to."""
        position_of = {module.name: position for position, module in enumerate(self._conversion.plan.modules)}
        logged: set[str] = set()
        warnings = [entry for result in self._results.values() for entry in result.record.seen]
        for module, warning in sorted(warnings, key=lambda entry: position_of[entry[0]]):
            if warning not in logged:
                logged.add(warning)
                logger.warning("%s: %s", module, warning)

    def raise_faults(self) -> None:
        """Raise one error, of the type of the first error, with all faults in the order of the units."""
        errors: list[CheckpointError] = []
        for number in sorted(self._results):
            errors += self._results[number].errors
        if errors:
            raise type(errors[0])(*(fault for error in errors for fault in error.faults))

    def _submit_check(self, number: int) -> Future[bool]:
        return self._pool.executor.submit(is_done, self._conversion, number, self._earlier_records[number])

    def _take_check(self, number: int, done: bool) -> None:  # noqa: FBT001 (the result of a future)
        if done:
            nbytes = self._conversion.units[number].nbytes
            self._results[number] = UnitResult(record=self._earlier_records[number])
            self.resumed_bytes += nbytes
            self._progress(nbytes)

    def _submit(self, number: int) -> Future[UnitResult]:
        return self._pool.executor.submit(
            run_unit, self._conversion, number, ahead=self._pool.workers, writes=self._no_fault_yet
        )

    def _process_result(self, number: int, result: UnitResult) -> None:
        self._results[number] = result
        if result.errors:
            self._no_fault_yet = False
        elif self._no_fault_yet:
            self._journal.add(result.record)
        self._conversion.shards.give_back(number)
        self._progress(self._conversion.units[number].nbytes)

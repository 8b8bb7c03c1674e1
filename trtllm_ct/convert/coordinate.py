"""`run_units`: run all units of a conversion in an executor, record them in the journal and collect their faults."""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, wait
from itertools import islice
from typing import TYPE_CHECKING

from trtllm_ct.convert.worker import run_unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from trtllm_ct.base.errors import CheckpointError
    from trtllm_ct.convert.executors import Pool
    from trtllm_ct.convert.job import Conversion
    from trtllm_ct.convert.journal import Journal
    from trtllm_ct.convert.worker import UnitResult

__all__ = ["run_units"]

logger = logging.getLogger("trtllm_ct")

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
        self._earlier_records = dict(journal.records)
        self._results: dict[int, UnitResult] = {}
        self._no_fault_yet = True
        self.resumed_bytes = 0

    def run(self) -> None:
        """Submit all units, a few at a time, and process the results as they complete, in any order."""
        units = iter(self._conversion.units)
        running: dict[Future[UnitResult], int] = {}
        max_running = _IN_FLIGHT * self._pool.workers
        try:
            while True:
                for unit in islice(units, max_running - len(running)):
                    running[self._submit(unit.number)] = unit.number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._process_result(running.pop(future), future.result())
        except BaseException:
            for future in running:
                future.cancel()
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

    def _submit(self, number: int) -> Future[UnitResult]:
        return self._pool.executor.submit(
            run_unit,
            self._conversion,
            number,
            earlier=self._earlier_records.get(number),
            ahead=self._pool.workers,
            writes=self._no_fault_yet,
        )

    def _process_result(self, number: int, result: UnitResult) -> None:
        nbytes = self._conversion.units[number].nbytes
        self._results[number] = result
        if result.errors:
            self._no_fault_yet = False
        elif result.resumed:
            self.resumed_bytes += nbytes
        elif self._no_fault_yet:
            self._journal.add(result.record)
        self._progress(nbytes)

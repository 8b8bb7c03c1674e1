"""All units of a conversion through an executor: handed out, journaled, and their faults gathered."""

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
"""Units that are handed out at a time, for each worker: none waits for the next one, and a fault stops most of them."""


def run_units(conversion: Conversion, pool: Pool, journal: Journal, progress: Callable[[int], object]) -> int:
    """Convert every unit that no earlier run has converted; returns the bytes that one had.

    `progress` is told of bytes as units are done. After a fault the rest is only checked, so that all faults come
    together, and the same ones whatever the order. Raises the `CheckpointError` that the values of the checkpoint
    deserve; any other error of a worker at once, after the units that run have ended.
    """
    coordinator = _Coordinator(conversion, pool, journal, progress)
    coordinator.run()
    coordinator.tell_warnings()
    coordinator.raise_faults()
    return coordinator.resumed_bytes


class _Coordinator:
    """What is known of the units while they run; all of it happens in one thread."""

    def __init__(self, conversion: Conversion, pool: Pool, journal: Journal, progress: Callable[[int], object]) -> None:
        self._conversion = conversion
        self._pool = pool
        self._journal = journal
        self._progress = progress
        self._earlier = dict(journal.records)
        self._results: dict[int, UnitResult] = {}
        self._sound = True
        self.resumed_bytes = 0

    def run(self) -> None:
        """Hand out all units, few at a time, and take what comes back in whatever order."""
        waiting = iter(self._conversion.units)
        running: dict[Future[UnitResult], int] = {}
        room = _IN_FLIGHT * self._pool.workers
        try:
            while True:
                for unit in islice(waiting, room - len(running)):
                    running[self._submit(unit.number)] = unit.number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._take(running.pop(future), future.result())
        except BaseException:
            for future in running:
                future.cancel()
            wait(running)
            raise

    def tell_warnings(self) -> None:
        """Log what values warn of, once each, with the first module in the order of the plan that shows it."""
        position = {module.name: place for place, module in enumerate(self._conversion.plan.modules)}
        told: set[str] = set()
        seen = [entry for result in self._results.values() for entry in result.record.seen]
        for module, warning in sorted(seen, key=lambda entry: position[entry[0]]):
            if warning not in told:
                told.add(warning)
                logger.warning("%s: %s", module, warning)

    def raise_faults(self) -> None:
        """Raise all faults as one error, in the order of the units; of the type of the first."""
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
            earlier=self._earlier.get(number),
            ahead=self._pool.workers,
            writes=self._sound,
        )

    def _take(self, number: int, result: UnitResult) -> None:
        nbytes = self._conversion.units[number].nbytes
        self._results[number] = result
        if result.errors:
            self._sound = False
        elif result.resumed:
            self.resumed_bytes += nbytes
        elif self._sound:
            self._journal.add(result.record)
        self._progress(nbytes)

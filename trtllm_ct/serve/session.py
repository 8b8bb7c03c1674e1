"""LoadSession: what the parts of one checkpoint loader share, from the parent process to a worker's loaded model.

The engine hands loaders a directory and little else, makes them often, pickles them, and in some releases tells them
the mapping only when it asks for the configuration. So what is needed later is remembered here. Nothing here imports
the engine.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CheckpointError, Fault, UsageError
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.serve.leases import hold
from trtllm_ct.serve.model_check import check_model
from trtllm_ct.serve.rank_weights import deliver_for_rank, rank_plan
from trtllm_ct.serve.sidecar import SIDECAR_FILE, Sidecar, is_sidecar, known_sidecars, restore_sidecar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.parallel import EngineMapping
    from trtllm_ct.serve.load_report import LoadReport

__all__ = ["REPORTS", "LoadSession"]

REPORTS = "TRTLLM_CT_REPORTS"
"""Environment variable: a directory in which every rank leaves its load reports as JSON."""

logger = logging.getLogger("trtllm_ct")


class LoadSession:
    """The directories that a loader was handed, and the rank that it loads for.

    `sidecars` are the records that other processes are told, by directory: those of one `LLM`'s model and draft; when
    None, those of every sidecar that this process knows. Cheap to make; pickled as these records and nothing else.
    """

    def __init__(self, sidecars: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._told = None if sidecars is None else dict(sidecars)
        self._opened: dict[Path, Sidecar] = {}
        self._mapping: EngineMapping | None = None
        self._model: Path | None = None
        self._latest: tuple[Sidecar, Rank] | None = None
        self._reports: dict[Path, LoadReport] = {}

    def __reduce__(self) -> tuple[type[LoadSession], tuple[dict[str, Any]]]:
        return LoadSession, (self.records(),)

    def records(self) -> dict[str, Any]:
        """The sidecars that may be loaded, by directory, as another node needs them to make them again."""
        return dict(known_sidecars() if self._told is None else self._told)

    @property
    def reports(self) -> dict[str, LoadReport]:
        """What was loaded in this process, by directory, in order."""
        return {str(directory): report for directory, report in self._reports.items()}

    @property
    def report(self) -> LoadReport | None:
        """What was loaded for the model whose configuration was asked for last; None before that."""
        return None if self._model is None else self._reports.get(self._model)

    def configure(self, directory: str | Path, arguments: Mapping[str, Any]) -> None:
        """What comes before the engine reads a configuration with these arguments.

        Sidecars that this node lacks are made, also those of drafts, whose configuration the engine reads without
        asking. Raises `SidecarError` for one that can't be made or is out of date, and `UsageError` for a directory
        that should have been prepared and for arguments under which experts lie elsewhere.
        """
        if arguments.get("mapping") is not None:
            self._mapping = arguments["mapping"]
        self._model = Path(directory)
        for other in (self._told or {}).keys() - {str(directory)}:
            # Another model's trouble shows when that model is loaded.
            with suppress(CheckpointError):
                self._sidecar(Path(other))
        sidecar = self._sidecar(self._model)
        if sidecar is None:
            return
        if arguments.get("moe_load_balancer") is not None:
            raise UsageError(_balanced_experts())
        sidecar.plan_for(self._rank(sidecar, self._mapping).parallel if self._mapping else sidecar.options.parallel)

    def needs(self, algo: QuantAlgo) -> bool:
        """Whether a module of any sidecar that was opened so far is delivered in a mode."""
        modes = (mode for sidecar in self._opened.values() for mode, _ in sidecar.modes.values())
        return any(mode.partition(" ")[0] == algo for mode in modes)

    def load(self, directory: str | Path, mapping: EngineMapping | None = None) -> dict[str, Tensor] | None:
        """The weights in a sidecar for one rank, see `deliver_for_rank`; None for what the engine loads by itself.

        `mapping` is the engine's; without it the one that came with the configuration counts. Raises as `configure`
        and `deliver_for_rank` do.
        """
        sidecar = self._sidecar(Path(directory))
        if sidecar is None:
            return None
        rank = self._rank(sidecar, mapping or self._mapping)
        weights, report = deliver_for_rank(sidecar, rank)
        self._latest = sidecar, rank
        self._reports[sidecar.directory] = report
        _leave(report, sidecar.directory.name)
        return weights

    def check(self, model: Any, fused: Mapping[str, Sequence[str]]) -> None:
        """Hold the model that the engine built against the plan of what was loaded last; see `check_model`."""
        if self._latest is not None:
            check_model(model, fused, rank_plan(*self._latest))

    def _sidecar(self, directory: Path) -> Sidecar | None:
        """The sidecar in a directory, opened once and in use from now on; None for what the engine loads by itself."""
        if directory not in self._opened or not is_sidecar(directory):
            record = (self._told or {}).get(str(directory))
            if not is_sidecar(directory) and record is not None:
                restore_sidecar(directory, record)
            if not is_sidecar(directory):
                _refuse_unprepared(directory)
                return None
            hold(directory / SIDECAR_FILE)
            self._opened[directory] = Sidecar.open(directory)
        return self._opened[directory]

    @staticmethod
    def _rank(sidecar: Sidecar, mapping: EngineMapping | None) -> Rank:
        if mapping is not None:
            return Rank.from_mapping(mapping, sidecar.checkpoint.model.layers)
        if sidecar.options.parallel != Parallel():
            raise UsageError(
                Fault(
                    where="load_weights",
                    expected="a mapping, which says which rank's weights to load",
                    found="none, neither here nor with a configuration",
                    remedy="Pass a CompressedTensorsCheckpointLoader() to LLM; its parts know of each other.",
                )
            )
        return Rank()


def _refuse_unprepared(directory: Path) -> None:
    """Raise `UsageError` for a compressed-tensors checkpoint itself: stock would load it wrong, or in parts."""
    try:
        detection = FormatDetector().detect(directory)
    except CheckpointError:
        return
    if detection.method == COMPRESSED_TENSORS:
        raise UsageError(
            Fault(
                where=str(directory),
                expected="a prepared directory, since TensorRT-LLM reads configurations before it asks a loader",
                found=f"the checkpoint itself ({detection.evidence[0]})",
                remedy=f"Pass model=trtllm_ct.prepare({str(directory)!r}), or call trtllm_ct.install() before LLM.",
            )
        )


def _balanced_experts() -> Fault:
    return Fault(
        where="moe_load_balancer",
        expected="none, since a rank loads the experts that its number gives it",
        found="one, which moves experts between ranks",
        remedy="Leave it out, or run `trtllm-ct convert DIR OUT --to modelopt` and serve OUT, of which all is loaded.",
    )


def _leave(report: LoadReport, name: str) -> None:
    """Write a report where the user wants reports; a directory that can't be written stops no server."""
    folder = os.environ.get(REPORTS)
    if not folder:
        return
    path = Path(folder) / f"{name}-rank-{report.rank}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s: the load report could not be written: %s", path, error.strerror)

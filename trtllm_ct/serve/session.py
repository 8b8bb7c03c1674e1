"""LoadSession: the state that the parts of one checkpoint loader share, in the parent process and in the workers.

The engine passes a loader little more than a directory, creates loaders often, and pickles them. Some releases pass
the parallel mapping only when they load the configuration. A `LoadSession` keeps what is needed later.
This module does not import the engine.
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
from trtllm_ct.convert.sizes import require_sizes
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.serve.leases import hold
from trtllm_ct.serve.model_check import check_model
from trtllm_ct.serve.rank_weights import load_rank_weights, rank_plan
from trtllm_ct.serve.sidecar import SIDECAR_FILE, Sidecar, is_sidecar, known_sidecars, restore_sidecar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.parallel import EngineMapping
    from trtllm_ct.engine.platform import Platform
    from trtllm_ct.serve.load_report import LoadReport

__all__ = ["REPORTS", "LoadSession"]

REPORTS = "TRTLLM_CT_REPORTS"
"""Environment variable: a directory in which every rank writes its load reports as JSON."""

logger = logging.getLogger("trtllm_ct")


class LoadSession:
    """The sidecars that a loader has opened, the mapping that it was given, and the reports of what it loaded.

    `sidecars` maps the directories of one `LLM`'s model and draft model to their records (`Sidecar.record`), from which
    another node can make them again. None means the records of all sidecars that this process knows.
    A session is cheap to create. Pickling keeps these records and nothing else.
    """

    def __init__(self, sidecars: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._sidecars = None if sidecars is None else dict(sidecars)
        self._opened: dict[Path, Sidecar] = {}
        self._mapping: EngineMapping | None = None
        self._model: Path | None = None
        self._latest: tuple[Sidecar, Rank] | None = None
        self._reports: dict[Path, LoadReport] = {}

    def __reduce__(self) -> tuple[type[LoadSession], tuple[dict[str, Any]]]:
        return LoadSession, (self.records(),)

    def records(self) -> dict[str, Any]:
        """Return the records of the sidecars that may be loaded, by directory; another node makes them from these."""
        return dict(known_sidecars() if self._sidecars is None else self._sidecars)

    @property
    def reports(self) -> dict[str, LoadReport]:
        """The reports of everything loaded in this process, by directory, in the order of loading."""
        return {str(directory): report for directory, report in self._reports.items()}

    @property
    def report(self) -> LoadReport | None:
        """The report of the model whose configuration was loaded last; None before its weights are loaded."""
        return None if self._model is None else self._reports.get(self._model)

    def configure(self, directory: str | Path, arguments: Mapping[str, Any], platform: Platform | None = None) -> None:
        """Prepare and check everything before the engine reads the configuration in `directory`.

        `arguments` are the keywords with which the engine loads the configuration; a `mapping` among them is kept for
        `load`. `platform` is the engine's release with the SM of the GPU. Sidecars that this node lacks are made. This
        includes those of draft models, because the engine reads their configuration without calling a loader.
        Raises `SidecarError` when the sidecar can't be made or is out of date, and `UsageError` when `directory` is a
        compressed-tensors checkpoint instead of its sidecar, when a `moe_load_balancer` would move experts, or when a
        converted directory doesn't hold the sizes or has modes that don't run on the GPU.
        """
        if arguments.get("mapping") is not None:
            self._mapping = arguments["mapping"]
        self._model = Path(directory)
        for path in (self._sidecars or {}).keys() - {str(directory)}:
            # An error of another model is raised when that model is loaded.
            with suppress(CheckpointError):
                self._open_sidecar(Path(path))
        sidecar = self._open_sidecar(self._model)
        if sidecar is None:
            if self._mapping is not None:
                require_sizes(self._model, Parallel.from_mapping(self._mapping), platform)
            return
        if arguments.get("moe_load_balancer") is not None:
            raise UsageError(_balanced_experts())
        sidecar.plan_for(self._rank(sidecar, self._mapping).parallel if self._mapping else sidecar.options.parallel)

    def needs(self, algo: QuantAlgo) -> bool:
        """Whether any sidecar opened so far has a module in the mode `algo`."""
        modes = (mode for sidecar in self._opened.values() for mode, _ in sidecar.modes.values())
        return any(mode.partition(" ")[0] == algo for mode in modes)

    def load(self, directory: str | Path, mapping: EngineMapping | None = None) -> dict[str, Tensor] | None:
        """Return one rank's weights of a sidecar, see `load_rank_weights`; None for a directory that is not a sidecar.

        `mapping` is the engine's mapping; None means the mapping that was passed with the configuration.
        Writes the load report to the directory in `TRTLLM_CT_REPORTS`, if it is set.
        Raises `UsageError` without a mapping when the sidecar was made for several ranks, and what `configure` and
        `load_rank_weights` raise.
        """
        sidecar = self._open_sidecar(Path(directory))
        if sidecar is None:
            return None
        rank = self._rank(sidecar, mapping or self._mapping)
        weights, report = load_rank_weights(sidecar, rank)
        self._latest = sidecar, rank
        self._reports[sidecar.directory] = report
        _write_report(report, sidecar.directory.name)
        return weights

    def check(self, model: Any, fused: Mapping[str, Sequence[str]]) -> None:
        """Check the model that the engine built against the plan that was loaded last; see `check_model`."""
        if self._latest is not None:
            inner = self._latest[0].checkpoint.model.row.inner
            check_model(model, fused, rank_plan(*self._latest), inner=inner)

    def _open_sidecar(self, directory: Path) -> Sidecar | None:
        """Return the sidecar in a directory; None for a directory that the engine loads by itself.

        A sidecar that is missing is made from its record. It is opened once, and this process takes a lease on it.
        """
        if directory not in self._opened or not is_sidecar(directory):
            record = (self._sidecars or {}).get(str(directory))
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
        """Return the rank that a mapping describes; without a mapping, the only rank of a sidecar made for one rank."""
        if mapping is not None:
            return Rank.from_mapping(mapping, sidecar.checkpoint.model.layers)
        if sidecar.options.parallel != Parallel():
            raise UsageError(
                Fault(
                    where="load_weights",
                    expected="a mapping, which says which rank's weights to load",
                    found="none, neither here nor with a configuration",
                    remedy="Pass a CompressedTensorsCheckpointLoader() to LLM; its parts share the mapping.",
                )
            )
        return Rank()


def _refuse_unprepared(directory: Path) -> None:
    """Raise `UsageError` for a compressed-tensors checkpoint, which the engine itself loads wrongly or in parts."""
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
        remedy="Leave it out, or run `trtllm-ct convert DIR OUT --to modelopt` and serve OUT, which is loaded whole.",
    )


def _write_report(report: LoadReport, name: str) -> None:
    """Write a report to the directory in `TRTLLM_CT_REPORTS`; only log a warning when it can't be written."""
    folder = os.environ.get(REPORTS)
    if not folder:
        return
    path = Path(folder) / f"{name}-rank-{report.rank}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s: the load report could not be written: %s", path, error.strerror)

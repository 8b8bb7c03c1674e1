"""The pipeline in order: detect, read, catalog, probe, plan, load, map, deliver. Read this first.

| stage   | takes                         | gives                                | tensors read        |
|---------|-------------------------------|--------------------------------------|---------------------|
| detect  | a directory                   | `Detection` with its evidence        | none                |
| read    | the directory                 | `QuantizationConfig`                 | none                |
| catalog | the directory                 | `Catalog`                            | headers             |
| probe   | configuration and catalog     | `Probe`: the few values that decide  | a few small ones    |
| plan    | the three above and a target  | `Plan`                               | none                |
| load    | the plan's module groups      | stored tensors, one module at a time | one module at a time |
| map     | a module and its tensors      | delivered tensors                    | the given ones      |
| deliver | delivered tensors             | a directory, a dictionary, a model   | the given ones      |
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.config.mistral_params import config_from_params
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.cores import available_cores
from trtllm_ct.detect import Detection, FormatDetector
from trtllm_ct.plan.architectures import Model
from trtllm_ct.plan.parallel import ONE_RANK, Parallel
from trtllm_ct.plan.planner import make_plan
from trtllm_ct.probing import probe_checkpoint
from trtllm_ct.targets import DEFAULT_ENGINE, target_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from concurrent.futures import Executor, Future

    from torch import Tensor

    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.config.model import QuantizationConfig
    from trtllm_ct.dtypes import DType
    from trtllm_ct.formats.codecs import Codec
    from trtllm_ct.plan.model import ModulePlan, Plan
    from trtllm_ct.plan.probe import Probe

__all__ = ["Checkpoint", "open_checkpoint", "plan_checkpoint", "stream_delivered"]

logger = logging.getLogger("trtllm_ct")

_MOST_WORKERS = 4
"""Threads that convert at a time unless more are asked for: about as many fill the memory bus of one processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A compressed-tensors directory after the stages before planning.

    `hf_config` is its config.json, parsed, or what params.json says in its terms.
    """

    directory: Path
    detection: Detection
    config: QuantizationConfig
    catalog: Catalog
    model: Model
    probe: Probe
    hf_config: Mapping[str, Any]

    def plan(
        self,
        to: str = "modelopt",
        *,
        engine: str = DEFAULT_ENGINE,
        additive_zeros: bool = True,
        dtype: DType | None = None,
        strict: bool = False,
        parallel: Parallel = ONE_RANK,
        dense_o_proj: bool = False,
    ) -> Plan:
        """The plan for the target named `to` and the capability set `engine` of stock TensorRT-LLM; see `make_plan`.

        `additive_zeros` matters for target `tensorrt_llm` only, see `target_named`.
        Raises `PlanError`, and `UsageError` for an unknown name.
        """
        return make_plan(
            self.config,
            self.catalog,
            self.model,
            target_named(to, engine, additive_zeros=additive_zeros),
            dtype=dtype,
            strict=strict,
            parallel=parallel,
            dense_o_proj=dense_o_proj,
            probe=self.probe,
        )


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Detect, read, catalogue and probe a directory; headers, and the few small tensors whose values decide a mode.

    Raises `DetectionError` when it is no compressed-tensors checkpoint, `ConfigError` and `CatalogError` with all
    faults of the stage.
    """
    directory = Path(directory)
    detection = FormatDetector().detect(directory)
    detection.require_compressed_tensors()
    config = CompressedTensorsConfigReader().read(directory)
    catalog = Catalog.from_directory(directory)
    hf_config = _read_hf_config(directory, catalog)
    model = Model.from_config(hf_config)
    return Checkpoint(
        directory=directory,
        detection=detection,
        config=config,
        catalog=catalog,
        model=model,
        probe=probe_checkpoint(config, catalog, model),
        hf_config=hf_config,
    )


def _read_hf_config(directory: Path, catalog: Catalog) -> Mapping[str, Any]:
    """config.json, parsed; in Mistral's own form there may be params.json instead."""
    path, params = directory / "config.json", directory / "params.json"
    if path.is_file() or not params.is_file():
        return read_json_object(path)
    stored = {name: tensor.spec for name, tensor in catalog.tensors.items()}
    return config_from_params(read_json_object(params), stored)


def plan_checkpoint(
    directory: str | Path,
    to: str = "modelopt",
    *,
    engine: str = DEFAULT_ENGINE,
    dtype: DType | None = None,
    strict: bool = False,
    parallel: Parallel = ONE_RANK,
    dense_o_proj: bool = False,
) -> Plan:
    """The plan of a directory for the target named `to`; reads no weights. See `Checkpoint.plan`."""
    return open_checkpoint(directory).plan(
        to, engine=engine, dtype=dtype, strict=strict, parallel=parallel, dense_o_proj=dense_o_proj
    )


def stream_delivered(
    plan: Plan,
    catalog: Catalog,
    *,
    codec: Codec | None = None,
    device: str = "cpu",
    reader: TensorReader | None = None,
    workers: int | None = None,
) -> Iterator[tuple[ModulePlan, dict[str, Tensor]]]:
    """Load and map: the delivered tensors of one module after another, in the order of the plan.

    `plan` is that of a whole checkpoint or, by `plan_for_rank`, of one rank. Operations run on `device`; delivered
    tensors stay there. Stored tensors are views of mapped files. `reader` is one of `catalog` that the caller keeps,
    for its `bytes_read`; it is closed at the end.
    `workers` threads convert modules ahead of the one that is waited for: by default one for each core up to 4, and a
    single one for another device than the CPU.
    Memory: of twice as many modules as workers, but of a single one with a single worker, their delivered tensors and
    their int8 codes while they are dequantized.
    """
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.formats.codecs import NATIVE
    from trtllm_ct.joined import JoinedScalars

    count = workers or (min(available_cores(), _MOST_WORKERS) if device == "cpu" else 1)
    joined, told = JoinedScalars(), set[str]()
    ahead: deque[_Begun] = deque()
    with reader or TensorReader(catalog) as files, ThreadPoolExecutor(count) as pool:
        try:
            for module, following in zip_longest(plan.modules, plan.modules[1:]):
                if following is not None:
                    files.prefetch(following.runs)
                stored = {run.name: files.read(run.name, run.begin, run.end) for run in module.runs}
                ahead.append(_begin(pool, module, stored, codec or NATIVE, device))
                while len(ahead) >= (2 * count - 1 if following is not None else 1):
                    begun = ahead.popleft()
                    try:
                        delivered = begun.delivered.result()
                    finally:  # what a fault may come from is told before it
                        _tell(begun.module, begun.warnings, told)
                    joined.check(begun.module, delivered)
                    yield begun.module, delivered
        finally:
            for begun in ahead:
                begun.delivered.cancel()


class _Begun(NamedTuple):
    """A module that is mapped by another thread; what its values warn of is complete when that has ended."""

    module: ModulePlan
    delivered: Future[dict[str, Tensor]]
    warnings: list[str]


def _begin(pool: Executor, module: ModulePlan, stored: Mapping[str, Tensor], codec: Codec, device: str) -> _Begun:
    from trtllm_ct.mapper import CompressedTensorsWeightMapper

    warnings: list[str] = []
    mapper = CompressedTensorsWeightMapper(
        codec=codec, device=device, on_warning=lambda _module, warning: warnings.append(warning)
    )
    return _Begun(module, pool.submit(mapper.map_module, module, stored), warnings)


def _tell(module: ModulePlan, warnings: Iterable[str], told: set[str]) -> None:
    """Log each warning once, with the first module of the plan that gives rise to it."""
    for warning in warnings:
        if warning not in told:
            told.add(warning)
            logger.warning("%s: %s", module.name, warning)

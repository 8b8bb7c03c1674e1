"""The stages of the pipeline in order: detect, read, catalog, probe, plan, load, map, deliver. Read this file first.

| stage   | input                            | output                               | tensors read         |
|---------|----------------------------------|--------------------------------------|----------------------|
| detect  | a source (`source.py`)           | `Detection` with its evidence        | none                 |
| read    | the source                       | `QuantizationConfig`                 | none                 |
| catalog | the source                       | `Catalog`                            | headers              |
| probe   | configuration, catalog and model | `Probe`: the few values that decide  | a few small ones     |
| plan    | these three, probe and target    | `Plan`                               | none                 |
| load    | the modules of the plan          | stored tensors, one module at a time | one module at a time |
| map     | a module and its tensors         | delivered tensors                    | the given ones       |
| deliver | delivered tensors                | a directory, a dictionary, a model   | the given ones       |

This file has the stages up to planning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError, Fault, keeping_warnings
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.checkpoint.opening import open_source
from trtllm_ct.checkpoint.source import Source, as_source, local_folder
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.config.mistral_params import config_from_params
from trtllm_ct.config.quantization_config import QuantizationConfig
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.engine.target import MODELOPT
from trtllm_ct.formats import PACKED_CODES
from trtllm_ct.pipeline.calibration import with_own_scales
from trtllm_ct.pipeline.probing import probe_checkpoint, unread_values
from trtllm_ct.pipeline.transformers_class import TransformersClass
from trtllm_ct.plan.models.bounds import check_counts
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.planner import make_plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Unpack

    from trtllm_ct.plan.options import PlanArguments
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.plan.probe import Probe

__all__ = ["Checkpoint", "open_checkpoint", "plan_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A compressed-tensors checkpoint, with the results of all stages before planning.

    `hf_config` is its parsed config.json, or params.json (Mistral's own form) converted to that form.
    """

    source: Source
    detection: Detection
    config: QuantizationConfig
    catalog: Catalog
    model: Model
    probe: Probe
    hf_config: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """The folder of the files; raises `UsageError` if they are not on this machine."""
        return local_folder(self.source)

    def plan(self, to: str = MODELOPT.name, *, compare_class: bool = False, **asked: Unpack[PlanArguments]) -> Plan:
        """Return the plan for the target named `to`, with the options of `PlanOptions`; see `plan_for`."""
        return self.plan_for(PlanOptions.of(to, **asked), compare_class=compare_class)

    def plan_for(self, options: PlanOptions, *, compare_class: bool = False) -> Plan:
        """Return the plan for a target, a release of TensorRT-LLM and GPUs; see `make_plan`.

        `compare_class` compares a model whose row lists no modules with the class of transformers, which is imported
        for that; if it is not installed, nothing is compared.
        Raises `PlanError` with all faults, and `UsageError` for an unknown name or SM.
        """
        return make_plan(
            self.config,
            self.catalog,
            self.model,
            replace(options, requantize=with_own_scales(options.requantize, self.catalog)),
            probe=self.probe,
            model_class=TransformersClass(self.hf_config) if compare_class else None,
        )


def open_checkpoint(
    directory: str | Path | Source, detection: Detection | None = None, probe: Probe | None = None
) -> Checkpoint:
    """Detect, read, catalog and probe a directory, or a checkpoint elsewhere (`opening.py: open_source`).

    Reads JSON files, headers, and the few small tensors whose values decide a mode; also the embeddings, if a head is
    stored that config.json ties to them. `detection` is the detection of the directory and `probe` what was read of its
    values, if they were made before.
    A checkpoint without any quantization is opened too: its tensors are delivered as they are.
    Raises `DetectionError` if the directory is a checkpoint of another quantization method or none at all, and
    `ConfigError` or `CatalogError` with all faults of the stage and the warnings of the stages before it.
    """
    source = as_source(directory)
    detection = detection or FormatDetector().detect(source)
    config = _unquantized(detection) or CompressedTensorsConfigReader().read(detection)
    with keeping_warnings(config.warnings):
        catalog = Catalog.from_source(source)
    if detection.method is None:
        _refuse_codes(catalog)
    with keeping_warnings((*config.warnings, *catalog.warnings)):
        hf_config = _hf_config(detection, catalog)
        model = Model.from_config(hf_config)
        check_counts(model, catalog)
        probe = probe_checkpoint(config, catalog, model) if probe is None else probe
        if unread := unread_values(catalog, model, probe):
            catalog = replace(catalog, warnings=(*catalog.warnings, *unread))
    return Checkpoint(
        source=source,
        detection=detection,
        config=config,
        catalog=catalog,
        model=model,
        probe=probe,
        hf_config=hf_config,
    )


def _unquantized(detection: Detection) -> QuantizationConfig | None:
    """Return the configuration of a checkpoint in which no block quantizes anything; None for any other."""
    if detection.method is not None or detection.source is None:
        return None
    return QuantizationConfig(groups=(), origin="", directory=detection.source.folder)


def _refuse_codes(catalog: Catalog) -> None:
    """Raise `ConfigError` if a checkpoint whose configuration quantizes nothing holds codes."""
    codes = [
        name
        for name, tensor in catalog.tensors.items()
        if (local := name.rpartition(".")[2]) in PACKED_CODES
        or (local == "weight" and not tensor.spec.dtype.is_wide_float and f"{name}_scale" in catalog)
    ]
    if codes:
        raise ConfigError(
            Fault(
                where="config.json: quantization_config",
                expected="a quantization block, as these files hold codes",
                found=f"none, beside {format_names(codes)}",
                remedy="Take config.json from where the checkpoint was published.",
            )
        )


def _hf_config(detection: Detection, catalog: Catalog) -> Mapping[str, Any]:
    """Return the parsed config.json; if only params.json exists, return that, converted to the form of config.json."""
    if "config.json" in detection.files:
        return detection.files["config.json"]
    stored = {name: tensor.spec for name, tensor in catalog.tensors.items()}
    return config_from_params(detection.files["params.json"], stored)


def plan_checkpoint(directory: str | Path, to: str = MODELOPT.name, **asked: Unpack[PlanArguments]) -> Plan:
    """Return the plan of a checkpoint for the target named `to`; no weights are read.

    `directory` may be the name of a repository of the Hub too, such as `ORG/NAME@REVISION`; see `open_source`. `asked`
    are the options of `PlanOptions`. Raises what `open_checkpoint` and `make_plan` raise.
    """
    options = PlanOptions.of(to, **asked)
    return open_checkpoint(open_source(directory)).plan_for(options, compare_class=True)

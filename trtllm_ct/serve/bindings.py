"""This package's loaders as TensorRT-LLM's own classes, and what else is asked of it: the one file that imports it.

A subclass of `HfCheckpointLoader` that keeps its format inherits the weight mapper of every architecture. It must not
be more than that: what loads is in `session.py`, and knows nothing of the engine.
Source: TensorRT-LLM `_torch/models/checkpoints/` (base classes), `_torch/pyexecutor/model_loader.py` (call order).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import tensorrt_llm
from tensorrt_llm._torch.models.checkpoints import base_weight_loader
from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader
from tensorrt_llm._torch.models.checkpoints.hf.config_loader import HfConfigLoader
from tensorrt_llm._torch.models.checkpoints.hf.weight_loader import HfWeightLoader
from tensorrt_llm._torch.modules import linear
from tensorrt_llm.llmapi import llm_args, llm_utils
from tensorrt_llm.logger import logger

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.serve.additive_zeros import install_additive_zeros
from trtllm_ct.serve.features import EngineFeatures, EngineParts, probe_features
from trtllm_ct.serve.session import LoadSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.parallel import EngineMapping
    from trtllm_ct.serve.load_report import LoadReport

__all__ = [
    "LOADERS",
    "CompressedTensorsCheckpointLoader",
    "CompressedTensorsConfigLoader",
    "CompressedTensorsWeightLoader",
    "engine_features",
    "engine_llm",
    "engine_sampling_params",
]

# Newer releases let go of the tensors that a module has taken, when they come in this.
_consumable = getattr(base_weight_loader, "ConsumableWeightsDict", dict)


class CompressedTensorsConfigLoader(HfConfigLoader):  # type: ignore[misc]
    """The engine's own config loader; before it reads a sidecar, that is there and fits, and so does the engine."""

    def __init__(self, session: LoadSession | None = None) -> None:
        super().__init__()
        self._session = session or LoadSession()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._session,)

    def load(self, checkpoint_dir: str, **kwargs: Any) -> Any:
        """The engine's `ModelConfig` of a directory, with all keywords handed on; raises as `configure` does."""
        self._session.configure(checkpoint_dir, kwargs)
        if self._session.needs(QuantAlgo.W4A16_GPTQ):
            install_additive_zeros(linear)
        return super().load(checkpoint_dir, **kwargs)


class CompressedTensorsWeightLoader(HfWeightLoader):  # type: ignore[misc]
    """Loads sidecars; any other directory, such as a plain draft model, as the engine does."""

    def __init__(self, session: LoadSession | None = None) -> None:
        super().__init__()
        self._session = session or LoadSession()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._session,)

    def load_weights(self, checkpoint_dir: str, mapping: EngineMapping | None = None, **kwargs: Any) -> Any:
        """One rank's weights by Hugging Face name; keywords differ between releases and are for the engine alone.

        Raises as `LoadSession.load` does.
        """
        weights = self._session.load(checkpoint_dir, mapping)
        if weights is not None:
            self._tell(checkpoint_dir)
            return _consumable(weights)
        return super().load_weights(checkpoint_dir, **(kwargs if mapping is None else {**kwargs, "mapping": mapping}))

    def _tell(self, checkpoint_dir: str) -> None:
        """One line on one rank, in the engine's log: nobody configures Python's in its workers."""
        report = self._session.reports[str(checkpoint_dir)]
        if report.rank == 0:
            logger.info(f"trtllm-ct: {report}")
            for warning in report.warnings:
                logger.warning(f"trtllm-ct: {report.source}: {warning}")


class CompressedTensorsCheckpointLoader(HfCheckpointLoader):  # type: ignore[misc]
    """The `checkpoint_loader` of `LLM` for models that `trtllm_ct.prepare` prepared, and for their drafts of any kind.

    It may be made and used any number of times. `sidecars` are what it is pickled as: records by directory, from which
    a node that lacks a sidecar makes it again; when None, those of all that were prepared in this process.
    """

    def __init__(self, *, sidecars: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._session = LoadSession(sidecars)
        super().__init__()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), sidecars=self._session.records()), ()

    @property
    def report(self) -> LoadReport | None:
        """What was loaded for the model in this process; None before that, and where workers load in their own."""
        return self._session.report

    @property
    def reports(self) -> dict[str, LoadReport]:
        """As `report`, of every directory that was loaded in this process, drafts included."""
        return self._session.reports

    def get_default_weight_loader(self) -> CompressedTensorsWeightLoader:
        """The part that loads weights."""
        return CompressedTensorsWeightLoader(self._session)

    def get_default_config_loader(self) -> CompressedTensorsConfigLoader:
        """The part that loads configurations."""
        return CompressedTensorsConfigLoader(self._session)

    @property
    def weight_loader(self) -> Any:
        """The part that loads weights; a new one after `cleanup`, which drops it."""
        return super().weight_loader or self.get_default_weight_loader()

    @property
    def config_loader(self) -> Any:
        """The part that loads configurations; a new one after `cleanup`, which drops it."""
        return super().config_loader or self.get_default_config_loader()

    def get_initialized_weight_mapper(self, model: Any, config: Any) -> Any:
        """The engine's mapper for the model, which is first held against what was loaded for it; see `check_model`."""
        mapper = super().get_initialized_weight_mapper(model, config)
        self._session.check(model, mapper.mapping)
        return mapper


LOADERS = (CompressedTensorsCheckpointLoader, CompressedTensorsWeightLoader)
"""What a user may pass: a whole loader, or the engine's with this part in it."""


def engine_features() -> EngineFeatures:
    """What the installed engine can do; see `probe_features`."""
    return probe_features(
        EngineParts(
            linear=linear,
            llm_args=llm_args.TorchLlmArgs,
            llm_utils=llm_utils,
            weight_loader=base_weight_loader.BaseWeightLoader,
            version=getattr(tensorrt_llm, "__version__", None),
        )
    )


def engine_llm() -> Any:
    """The engine's class `LLM`."""
    return tensorrt_llm.LLM


def engine_sampling_params() -> Any:
    """The engine's class `SamplingParams`."""
    return tensorrt_llm.SamplingParams

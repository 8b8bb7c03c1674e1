"""This package's loaders as subclasses of TensorRT-LLM's classes; the only file that imports TensorRT-LLM.

A subclass of `HfCheckpointLoader` with the same checkpoint format inherits the weight mapper of every architecture.
The classes here stay thin: the loading itself is in `session.py`, which does not import the engine.
Source: TensorRT-LLM `_torch/models/checkpoints/` (base classes), `_torch/pyexecutor/model_loader.py` (call order).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import tensorrt_llm
import torch
from tensorrt_llm._torch.models import modeling_utils
from tensorrt_llm._torch.models.checkpoints import base_weight_loader
from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader
from tensorrt_llm._torch.models.checkpoints.hf.config_loader import HfConfigLoader
from tensorrt_llm._torch.models.checkpoints.hf.weight_loader import HfWeightLoader
from tensorrt_llm._torch.modules import attention, linear
from tensorrt_llm.llmapi import llm_args, llm_utils
from tensorrt_llm.logger import logger

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.platform import sm_of_capability
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

# With this dictionary, newer releases free the tensors of a module as soon as the module has copied them.
_consumable = getattr(base_weight_loader, "ConsumableWeightsDict", dict)


class CompressedTensorsConfigLoader(HfConfigLoader):  # type: ignore[misc]
    """The engine's config loader, which first makes sure that the sidecar exists and fits the engine.

    When the sidecar has modules of W4A16_GPTQ, it also installs the Linear method for them.
    """

    def __init__(self, session: LoadSession | None = None) -> None:
        super().__init__()
        self._session = session or LoadSession()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._session,)

    def load(self, checkpoint_dir: str, **kwargs: Any) -> Any:
        """Return the engine's `ModelConfig` of a directory.

        All keywords are passed on to the engine.
        Raises what `LoadSession.configure` and `install_additive_zeros` raise.
        """
        self._session.configure(checkpoint_dir, kwargs, engine_features().platform)
        if self._session.needs(QuantAlgo.W4A16_GPTQ):
            install_additive_zeros(linear)
        return super().load(checkpoint_dir, **kwargs)


class CompressedTensorsWeightLoader(HfWeightLoader):  # type: ignore[misc]
    """Loads the weights of sidecars; leaves other directories, such as plain draft models, to the engine's loader."""

    def __init__(self, session: LoadSession | None = None) -> None:
        super().__init__()
        self._session = session or LoadSession()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._session,)

    def load_weights(self, checkpoint_dir: str, mapping: EngineMapping | None = None, **kwargs: Any) -> Any:
        """Return one rank's weights by Hugging Face name.

        `kwargs` differ between releases; they are only passed to the engine's loader, for directories that are not
        sidecars. Raises what `LoadSession.load` raises.
        """
        weights = self._session.load(checkpoint_dir, mapping)
        if weights is not None:
            self._log_report(checkpoint_dir)
            return _consumable(weights)
        return super().load_weights(checkpoint_dir, **(kwargs if mapping is None else {**kwargs, "mapping": mapping}))

    def _log_report(self, checkpoint_dir: str) -> None:
        """Log the load report and its warnings on rank 0.

        It uses the engine's logger, because Python's `logging` is not configured in the engine's workers.
        """
        report = self._session.reports[str(checkpoint_dir)]
        if report.rank == 0:
            logger.info(f"trtllm-ct: {report}")
            for warning in report.warnings:
                logger.warning(f"trtllm-ct: {report.source}: {warning}")


class CompressedTensorsCheckpointLoader(HfCheckpointLoader):  # type: ignore[misc]
    """The `checkpoint_loader` of `LLM` for models that `trtllm_ct.prepare` prepared, and for their draft models.

    A draft model may be a sidecar or any directory that the engine loads by itself. The loader can be created and used
    any number of times.
    `sidecars` maps directories to records (`Sidecar.record`), from which a node that lacks a sidecar makes it again;
    None means the records of all sidecars that this process knows. Pickling keeps these records and nothing else.
    """

    def __init__(self, *, sidecars: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._session = LoadSession(sidecars)
        super().__init__()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), sidecars=self._session.records()), ()

    @property
    def report(self) -> LoadReport | None:
        """The load report of the model; None before loading, and in a process whose workers load instead."""
        return self._session.report

    @property
    def reports(self) -> dict[str, LoadReport]:
        """The load reports of all directories loaded in this process, by directory; includes draft models."""
        return self._session.reports

    def get_default_weight_loader(self) -> CompressedTensorsWeightLoader:
        """Return a new weight loader that shares this loader's session."""
        return CompressedTensorsWeightLoader(self._session)

    def get_default_config_loader(self) -> CompressedTensorsConfigLoader:
        """Return a new config loader that shares this loader's session."""
        return CompressedTensorsConfigLoader(self._session)

    @property
    def weight_loader(self) -> Any:
        """The weight loader; a new one after the engine's `cleanup`, which drops it."""
        return super().weight_loader or self.get_default_weight_loader()

    @property
    def config_loader(self) -> Any:
        """The config loader; a new one after the engine's `cleanup`, which drops it."""
        return super().config_loader or self.get_default_config_loader()

    def load_weights(self, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        """Return one rank's weights, always by the weight loader; raises what `LoadSession.load` raises.

        The newest loader of the engine opens files by itself for a worker that holds only a part of a model, and a
        sidecar has no weights.
        Source: TensorRT-LLM `_torch/models/checkpoints/hf/checkpoint_loader.py`, `_uses_context_only_lazy_loading`.
        """
        return self.weight_loader.load_weights(checkpoint_dir, *args, **kwargs)

    def get_initialized_weight_mapper(self, model: Any, config: Any) -> Any:
        """Return the engine's weight mapper, after checking the built model against the loaded plan (`check_model`)."""
        mapper = super().get_initialized_weight_mapper(model, config)
        self._session.check(model, mapper.mapping)
        return mapper


LOADERS = (CompressedTensorsCheckpointLoader, CompressedTensorsWeightLoader)
"""The classes that a user may pass: this package's checkpoint loader, or its weight loader inside one of the engine."""


def engine_features() -> EngineFeatures:
    """Return the features of the installed engine; see `probe_features`."""
    return probe_features(
        EngineParts(
            linear=linear,
            attention=attention.Attention,
            llm_args=llm_args.TorchLlmArgs,
            llm_utils=llm_utils,
            weight_loader=base_weight_loader.BaseWeightLoader,
            version=getattr(tensorrt_llm, "__version__", None),
            model_classes=_model_classes(),
            sm=_sm_of_gpu(),
        )
    )


def _sm_of_gpu() -> int | None:
    """Return the SM of this machine's first GPU; None without a GPU, and for one that no plan is made for."""
    return sm_of_capability(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def _model_classes() -> frozenset[str]:
    """Return the architectures that the engine can build: registered ones, and those that it imports when needed.

    Source: `_torch/models/modeling_utils.py: MODEL_CLASS_MAPPING`, and `_arch_index.py` of newer releases.
    """
    registered = frozenset(getattr(modeling_utils, "MODEL_CLASS_MAPPING", ()))
    try:
        from tensorrt_llm._torch.models._arch_index import MODEL_ARCH_TO_MODULE
    except ImportError:
        return registered
    return registered | frozenset(MODEL_ARCH_TO_MODULE)


def engine_llm() -> Any:
    """Return the engine's class `LLM`."""
    return tensorrt_llm.LLM


def engine_sampling_params() -> Any:
    """Return the engine's class `SamplingParams`."""
    return tensorrt_llm.SamplingParams

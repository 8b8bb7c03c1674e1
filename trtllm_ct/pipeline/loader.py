"""CompressedTensorsWeightLoader: loads the weights of a checkpoint directory into memory.

It has the interface of the engine's weight loaders (`load_weights(checkpoint_dir, mapping)`) and works without the
engine.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.packages import PACKAGES, missing_packages_as_errors
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.engine.parallel import Rank
from trtllm_ct.formats.codecs import LIBRARY, NATIVE, Codec
from trtllm_ct.layouts.torch_tensors import tensor_of, tensors_of
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.pipeline.stacking import stack_experts
from trtllm_ct.pipeline.stream import stream_delivered
from trtllm_ct.plan.ranks.shard import plan_for_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.engine.parallel import EngineMapping
    from trtllm_ct.layouts.stored_array import StoredArray
    from trtllm_ct.plan.plan import Plan

__all__ = ["CompressedTensorsWeightLoader", "Decompressor", "Layout"]

Layout = Literal["native", "dense", "stored"]
Decompressor = Literal["auto", "library", "native"]

_TARGET_OF_LAYOUT = {"native": "modelopt", "dense": "dense"}
_DECOMPRESSORS = ("auto", "native", "library")

logger = logging.getLogger("trtllm_ct")


class CompressedTensorsWeightLoader:
    """Loads compressed-tensors weights under Hugging Face names.

    `decompressor` selects the decoder. `native` is the one of this package, and so is `auto`, since this package
    decodes every format that it supports. `library` is the compressed-tensors package, which is imported only then;
    that takes seconds. If it is not installed, or too old, that is logged once, and this package's decoder is used.
    """

    def __init__(self, *, decompressor: Decompressor = "auto") -> None:
        _require_choice("decompressor", decompressor, _DECOMPRESSORS)
        self._decompressor = decompressor

    @missing_packages_as_errors()
    def load_weights(
        self,
        checkpoint_dir: str | Path,
        mapping: object = None,
        *,
        layout: Layout = "native",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return all weights of a directory by Hugging Face name, contiguous, on the CPU.

        `layout` is `native` (the tensors of a ModelOpt directory, which the engine's Linears read), `dense` (plain
        weights in the model's dtype) or `stored` (the tensors of the files, unchanged). Plain experts are stacked if
        the model's class reads them so. `mapping` and further keyword arguments are passed by the engine. With a
        mapping of several ranks, the result has the tensors that its rank reads. They have full size, but only the rows
        of the rank's slice are filled (see `plan_for_rank`); `stored` tensors are always complete.
        Memory in addition to the result: the modules that are being converted (see `stream_delivered`), and if
        transforms are folded a weight in float64 for each of up to 4 threads. Tensors that need no change are views of
        memory-mapped files. Raises `CheckpointError` with all faults of the stage that found them,
        and `MissingDependencyError` without torch.
        """
        with collector_paused():
            if layout not in _TARGET_OF_LAYOUT:
                streamed = self.stream(checkpoint_dir, layout=layout, **kwargs)
                return {name: tensor for _module, tensors in streamed for name, tensor in tensors.items()}
            codec = self._codec()
            plan, catalog = _planned(checkpoint_dir, mapping, layout)
            weights: dict[str, StoredArray] = {}
            for _module, arrays in stream_delivered(plan, catalog, codec=codec):
                weights |= arrays
            stack_experts(weights, plan.stacks)
            return tensors_of(weights)

    def stream(
        self,
        checkpoint_dir: str | Path,
        mapping: object = None,
        *,
        layout: Layout = "native",
        **kwargs: Any,  # noqa: ARG002 (engines of different releases pass different ones)
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Return an iterator over (module name, its tensors by full name); see `load_weights` for the arguments.

        Experts come one by one, also those that `load_weights` stacks.
        The plan is made, its warnings are logged and its faults are raised before this returns. Memory: a few modules
        at a time, see `stream_delivered`.
        """
        path = path_of("checkpoint_dir", checkpoint_dir)
        _require_choice("layout", layout, ("stored", *_TARGET_OF_LAYOUT))
        if layout == "stored":
            return _guarded(_stream_stored(Catalog.from_directory(path)))
        codec = self._codec()
        plan, catalog = _planned(checkpoint_dir, mapping, layout)
        delivered = stream_delivered(plan, catalog, codec=codec)
        return _guarded((module.name, tensors_of(arrays)) for module, arrays in delivered)

    def _codec(self) -> Codec:
        """Return the codec of the chosen decompressor; the one of this package if the library can't be used."""
        if self._decompressor != "library":
            return NATIVE
        library = PACKAGES["compressed_tensors"]
        if not library.installed:
            _log_missing_library()
            return NATIVE
        if library.outdated:
            _log_outdated_library(library.outdated)
            return NATIVE
        return LIBRARY


def _planned(checkpoint_dir: str | Path, mapping: object, layout: Layout) -> tuple[Plan, Catalog]:
    """Return the plan of the rank that `mapping` describes, with the catalog; logs the warnings of the plan."""
    checkpoint = open_checkpoint(path_of("checkpoint_dir", checkpoint_dir))
    rank = _rank(mapping, checkpoint.model.layers)
    plan = checkpoint.plan(_TARGET_OF_LAYOUT[layout], parallel=rank.parallel)
    for warning in plan.warnings:
        logger.warning("%s: %s", checkpoint_dir, warning)
    return plan_for_rank(plan, checkpoint.model, rank), checkpoint.catalog


def _rank(mapping: object, layers: int) -> Rank:
    """Return the rank that an engine's mapping describes; a single rank if `mapping` is None or no mapping."""
    if hasattr(mapping, "tp_size"):
        return Rank.from_mapping(cast("EngineMapping", mapping), layers)
    return Rank()


@cache
def _log_missing_library() -> None:
    """Log that the compressed-tensors library is not installed, once per process."""
    logger.warning("compressed-tensors library not found. Will attempt to load weights as standard safetensors.")
    logger.warning("Install with: pip install compressed-tensors")


@cache
def _log_outdated_library(release: str) -> None:
    """Log that the installed library is too old, once per process."""
    library = PACKAGES["compressed_tensors"]
    logger.warning(
        "compressed-tensors %s is installed, which is older than %s. The weights are decoded without it. %s",
        release,
        library.oldest,
        library.remedy,
    )


def _guarded(modules: Iterator[tuple[str, dict[str, Tensor]]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield what `modules` yields; a package that is not installed is a `MissingDependencyError`."""
    with missing_packages_as_errors():
        yield from modules


def _stream_stored(catalog: Catalog) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors of each module as they are stored in the files."""
    from trtllm_ct.checkpoint.reader import TensorReader

    with TensorReader(catalog) as reader:
        for module, names in catalog.names_by_module().items():
            yield module, {name: tensor_of(reader.read(name)) for name in names}


def _require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise `UsageError` if `value` is not among `choices`; `name` is the name of the argument."""
    names = tuple(choices)
    if value not in names:
        raise UsageError(
            Fault(where=name, expected=" or ".join(names), found=repr(value), remedy="Choose one of these.")
        )

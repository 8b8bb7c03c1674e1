"""CompressedTensorsWeightLoader: a checkpoint directory in, weights in memory out.

It uses the engine's verb and argument order (`load_weights(checkpoint_dir, mapping)`) and works without the engine.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.engine.parallel import Rank
from trtllm_ct.formats.codecs import LIBRARY, NATIVE, Codec
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.pipeline.stream import stream_delivered
from trtllm_ct.plan.ranks.shard import plan_for_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from trtllm_ct.engine.parallel import EngineMapping

__all__ = ["CompressedTensorsWeightLoader", "Decompressor", "Layout"]

Layout = Literal["native", "dense", "stored"]
Decompressor = Literal["auto", "library", "native"]

_TARGET_OF_LAYOUT = {"native": "modelopt", "dense": "dense"}
_CODEC_OF_DECOMPRESSOR = {"auto": NATIVE, "native": NATIVE, "library": LIBRARY}

logger = logging.getLogger("trtllm_ct")


class CompressedTensorsWeightLoader:
    """Loads compressed-tensors weights under Hugging Face names.

    `decompressor` says who decodes: `native` this package's codecs, `library` the compressed-tensors package
    (imported only then; it takes seconds), `auto` this package's codecs for every format that it has. Where the
    package is wanted and not installed, that is logged once and loading goes on without it.
    """

    def __init__(self, *, decompressor: Decompressor = "auto") -> None:
        _require_choice("decompressor", decompressor, _CODEC_OF_DECOMPRESSOR)
        self._decompressor = decompressor

    def load_weights(
        self,
        checkpoint_dir: str | Path,
        mapping: object = None,
        *,
        layout: Layout = "native",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """All weights of a directory by Hugging Face name, contiguous, on the CPU.

        `layout` is `native` (what a ModelOpt directory holds and the engine's Linears read), `dense` (plain weights
        of the model's dtype) or `stored` (as they lie in the files). `mapping` and further keywords are the
        engine's. With a mapping of several ranks the tensors are those that its rank reads: of full size still, but
        only the rows of its slice are there (see `plan_for_rank`); `stored` tensors are whole in any case.
        Memory beyond the result: one module group, and where transforms are folded a weight in float64 for each of up
        to 4 threads. Tensors that need no change are views of the mapped files. Raises `CheckpointError` with all
        faults of the stage that found them.
        """
        weights: dict[str, Tensor] = {}
        with collector_paused():
            for _module, tensors in self.stream(checkpoint_dir, mapping, layout=layout, **kwargs):
                weights |= tensors
        return weights

    def stream(
        self,
        checkpoint_dir: str | Path,
        mapping: object = None,
        *,
        layout: Layout = "native",
        **kwargs: Any,  # noqa: ARG002 (engines of different releases pass different ones)
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The weights of one module after another, as (module name, its tensors by full name); see `load_weights`.

        The plan is made, its warnings are logged and faults are raised before the first module comes. Memory: of some
        modules, see `stream_delivered`.
        """
        _require_choice("layout", layout, ("stored", *_TARGET_OF_LAYOUT))
        if layout == "stored":
            return _stream_stored(Catalog.from_directory(Path(checkpoint_dir)))
        codec = self._codec()
        checkpoint = open_checkpoint(checkpoint_dir)
        rank = _rank(mapping, checkpoint.model.layers)
        plan = checkpoint.plan(_TARGET_OF_LAYOUT[layout], parallel=rank.parallel)
        for warning in plan.warnings:
            logger.warning("%s: %s", checkpoint_dir, warning)
        delivered = stream_delivered(plan_for_rank(plan, checkpoint.model, rank), checkpoint.catalog, codec=codec)
        return ((module.name, tensors) for module, tensors in delivered)

    def _codec(self) -> Codec:
        """The codec of the decompressor; this package's own where the library is missing."""
        if self._decompressor == "native":
            return NATIVE
        # Looking for the package does not import it.
        if importlib.util.find_spec("compressed_tensors") is None:
            _log_missing_library()
            return NATIVE
        return _CODEC_OF_DECOMPRESSOR[self._decompressor]


def _rank(mapping: object, layers: int) -> Rank:
    """The rank that an engine's mapping describes; the only one where there is none, or something else in its place."""
    if hasattr(mapping, "tp_size"):
        return Rank.from_mapping(cast("EngineMapping", mapping), layers)
    return Rank()


@cache
def _log_missing_library() -> None:
    """Once a process."""
    logger.warning("compressed-tensors library not found. Will attempt to load weights as standard safetensors.")
    logger.warning("Install with: pip install compressed-tensors")


def _stream_stored(catalog: Catalog) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each module as they lie in the files."""
    from trtllm_ct.checkpoint.reader import TensorReader

    with TensorReader(catalog) as reader:
        for module, names in catalog.names_by_module().items():
            yield module, {name: reader.read(name) for name in names}


def _require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    names = tuple(choices)
    if value not in names:
        raise UsageError(
            Fault(where=name, expected=" or ".join(names), found=repr(value), remedy="Choose one of these.")
        )

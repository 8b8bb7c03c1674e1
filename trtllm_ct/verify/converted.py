"""Compare a converted directory with its source, tensor by tensor in float64.

The source is read by `source/`, which shares no decoder and no map of names with the conversion. The native layouts of
the converted directory are read by `native_layouts.py`. Neither a plan nor its deliveries take part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.cores import available_cores
from trtllm_ct.base.errors import ConfigError, Fault, UsageError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS
from trtllm_ct.engine.calibration import NOT_CALIBRATED, Calibration
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.engine.requantization import NOT_REQUANTIZED, Requantize
from trtllm_ct.reference.directory import read_quant_config
from trtllm_ct.verify.comparison import Comparison
from trtllm_ct.verify.files import check_files
from trtllm_ct.verify.matching import DirectoryMatch
from trtllm_ct.verify.pairs import spans
from trtllm_ct.verify.requantized import RoundedComparison
from trtllm_ct.verify.shared_scalars import check_fused_scalars
from trtllm_ct.verify.source.files import TensorFiles, tensors_of
from trtllm_ct.verify.source.modules import Modules, read_modules
from trtllm_ct.verify.source.names import Names, has_native_names
from trtllm_ct.verify.source.unlisted import tensors_that_may_be_left_out
from trtllm_ct.verify.statements import check_statements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.verify.matching import NamedPair

__all__ = ["TensorCheck", "checks_of", "compare_converted", "refuse_other_requantization", "source_modules"]

# More than the chunks of one core take together.
_KEPT_BYTES = 8 << 20
# Spans in work at once for each thread: enough that no thread waits while results are collected in order.
_IN_WORK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCheck:
    """The comparison of one delivered weight or tensor with the source.

    `kind` is `native` (quantized on both sides), `requantized` (rounded to codes on request), `dequantized` (quantized
    only in the source) or `plain`.
    """

    name: str
    kind: str
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object({"name": self.name, "kind": self.kind}) | self.comparison.to_dict()


def compare_converted(
    checkpoint: Checkpoint,
    converted: Path,
    faults: FaultCollector,
    progress: Callable[[int], None],
    calibration: Calibration = NOT_CALIBRATED,
) -> tuple[TensorCheck, ...]:
    """Compare every tensor of a converted directory with the source, on all cores.

    `calibration` has the scales of inputs that the directory must have where its source has none.

    Tensors that differ, are missing or have no source are added to `faults`; `progress` is that of `checks_of`. Memory:
    a few chunks of 512 KiB for each core, and the headers of both directories. Raises `CheckpointError` when a
    directory can't be read, and `UsageError` for one that is no conversion.
    """
    catalog = Catalog.from_directory(converted)
    quant_config = QuantConfig()
    if (converted / "hf_quant_config.json").is_file():
        quant_config = read_quant_config(converted / "hf_quant_config.json", catalog)
    converted_config = read_json_object(converted / "config.json") if (converted / "config.json").is_file() else {}
    _refuse_checkpoint(converted, converted_config)
    with TensorFiles(checkpoint.catalog) as source_files, TensorFiles(catalog) as files:
        source = source_modules(checkpoint, source_files, keeps_names=has_native_names(catalog.tensors))
        match = DirectoryMatch(
            config=checkpoint.config,
            source=source,
            optional=tensors_that_may_be_left_out(source, checkpoint.catalog.unlisted, _layers(checkpoint.hf_config)),
            delivered=read_modules(tensors_of(files), Names.of(converted_config)),
            quant_config=quant_config,
            tied=_tied(converted_config),
            faults=faults,
            requantized=replace(recorded_requantization(converted), calibration=calibration),
        )
        checks = tuple(checks_of(match.pairs(), faults, progress))
        check_fused_scalars(match, faults)
        check_statements(match, converted, checkpoint.hf_config, converted_config, faults)
        check_files(catalog, faults)
        match.report_surplus(converted)
    return checks


def _refuse_checkpoint(converted: Path, config: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a compressed-tensors checkpoint, as its config.json says, in place of a conversion."""
    try:
        method = FormatDetector().detect_config(config).method
    except ConfigError:  # `check_statements` says what is wrong with it
        return
    if method == COMPRESSED_TENSORS:
        raise UsageError(
            Fault(
                where=str(converted),
                expected="a directory that `convert` wrote",
                found="a compressed-tensors checkpoint, which was not converted",
                remedy="Name the converted directory second, or compare two checkpoints with `compare`.",
            )
        )


def source_modules(checkpoint: Checkpoint, files: TensorFiles, *, keeps_names: bool = False) -> Modules:
    """Return the modules of the source.

    With `keeps_names` the converted directory has names of Mistral's own form too. Then nothing was put into another
    form, so names are what they are, and rows of queries and keys stay where they are: modules of other classes have
    such names as well.
    """
    config = checkpoint.hf_config
    return read_modules(
        tensors_of(files),
        Names.of(config, () if keeps_names else checkpoint.catalog.tensors),
        transforms={transform.module for transform in checkpoint.config.transforms if transform.online},
        head_dims=(_head_dim(config.get("text_config") or config), _head_dim(config.get("vision_config") or {})),
        declared_rows=checkpoint.config.qk_rows,
        unlisted=checkpoint.catalog.unlisted,
    )


def _head_dim(config: Mapping[str, Any]) -> int:
    """Return the rows of a head; 0 if the configuration does not tell it, or tells it for each layer."""
    stated, hidden, heads = (config.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(stated, int) and stated:
        return stated
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


def _layers(config: Mapping[str, Any]) -> int:
    """Return the number of layers of the text model, 0 if the configuration does not tell it."""
    layers = (config.get("text_config") or config).get("num_hidden_layers")
    return layers if isinstance(layers, int) else 0


def _tied(config: Mapping[str, Any]) -> bool:
    """Whether a converted directory says that its head is its table, or leaves it to the class of the model."""
    flags = (block.get("tie_word_embeddings") for block in (config, config.get("text_config") or {}))
    return next((bool(flag) for flag in flags if flag is not None), True)


def checks_of(
    pairs: Iterable[NamedPair], faults: FaultCollector, progress: Callable[[int], None]
) -> Iterator[TensorCheck]:
    """Yield the check of every pair in their order, and add a fault for each that differs.

    `progress` is called with the number of elements of each pair.
    """
    _keep_freed_memory()
    cores = available_cores()
    with ThreadPoolExecutor(cores) as pool:
        in_work: deque[tuple[NamedPair, list[Future[Comparison]]]] = deque()
        count = 0
        for pair in pairs:
            futures = [pool.submit(pair.pair.over, span) for span in spans(pair.pair)]
            in_work.append((pair, futures))
            count += len(futures)
            while count > _IN_WORK * cores and len(in_work) > 1:
                count -= len(in_work[0][1])
                yield _check(*in_work.popleft(), faults, progress)
        while in_work:
            yield _check(*in_work.popleft(), faults, progress)


def _keep_freed_memory() -> None:
    """Let the allocator reuse the arrays of a chunk for the next one.

    By default glibc returns blocks from 128 KiB on to the kernel, which has to clear their pages again for the next
    chunk; that takes about as long as the comparison itself. A larger block that was freed raises this limit to its
    size.
    Source: glibc `malloc/malloc.c`, the dynamic M_MMAP_THRESHOLD. Other allocators are not affected.
    """
    np.empty(_KEPT_BYTES, np.uint8)


def _check(
    pair: NamedPair, futures: list[Future[Comparison]], faults: FaultCollector, progress: Callable[[int], None]
) -> TensorCheck:
    """Return the check of a pair whose spans are in work; add a fault if it failed."""
    comparison = reduce(Comparison.joined, [future.result() for future in futures])
    progress(prod(pair.pair.shape))
    if isinstance(comparison, RoundedComparison):
        _check_rounding(pair, comparison, faults)
    elif not comparison.good:
        faults.add(
            where=f"{pair.name}, {comparison.block}",
            expected=f"{comparison.want:.9g}",
            found=f"{comparison.got:.9g}, the worst of {comparison.differing} elements",
            remedy="The converted weight is wrong; convert again, and report it if it stays.",
        )
    return TensorCheck(name=pair.name, kind=pair.kind, comparison=comparison)


def _check_rounding(pair: NamedPair, comparison: RoundedComparison, faults: FaultCollector) -> None:
    """Add a fault if a requantized weight is further from the exact one than its form allows."""
    if pair.form is None or (comparison.good and comparison.relative_error <= pair.form.largest_error):
        return
    share = "" if comparison.good else f"; {comparison.differing} codes are not the nearest ones"
    faults.add(
        where=f"{pair.name}, {comparison.block}",
        expected=f"{comparison.want:.9g}, rounded to {pair.form.name} with a relative error of the weight "
        f"up to {pair.form.largest_error}",
        found=f"{comparison.got:.9g}, and a relative error of {comparison.relative_error:.3g}{share}",
        remedy="The converted weight is wrong; convert again, and report it if it stays.",
    )


def refuse_other_requantization(converted: Path, asked: Requantize, faults: FaultCollector) -> None:
    """Add a fault if modules of a directory were rounded to codes that were not asked for, or none at all.

    A directory records only what was rounded: nothing may be left to round of what was asked for besides.
    """
    recorded = recorded_requantization(converted)
    if not recorded.words.items() <= asked.words.items() or (not recorded.words) != (not asked.words):
        faults.add(
            where=str(converted),
            expected=f"a directory converted with {_as_options(asked)}",
            found=_as_options(recorded),
            remedy="Convert with these options, or leave --requantize out to check what the directory says of itself.",
        )


def _as_options(asked: Requantize) -> str:
    options = " ".join(f"--requantize {what}={form}" for what, form in asked.words.items())
    return options or "nothing requantized"


def recorded_requantization(converted: Path) -> Requantize:
    """Return what a directory says that it was asked to round to codes."""
    path = converted / "hf_quant_config.json"
    record = read_json_object(path).get("planned_for") if path.is_file() else None
    asked = record.get("requantized") if isinstance(record, Mapping) else None
    if not isinstance(asked, Mapping):
        return NOT_REQUANTIZED
    try:
        return Requantize.parse({str(what): str(form) for what, form in asked.items()})
    except UsageError as error:
        where = f"{path}: planned_for.requantized"
        raise ConfigError(*(replace(fault, where=where) for fault in error.faults)) from None

"""`convert_checkpoint`: convert a compressed-tensors directory into that of another format.

The output directory appears only when the conversion is complete.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from trtllm_ct.base.arguments import FLAG, Check, check_arguments, path_of, whole_number
from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.memory_errors import memory_errors
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.base.source_errors import source_errors
from trtllm_ct.checkpoint.opening import names_folder
from trtllm_ct.checkpoint.output import check_output_place, replacing_directory
from trtllm_ct.checkpoint.side_patterns import carried_patterns, matches_any
from trtllm_ct.convert.executors import open_pool
from trtllm_ct.convert.hf_directory import DeliveredFiles, write_hf_directory
from trtllm_ct.convert.job import Conversion, Job
from trtllm_ct.convert.sizes import size_warnings
from trtllm_ct.convert.staging import shards_of, staged_source
from trtllm_ct.engine.target import DIRECTORY_TARGETS, MODELOPT
from trtllm_ct.pipeline.gpus import gpu_rows
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.options import PlanArguments, PlanOptions
from trtllm_ct.plan.parts import Part, parts_of
from trtllm_ct.plan.plan import Plan
from trtllm_ct.plan.verdict import verdict

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from trtllm_ct.checkpoint.folder import Folder
    from trtllm_ct.checkpoint.side_files import SideFiles
    from trtllm_ct.convert.shards import DownloadStarted
    from trtllm_ct.pipeline.gpus import GpuRow
    from trtllm_ct.pipeline.open import Checkpoint

__all__ = ["ConversionReport", "convert_checkpoint"]

DEFAULT_SHARD_BYTES = 5 * 10**9

Started = Callable[[Plan], Callable[[int], None]]
"""Called with the plan before the first byte is written; returns a progress callback.

The progress callback is called with a number of delivered bytes each time a unit is finished.
"""


_BYTES = whole_number("a number of bytes, such as 5 * 10**9", "Write a number: words such as 5GB are for the command.")
_FUNCTION = Check("a function", callable).or_none()
_CHECKS: Mapping[str, Check] = {
    "overwrite": FLAG,
    "force": FLAG,
    "sync": FLAG,
    "max_shard_bytes": _BYTES,
    "keep": _BYTES.or_none(),
    "on_start": _FUNCTION,
    "on_download": _FUNCTION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        source: The directory that was converted, or the name of the repository with its commit.
        out: The directory that was written.
        plan: The plan, which holds the mode of each module and the reasons of dequantized ones.
        weight_files: Names of the weight files in `out`, with the index if there is one.
        carried_files: Names of the side files (tokenizer and so on) that were copied from `source`.
        code_files: Those of them that are code, which whoever loads `out` may run.
        left_out_files: Entries of `source` that were not copied, because they are of no known kind; a folder ends in /.
        resumed_bytes: Delivered bytes that an earlier, interrupted run had already written.
        downloaded_bytes: Bytes of weight files that were downloaded; 0 for a directory.
        seconds: Wall time of the conversion.
        warnings: The plan's warnings, and one about parallel sizes at which an engine would misread the output.
        checkpoint: The checkpoint that was converted, by which `parts` and `gpus` are known.
        options: The options that the plan was made with.
    """

    source: Path | str
    out: Path
    plan: Plan
    weight_files: tuple[str, ...]
    carried_files: tuple[str, ...]
    resumed_bytes: int
    seconds: float
    downloaded_bytes: int = 0
    warnings: tuple[str, ...] = ()
    code_files: tuple[str, ...] = ()
    left_out_files: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    options: PlanOptions = field(default_factory=PlanOptions, repr=False)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The bytes by kind of module."""
        return parts_of(self.plan, self.checkpoint.model) if self.checkpoint else ()

    def gpus(self) -> tuple[GpuRow, ...]:
        """Return what one GPU needs at common parallel sizes; takes up to a few seconds."""
        return gpu_rows(self.checkpoint, self.plan, self.options) if self.checkpoint else ()

    @property
    def modes(self) -> Counter[str]:
        """The number of modules for each delivered mode; counts only modules that are stored quantized."""
        return Counter(module.delivered_mode for module in self.plan.modules if module.weight is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return json_object(
            {
                "source": self.source,
                "out": self.out,
                "target": self.plan.target,
                "parallel": self.plan.parallel,
                "verdict": verdict(self.plan, self.plan.problems),
                "modes": self.modes,
                "dequantized": {module.name: module.reason for module in self.plan.modules if module.dequantized},
                "stored_bytes": self.plan.stored_bytes,
                "delivered_bytes": self.plan.delivered_bytes,
                "parts": self.parts,
                "gpus": self.gpus(),
                "resumed_bytes": self.resumed_bytes,
                "downloaded_bytes": self.downloaded_bytes,
                "weight_files": self.weight_files,
                "carried_files": self.carried_files,
                "code_files": self.code_files,
                "left_out_files": self.left_out_files,
                "seconds": self.seconds,
                "deviations": self.plan.deviations,
                "checks": self.plan.checks,
                "build_options": self.plan.build_options,
                "run_options": self.plan.run_options,
                "warnings": self.warnings,
                "problems": self.plan.problems,
            }
        )


class ConvertArguments(PlanArguments, total=False):
    """The keyword arguments of `convert_checkpoint` beside `executor`, on which the type of its result depends."""

    to: str
    overwrite: bool
    force: bool
    sync: bool
    carry: str | Iterable[str]
    max_shard_bytes: int
    keep: int | None
    workers: int | None
    on_start: Started | None
    on_download: DownloadStarted | None


@overload
def convert_checkpoint(
    directory: str | Path,
    out: str | Path,
    *,
    executor: Literal["threads"] = ...,
    **arguments: Unpack[ConvertArguments],
) -> ConversionReport: ...


@overload
def convert_checkpoint(
    directory: str | Path, out: str | Path, *, executor: str, **arguments: Unpack[ConvertArguments]
) -> ConversionReport | None: ...


@missing_packages_as_errors()
@memory_errors()
def convert_checkpoint(
    directory: str | Path,
    out: str | Path,
    *,
    to: str = MODELOPT.name,
    overwrite: bool = False,
    force: bool = False,
    sync: bool = True,
    carry: str | Iterable[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    keep: int | None = None,
    executor: str = "threads",
    workers: int | None = None,
    on_start: Started | None = None,
    on_download: DownloadStarted | None = None,
    **asked: Unpack[PlanArguments],
) -> ConversionReport | None:
    """Convert a checkpoint directory for the target `to`, which is `modelopt`, `dense` or `engine`.

    `directory` may be the name of a repository of the Hub too, see `open_source`. Its weight files are then downloaded
    into the working directory when a module needs them, at most `keep` bytes of them at a time (`staging.py`).
    `on_download` is called with the bytes of all downloads, and returns a callback for those that have come; threads
    call it.

    `asked` are the options of `PlanOptions`: the release, the GPUs and the parallel sizes that the directory is made
    for, and what becomes of modules that no mode holds. The output directory itself is not split by rank, except that
    of `engine`, which has a file for each rank. With `dtype` `float16`, and for `engine`, all plain tensors are cast as
    well, and a value that overflows is an error.

    Side files of known kinds are copied, and those that `carry` matches, one pattern or several
    (`checkpoint/side_patterns.py`); the report names the others, and its warnings the patterns that match no file.

    `executor` runs the work in units: `threads` starts `workers` of them, one for each core by default; `mpi` uses the
    ranks of the MPI job, each of which must make this call, and all but rank 0 get None. The output bytes are the same
    for every executor and number of workers. The output is written to `.OUT.partial` beside `out`, which is renamed to
    `out` at the end and removed when the checkpoint has faults. A run that ends in any other way leaves `.OUT.partial`
    in place, and the same call resumes from it; so does one that can't read the checkpoint again. Memory: a few rows of
    a tensor for each worker, independent of the size of the tensors.
    `overwrite` replaces an existing `out` that a conversion wrote, and `force` with it any model directory. With
    `sync` the output survives a power cut once this function has returned; see `replacing_directory`.

    Raises `UsageError` for invalid arguments, before anything is read, the `CheckpointError` of the stage that finds
    faults in the checkpoint, `OutputError` when the file system of `out` fails, and `LimitError` without enough memory.
    """
    out = path_of("out", out)
    place = directory if isinstance(directory, str) else path_of("directory", directory)
    started = time.perf_counter()
    # The collector finds nothing to free: tiles and their plans form no reference cycles.
    with open_pool(executor, workers) as pool, collector_paused():
        if pool is None:
            return None
        # On one rank only: the others would wait forever for one that ends before they have work.
        given = {"overwrite": overwrite, "force": force, "sync": sync, "max_shard_bytes": max_shard_bytes, "keep": keep}
        check_arguments(_CHECKS, given | {"on_start": on_start, "on_download": on_download})
        _require_possible(to, max_shard_bytes, keep)
        _refuse_force_alone(overwrite=overwrite, force=force)
        patterns = carried_patterns(carry)
        options = PlanOptions.of(to, **asked)
        if names_folder(place):
            check_output_place(Path(place), out)
        # Open the output before reading the source, so that an output that can't be written fails at once.
        with replacing_directory(out, overwrite=overwrite, force=force, sync=sync) as partial:
            with source_errors(place):
                checkpoint = open_checkpoint(staged_source(place, partial, executor))
                conversion = _planned(checkpoint, options, max_shard_bytes, partial)
                conversion.shards = shards_of(conversion, keep, on_download or (lambda _total: _ignore))
            progress = on_start(conversion.plan) if on_start else _ignore
            files = write_hf_directory(conversion, pool, progress=progress, carry=patterns)
    unused = _unmatched(patterns, files.side_files) + _unused_room(conversion, keep)
    return _report(out, conversion, files, unused, time.perf_counter() - started)


def _planned(checkpoint: Checkpoint, options: PlanOptions, max_shard_bytes: int, files: Folder) -> Conversion:
    """Return the conversion of a checkpoint; unlike a worker's, its plan is compared with the model's class."""
    job = Job(directory=checkpoint.directory.absolute(), options=options, max_shard_bytes=max_shard_bytes, files=files)
    return Conversion(job, checkpoint, checkpoint.plan_for(options, compare_class=True))


def _report(
    out: Path, conversion: Conversion, files: DeliveredFiles, unused: tuple[str, ...], seconds: float
) -> ConversionReport:
    """Return the report of a conversion that is complete."""
    source = conversion.checkpoint.source
    return ConversionReport(
        source=source.folder or source.place,
        out=out,
        plan=conversion.plan,
        weight_files=files.weights,
        carried_files=files.side_files.carried,
        code_files=files.side_files.code,
        left_out_files=files.side_files.left_out,
        checkpoint=conversion.checkpoint,
        options=conversion.job.options,
        resumed_bytes=files.resumed_bytes,
        downloaded_bytes=conversion.shards.downloaded,
        seconds=seconds,
        warnings=conversion.plan.warnings + size_warnings(conversion.checkpoint, conversion.plan) + unused,
    )


def _unmatched(carry: tuple[str, ...], files: SideFiles) -> tuple[str, ...]:
    """Return a warning for each pattern that no copied file matches; engines' files have no side files at all."""
    unmatched = (pattern for pattern in carry if not any(matches_any(name, (pattern,)) for name in files.carried))
    return tuple(f"--carry {pattern}: no file that can be copied has such a name" for pattern in unmatched)


def _unused_room(conversion: Conversion, keep: int | None) -> tuple[str, ...]:
    """Return a warning about room for downloads where nothing is downloaded."""
    if keep is None or conversion.checkpoint.source.folder is None:
        return ()
    return ("--keep: it has no effect, as nothing of a directory is downloaded",)


def _ignore(nbytes: int) -> None:
    """Ignore progress; used when the caller passes no `on_start`."""


def _refuse_force_alone(*, overwrite: bool, force: bool) -> None:
    """Raise `UsageError` for `force` without `overwrite`, which alone replaces nothing."""
    if force and not overwrite:
        expected, remedy = "--overwrite beside it", "Give both to replace any model directory, or leave it out."
        raise UsageError(Fault(where="--force", expected=expected, found="--force alone", remedy=remedy))


def _require_possible(to: str, max_shard_bytes: int, keep: int | None) -> None:
    """Raise `UsageError` for a target that is no directory, and for numbers of bytes below one."""
    if to not in DIRECTORY_TARGETS:
        expected = " or ".join(DIRECTORY_TARGETS)
        raise UsageError(Fault(where="--to", expected=expected, found=repr(to), remedy="Choose one of these."))
    for option, nbytes, default in (("--max-shard-size", max_shard_bytes, "files of 5 GB"), ("--keep", keep, "20 GB")):
        if nbytes is not None and nbytes < 1:
            remedy = f"Leave it out for {default}."
            raise UsageError(Fault(where=option, expected="at least one byte", found=str(nbytes), remedy=remedy))

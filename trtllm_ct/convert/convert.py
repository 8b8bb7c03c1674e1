"""`convert_checkpoint`: a compressed-tensors directory in, a ModelOpt or plain directory out, whole or not at all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.checkpoint.output import check_output_place, replacing_directory
from trtllm_ct.convert.executors import open_pool, require_executor
from trtllm_ct.convert.hf_directory import write_hf_directory
from trtllm_ct.convert.job import Conversion, Job
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.engine.target import DIRECTORY_TARGETS
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.plan import Plan

__all__ = ["DENSE_DTYPES", "ConversionReport", "convert_checkpoint"]

DENSE_DTYPES = ("auto", "bfloat16", "float16", "float32")
DEFAULT_SHARD_BYTES = 5 * 10**9

Started = Callable[[Plan], Callable[[int], None]]
"""Called with the plan when writing begins; gives the function that is told of bytes as they are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion did: bytes, seconds, how many modules of each mode, and which were dequantized and why.

    `resumed_bytes` of what was delivered had been written by an earlier run that was stopped.
    """

    source: Path
    out: Path
    plan: Plan
    weight_files: tuple[str, ...]
    carried_files: tuple[str, ...]
    resumed_bytes: int
    seconds: float

    @property
    def modes(self) -> Counter[str]:
        """Delivered mode to number of modules, quantized modules only."""
        return Counter(module.delivered_mode for module in self.plan.modules if module.weight is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "target": self.plan.target,
            "parallel": self.plan.parallel.to_dict(),
            "modes": dict(self.modes),
            "dequantized": {module.name: module.reason for module in self.plan.modules if module.dequantized},
            "stored_bytes": self.plan.stored_bytes,
            "delivered_bytes": self.plan.delivered_bytes,
            "resumed_bytes": self.resumed_bytes,
            "weight_files": list(self.weight_files),
            "carried_files": list(self.carried_files),
            "seconds": self.seconds,
            "warnings": list(self.plan.warnings),
        }


@overload
def convert_checkpoint(
    directory: str | Path,
    out: str | Path,
    *,
    to: str = ...,
    engine: str = ...,
    parallel: Parallel = ...,
    dtype: str = ...,
    strict: bool = ...,
    overwrite: bool = ...,
    max_shard_bytes: int = ...,
    device: str = ...,
    executor: Literal["threads"] = ...,
    workers: int | None = ...,
    on_start: Started | None = ...,
) -> ConversionReport: ...


@overload
def convert_checkpoint(
    directory: str | Path,
    out: str | Path,
    *,
    to: str = ...,
    engine: str = ...,
    parallel: Parallel = ...,
    dtype: str = ...,
    strict: bool = ...,
    overwrite: bool = ...,
    max_shard_bytes: int = ...,
    device: str = ...,
    executor: str,
    workers: int | None = ...,
    on_start: Started | None = ...,
) -> ConversionReport | None: ...


def convert_checkpoint(
    directory: str | Path,
    out: str | Path,
    *,
    to: str = "modelopt",
    engine: str = DEFAULT_ENGINE,
    parallel: Parallel = ONE_RANK,
    dtype: str = "auto",
    strict: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    device: str = "cpu",
    executor: str = "threads",
    workers: int | None = None,
    on_start: Started | None = None,
) -> ConversionReport | None:
    """Convert a directory for the target `to`, `modelopt` or `dense`.

    `engine` is the capability set of stock TensorRT-LLM that `modelopt` is made for, `parallel` the sizes that it will
    run with: a module of which ranks get slices that its mode doesn't hold is dequantized. The directory is whole.
    `dtype` is that of dequantized modules (auto: the model's); with float16 every plain tensor is cast too, and one
    that does not fit is an error.

    The work is cut into units that `executor` runs: `threads`, as many as `workers` says or one for each core, or
    `mpi`, the ranks of the job, which all call this; None is returned on all of them but the first. The bytes that
    come out don't depend on it. Work happens in `.OUT.partial` beside `out`, which becomes `out` at the end and is
    removed on any error. A run that was killed or interrupted leaves it, and the same call goes on from there.
    Memory: some rows of a tensor for each worker, whatever the size of tensors. Raises `UsageError` before anything is
    read, and the `CheckpointError` of the stage that found faults.
    """
    directory, out = Path(directory), Path(out)
    _require_one_of("--to", to, DIRECTORY_TARGETS)
    _require_one_of("--dtype", dtype, DENSE_DTYPES)
    _require_device(device)
    _require_shard_size(max_shard_bytes)
    require_executor(executor, workers)
    check_output_place(directory, out)
    started = time.perf_counter()
    options: dict[str, Any] = {
        "to": to,
        "engine": engine,
        "dtype": None if dtype == "auto" else DType.from_torch(dtype),
        "strict": strict,
        "parallel": parallel,
    }
    # Tiles and their plans form no cycles, and walking all that torch brings with it takes half a second.
    with open_pool(executor, workers) as pool, collector_paused():
        if pool is None:
            return None
        # Entered before the source is read: an output that can't be written is refused at once.
        with replacing_directory(out, overwrite=overwrite) as partial:
            job = Job(
                directory=directory.absolute(),
                options=options,
                max_shard_bytes=max_shard_bytes,
                device=device,
                files=partial,
            )
            checkpoint = open_checkpoint(directory)
            conversion = Conversion(job, checkpoint, checkpoint.plan(**options))
            progress = on_start(conversion.plan) if on_start else _ignore
            files = write_hf_directory(conversion, pool, progress=progress)
    return ConversionReport(
        source=directory,
        out=out,
        plan=conversion.plan,
        weight_files=files.weights,
        carried_files=files.carried,
        resumed_bytes=files.resumed_bytes,
        seconds=time.perf_counter() - started,
    )


def _ignore(nbytes: int) -> None:
    """Progress that nobody watches."""


def _require_one_of(option: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise UsageError(
            Fault(where=option, expected=" or ".join(values), found=repr(value), remedy="Choose one of these.")
        )


def _require_shard_size(max_shard_bytes: int) -> None:
    if max_shard_bytes < 1:
        raise UsageError(
            Fault(
                where="--max-shard-size",
                expected="at least one byte",
                found=str(max_shard_bytes),
                remedy="Leave it out for files of 5 GB.",
            )
        )


def _require_device(device: str) -> None:
    if device == "cpu":
        return  # torch takes a second to import, in which much can be copied
    import torch

    try:
        usable = torch.device(device).type == "cpu" or torch.empty(0, device=device).is_cuda
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UsageError(
            Fault(
                where="--device",
                expected="cpu, or cuda on a machine with a GPU and a torch that was built for it",
                found=repr(device),
                remedy="Leave --device out to convert on the CPU.",
            )
        )

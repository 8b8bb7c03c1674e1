"""`verify_with_sizes`: verify a checkpoint, and whether a converted directory suits given parallel sizes and GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CheckpointError, Fault, UsageError
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.convert.sizes import ConvertedDirectory, model_of_directory
from trtllm_ct.engine.build_modes import KERNEL_SMS, kernel_modes
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.engine.target import ENGINE, MODELOPT, target_named
from trtllm_ct.plan.ranks.held import uneven_faults
from trtllm_ct.verify.engine_ranks import is_engine_directory
from trtllm_ct.verify.verify import Started, VerificationReport, verify_checkpoint

if TYPE_CHECKING:
    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.engine.requantization import Requantize

__all__ = ["verify_with_sizes"]


def verify_with_sizes(
    directory: str | Path,
    converted: str | Path | None,
    parallel: Parallel | None,
    sm: int | None = None,
    *,
    requantize: Requantize | None = None,
    on_start: Started | None = None,
) -> VerificationReport:
    """Verify as `verify_checkpoint` does, and add faults if the converted directory doesn't suit sizes or GPUs.

    With `parallel`, it must hold these sizes; with `sm`, the GPUs of this SM must run its modes. An engine-build
    checkpoint is for its own sizes alone, and for its own GPUs if its codes are in the order of a kernel. `requantize`
    is that of `verify_checkpoint`.
    `directory` may be a converted directory for the PyTorch backend itself. Without its source only these two are
    checked.
    Raises what `verify_checkpoint` raises, and `UsageError` for an unknown SM, and for a `directory` alone that is no
    converted one: a checkpoint holds no slices and has no modes.
    """
    if parallel is None and sm is None:
        return verify_checkpoint(directory, converted, requantize=requantize, on_start=on_start)
    if converted is not None and is_engine_directory(Path(converted)):
        target_named(ENGINE.name, sm=sm)
        verification = verify_checkpoint(directory, converted, requantize=requantize, on_start=on_start)
        return replace(verification, faults=verification.faults + _engine_faults(Path(converted), parallel, sm))
    out = Path(directory if converted is None else converted)
    made, faults = _opened(out)
    platform = target_named(MODELOPT.name, (made and made.engine) or DEFAULT_ENGINE, sm=sm).capabilities.platform
    if made is not None:
        faults += made.faults(parallel) if parallel is not None else ()
        faults += made.gpu_faults(platform) if platform is not None else ()
    elif converted is not None and parallel is not None and not faults:
        faults = _uneven(out, parallel)
    if converted is None and (made is not None or faults):
        modules = made.modules if made is not None else 0
        return VerificationReport(
            directory=Path(directory), converted=None, modules=modules, zero_scales=0, checks=(), faults=faults
        )
    if converted is None:
        raise UsageError(_no_sizes(out))
    verification = verify_checkpoint(directory, converted, requantize=requantize, on_start=on_start)
    known = {fault.where for fault in verification.faults}
    more = tuple(fault for fault in faults if fault.where not in known)
    return replace(verification, faults=verification.faults + more)


def _no_sizes(directory: Path) -> Fault:
    """Return the fault of sizes or GPUs that were given for a directory that was not converted for them."""
    if is_engine_directory(directory):
        return Fault(
            where=str(directory),
            expected="the source of an engine-build checkpoint before it, as its codes show their modes only beside it",
            found="an engine-build checkpoint alone",
            remedy=f"Name the source too: verify DIR {directory}.",
        )
    return Fault(
        where=str(directory),
        expected="a directory that was converted for TensorRT-LLM, as sizes and GPUs are those of its modes",
        found="no hf_quant_config.json that this package wrote",
        remedy="Name the converted directory too: verify DIR OUT. `inspect DIR` has the same options, and shows how a "
        "checkpoint would be converted for them.",
    )


def _opened(out: Path) -> tuple[ConvertedDirectory | None, tuple[Fault, ...]]:
    """Return a directory that this package converted for TensorRT-LLM, or why its sizes are not known.

    Both are empty for any other directory.
    """
    try:
        made = ConvertedDirectory.open(out)
    except CheckpointError as error:
        return None, error.faults
    if made is not None and made.record_fault is not None:
        return None, (made.record_fault,)
    return made, ()


def _uneven(out: Path, parallel: Parallel) -> tuple[Fault, ...]:
    """Return why plain weights can't be divided among so many ranks; empty if they can."""
    try:
        return uneven_faults(model_of_directory(Folder(out), QuantConfig()), parallel)
    except CheckpointError as error:
        return error.faults


def _engine_faults(converted: Path, parallel: Parallel | None, sm: int | None) -> tuple[Fault, ...]:
    """Return why an engine-build checkpoint doesn't suit sizes or GPUs; empty if it does."""
    config = read_json_object(converted / "config.json")
    mapping, made_for = config["mapping"], config.get("producer", {}).get("sm")
    sizes = (mapping["tp_size"], mapping["pp_size"])
    faults = []
    if parallel is not None and (parallel.tensor, parallel.pipeline) != sizes:
        faults.append(
            Fault(
                where=str(converted),
                expected="the sizes that it was converted for: --tp {} --pp {}".format(*sizes),
                found=f"--tp {parallel.tensor} --pp {parallel.pipeline}",
                remedy="Convert the source again with these sizes.",
            )
        )
    if sm is not None and made_for in KERNEL_SMS and not _same_order(made_for, sm):
        faults.append(
            Fault(
                where=str(converted),
                expected=f"GPUs of SM{made_for}, in whose order the codes are",
                found=f"SM{sm}, where an engine would compute wrong results without a message",
                remedy="Convert the source again for these GPUs, or without --sm for all of them.",
            )
        )
    return tuple(faults)


def _same_order(made_for: int, sm: int) -> bool:
    """Whether kernels on the GPUs of two SMs read codes in the same order."""
    orders = [{mode.order for mode in kernel_modes(known)} for known in (made_for, sm) if known in KERNEL_SMS]
    return len(orders) == 2 and orders[0] == orders[1]

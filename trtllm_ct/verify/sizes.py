"""`verify_with_sizes`: verify a checkpoint, and whether a converted directory suits given parallel sizes and GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.convert.sizes import ConvertedDirectory
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.engine.target import MODELOPT, target_named
from trtllm_ct.verify.verify import VerificationReport, verify_checkpoint

if TYPE_CHECKING:
    from trtllm_ct.engine.parallel import Parallel

__all__ = ["verify_with_sizes"]


def verify_with_sizes(
    directory: str | Path, converted: str | Path | None, parallel: Parallel | None, sm: int | None = None
) -> VerificationReport:
    """Verify as `verify_checkpoint` does, and add faults if the converted directory doesn't suit sizes or GPUs.

    With `parallel`, it must hold these sizes; with `sm`, the GPUs of this SM must run its modes. `directory` may then
    be a converted directory itself. Without its source only these two are checked.
    Raises what `verify_checkpoint` raises, and `UsageError` for an unknown SM.
    """
    if parallel is None and sm is None:
        return verify_checkpoint(directory, converted)
    made = ConvertedDirectory.open(directory if converted is None else converted)
    platform = target_named(MODELOPT.name, made.engine if made else DEFAULT_ENGINE, sm=sm).capabilities.platform
    faults = made.faults(parallel) if made is not None and parallel is not None else ()
    faults += made.gpu_faults(platform) if made is not None and platform is not None else ()
    if converted is None and made is not None:
        return VerificationReport(
            directory=Path(directory), converted=None, modules=made.modules, zero_scales=0, checks=(), faults=faults
        )
    verification = verify_checkpoint(directory, converted)
    return replace(verification, faults=verification.faults + faults)

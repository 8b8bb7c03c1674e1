"""`verify_with_sizes`: verify a checkpoint, and whether a converted directory holds given parallel sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.convert.sizes import ConvertedDirectory
from trtllm_ct.verify.verify import VerificationReport, verify_checkpoint

if TYPE_CHECKING:
    from trtllm_ct.engine.parallel import Parallel

__all__ = ["verify_with_sizes"]


def verify_with_sizes(
    directory: str | Path, converted: str | Path | None, parallel: Parallel | None
) -> VerificationReport:
    """Verify as `verify_checkpoint` does; with `parallel`, add a fault if the converted directory doesn't hold them.

    `directory` may then be a converted directory itself. Without its source only the sizes are checked.
    Raises what `verify_checkpoint` raises.
    """
    if parallel is None:
        return verify_checkpoint(directory, converted)
    made = ConvertedDirectory.open(directory if converted is None else converted)
    faults = made.faults(parallel) if made is not None else ()
    if converted is None and made is not None:
        return VerificationReport(
            directory=Path(directory), converted=None, modules=made.modules, zero_scales=0, checks=(), faults=faults
        )
    verification = verify_checkpoint(directory, converted)
    return replace(verification, faults=verification.faults + faults)

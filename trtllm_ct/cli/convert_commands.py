"""Commands that write a directory and check one: `convert` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_ct.cli.interrupts import going_on_from, nothing_written
from trtllm_ct.cli.options import (
    DIRECTORY,
    THREADS,
    AskedExpertParallel,
    AskedPipelineParallel,
    AskedSm,
    AskedTensorParallel,
    CalibrationOption,
    Carry,
    Directory,
    DirectoryTarget,
    Executor,
    Force,
    Html,
    Json,
    Keep,
    MaxShardSize,
    NoSync,
    Overwrite,
    RequantizeOption,
    SourcePlace,
    Strict,
    Workers,
    asked_parallel,
    parse_size,
    takes_plan_options,
)
from trtllm_ct.cli.page.written import check_page_place
from trtllm_ct.cli.progress import shown_progress
from trtllm_ct.cli.run import conversion_progress, print_json, show_page, stderr, stdout

if TYPE_CHECKING:
    from trtllm_ct.plan.options import PlanArguments

__all__ = ["convert", "verify"]


@takes_plan_options
def convert(
    directory: SourcePlace,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory to create.", show_default=False)],
    to: Annotated[DirectoryTarget, typer.Option(help="Format to convert to.")] = DIRECTORY,
    *,
    asked: PlanArguments,
    strict: Strict = False,
    overwrite: Overwrite = False,
    force: Force = False,
    no_sync: NoSync = False,
    carry: Carry = None,
    max_shard_size: MaxShardSize = "5GB",
    keep: Keep = None,
    executor: Executor = THREADS,
    workers: Workers = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint for TensorRT-LLM, or to plain weights.

    The result is a ModelOpt directory, plain Hugging Face weights, or the files that trtllm-build reads.
    """
    from trtllm_ct.checkpoint.output import what_is_left
    from trtllm_ct.convert.convert import convert_checkpoint

    check_page_place(html, directory, out)
    asked["strict"] = strict
    with going_on_from(what_is_left(out)), conversion_progress() as (on_start, on_download):
        conversion = convert_checkpoint(
            directory,
            out,
            to=to,
            overwrite=overwrite,
            carry=carry or (),
            force=force,
            sync=not no_sync,
            max_shard_bytes=parse_size(max_shard_size),
            keep=None if keep is None else parse_size(keep, "--keep"),
            executor=executor,
            workers=workers,
            on_start=on_start,
            on_download=on_download,
            **asked,
        )
    if conversion is None:
        return  # This is not rank 0 of an MPI job; rank 0 prints the report.
    if as_json:
        print_json("convert", conversion.to_dict())
    else:
        from trtllm_ct.cli import report

        stdout.print(report.conversion(conversion))
    if html:
        from trtllm_ct.cli.page.pages import conversion_page

        show_page(html, conversion_page(conversion, conversion.to_dict()))


def verify(
    directory: Directory,
    converted: Annotated[
        Path | None, typer.Argument(metavar="CONVERTED", help="A directory converted from DIR.", show_default=False)
    ] = None,
    tp: AskedTensorParallel = None,
    pp: AskedPipelineParallel = None,
    ep: AskedExpertParallel = None,
    sm: AskedSm = None,
    requantize: RequantizeOption = None,
    calibration: CalibrationOption = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint, and what was converted from it.

    A checkpoint is sound if it is complete and all values are valid; a converted directory has to hold its weights
    exactly. With --tp, --pp or --ep, check that the converted directory holds the slices of these sizes too, and with
    --sm, that these GPUs run its modes; DIR may be that directory itself.
    """
    from trtllm_ct.pipeline.calibration import asked_requantization
    from trtllm_ct.verify.sizes import verify_with_sizes

    check_page_place(html, directory, converted)
    left = nothing_written("the same command starts from the beginning")
    with going_on_from(left), shown_progress(stderr, "Verifying") as on_start:
        verification = verify_with_sizes(
            directory,
            converted,
            asked_parallel(tp, pp, ep),
            sm,
            requantize=asked_requantization(requantize, calibration) if requantize or calibration else None,
            on_start=on_start,
        )
    if as_json:
        print_json("verify", verification.to_dict())
    else:
        from trtllm_ct.cli import report

        stdout.print(report.verification(verification))
    if html:
        from trtllm_ct.cli.page.pages import verification_page

        show_page(html, verification_page(verification, verification.to_dict()))
    if not verification.good:
        raise typer.Exit(1)

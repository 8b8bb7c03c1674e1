"""The command line: parse arguments, call the pipeline, print the report.

Results go to stdout, everything else to stderr. Exit codes: 0 for success, 2 for wrong usage, 1 for a faulty
checkpoint or any other error, 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_ct.cli import report
from trtllm_ct.cli.interrupts import going_on_from, nothing_written
from trtllm_ct.cli.options import (
    AUTO,
    DIRECTORY,
    ENGINE,
    THREADS,
    TO_MODELOPT,
    AskedExpertParallel,
    AskedPipelineParallel,
    AskedSm,
    AskedTensorParallel,
    Chat,
    DenseDtypeOption,
    DenseOutput,
    Directory,
    DirectoryTarget,
    ExecutorName,
    ExpertParallel,
    ForEngine,
    ForSm,
    Json,
    PipelineParallel,
    Seed,
    Strict,
    TargetName,
    Temperature,
    TensorParallel,
    Untested,
    asked_parallel,
    dense_dtype,
    name_filter,
    parallel_of,
    parse_size,
    prompt_text,
)
from trtllm_ct.cli.progress import shown_progress
from trtllm_ct.cli.run import conversion_progress, print_json, run_app, stderr, stdout

__all__ = ["app", "main"]

app = typer.Typer(
    name="trtllm-ct",
    help="Load compressed-tensors checkpoints into TensorRT-LLM.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache = typer.Typer(
    help="Directories that were prepared for TensorRT-LLM.", invoke_without_command=True, rich_markup_mode=None
)
app.add_typer(cache, name="cache")


def _print_version(asked: bool) -> None:
    """Print the version and end, if it was asked for."""
    if asked:
        version()
        raise typer.Exit


@app.callback()
def require_a_command(
    context: typer.Context,
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version of this package and exit."
        ),
    ] = False,
) -> None:
    """Show the help and end with exit code 2 when no command is given; click's own exit code differs by release."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@cache.callback()
def require_a_cache_command(context: typer.Context) -> None:
    """Do the same for the commands of `cache`."""
    require_a_command(context)


@app.command()
def inspect(
    directory: Directory,
    to: Annotated[TargetName, typer.Option(help="Target that modes are shown for.")] = TO_MODELOPT,
    engine: ForEngine = ENGINE,
    sm: ForSm = None,
    untested: Untested = False,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    dtype: DenseDtypeOption = AUTO,
    dense_o_proj: DenseOutput = False,
    modules: Annotated[bool, typer.Option("--modules", help="Print one line per module.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is and how it would be served.

    Shows what is wrong with it, too. Reads headers only.
    """
    from trtllm_ct.pipeline.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(
        directory,
        to,
        engine=engine,
        sm=sm,
        untested=untested,
        dtype=dense_dtype(dtype),
        parallel=parallel_of(tp, pp, ep),
        dense_o_proj=dense_o_proj,
    )
    if as_json:
        print_json("inspect", inspection.to_dict())
    else:
        stdout.print(report.inspection(inspection, modules=modules))
    if inspection.problems:
        raise typer.Exit(1)


@app.command()
def plan(
    directory: Directory,
    to: Annotated[TargetName, typer.Option(help="Target to plan for.")] = TO_MODELOPT,
    engine: ForEngine = ENGINE,
    sm: ForSm = None,
    untested: Untested = False,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    dtype: DenseDtypeOption = AUTO,
    dense_o_proj: DenseOutput = False,
    strict: Strict = False,
    names: Annotated[
        str | None,
        typer.Option("--filter", metavar="REGEX", help="Show tensors with such names only.", show_default=False),
    ] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="Print one line per tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show what becomes of every stored tensor.

    Shows what every delivered tensor is made from, too. Tensors that differ only in numbers of layers and experts share
    a line. Reads headers only.
    """
    from trtllm_ct.pipeline.open import plan_checkpoint

    matches = name_filter(names)
    checkpoint_plan = plan_checkpoint(
        directory,
        to,
        engine=engine,
        sm=sm,
        untested=untested,
        dtype=dense_dtype(dtype),
        parallel=parallel_of(tp, pp, ep),
        dense_o_proj=dense_o_proj,
        strict=strict,
    )
    if as_json:
        document = checkpoint_plan.to_dict()
        for part in ("modules", "stored", "delivered"):
            document[part] = [entry for entry in document[part] if matches(entry["name"])]
        print_json("plan", document)
    else:
        stdout.print(report.plan(checkpoint_plan, unfold=unfold, matches=matches))


@app.command()
def convert(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory to create.", show_default=False)],
    to: Annotated[DirectoryTarget, typer.Option(help="Format to convert to.")] = DIRECTORY,
    engine: ForEngine = ENGINE,
    sm: ForSm = None,
    untested: Untested = False,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    dtype: DenseDtypeOption = AUTO,
    dense_o_proj: DenseOutput = False,
    strict: Strict = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an OUT that this command wrote earlier, at the end.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --overwrite: replace any model directory.", show_default=False)
    ] = False,
    no_sync: Annotated[
        bool, typer.Option("--no-sync", help="Don't wait for the disk; a power cut may then leave OUT full of zeros.")
    ] = False,
    carry: Annotated[
        list[str] | None,
        typer.Option(
            help="Copy side files of this pattern too, such as 'assets/*'; may be repeated.", metavar="PATTERN"
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 500MiB.")] = "5GB",
    executor: Annotated[
        ExecutorName, typer.Option(help="Run the work in threads of this process, or in the ranks that mpirun started.")
    ] = THREADS,
    workers: Annotated[
        int | None, typer.Option(help="Number of threads; by default one for each core.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint for TensorRT-LLM, or to plain weights.

    The result is a ModelOpt directory, plain Hugging Face weights, or the files that trtllm-build reads.
    """
    from trtllm_ct.checkpoint.output import what_is_left
    from trtllm_ct.convert.convert import convert_checkpoint

    max_shard_bytes = parse_size(max_shard_size)
    with going_on_from(what_is_left(out)), conversion_progress() as on_start:
        conversion = convert_checkpoint(
            directory,
            out,
            to=to,
            engine=engine,
            sm=sm,
            untested=untested,
            parallel=parallel_of(tp, pp, ep),
            dtype=dtype,
            dense_o_proj=dense_o_proj,
            strict=strict,
            overwrite=overwrite,
            carry=carry or (),
            force=force,
            sync=not no_sync,
            max_shard_bytes=max_shard_bytes,
            executor=executor,
            workers=workers,
            on_start=on_start,
        )
    if conversion is None:
        return  # This is not rank 0 of an MPI job; rank 0 prints the report.
    if as_json:
        print_json("convert", conversion.to_dict())
    else:
        stdout.print(report.conversion(conversion))


@app.command()
def verify(
    directory: Directory,
    converted: Annotated[
        Path | None, typer.Argument(metavar="CONVERTED", help="A directory converted from DIR.", show_default=False)
    ] = None,
    tp: AskedTensorParallel = None,
    pp: AskedPipelineParallel = None,
    ep: AskedExpertParallel = None,
    sm: AskedSm = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint, and what was converted from it.

    A checkpoint is sound if it is complete and all values are valid; a converted directory has to hold its weights
    exactly. With --tp, --pp or --ep, check that the converted directory holds the slices of these sizes too, and with
    --sm, that these GPUs run its modes; DIR may be that directory itself.
    """
    from trtllm_ct.verify.sizes import verify_with_sizes

    left = nothing_written("the same command starts from the beginning")
    with going_on_from(left), shown_progress(stderr, "Verifying") as on_start:
        verification = verify_with_sizes(directory, converted, asked_parallel(tp, pp, ep), sm, on_start=on_start)
    if as_json:
        print_json("verify", verification.to_dict())
    else:
        stdout.print(report.verification(verification))
    if not verification.good:
        raise typer.Exit(1)


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 40,
    chat: Chat = True,
    temperature: Temperature = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue or answer a prompt on the CPU.

    Runs the reference engine on a compressed-tensors or a converted directory.
    """
    from trtllm_ct.reference import generate_text

    text = prompt_text(prompt)
    with going_on_from(nothing_written("a smaller --max-tokens takes less time")):
        generation = generate_text(
            directory, text, max_tokens=max_tokens, chat=chat, temperature=temperature, seed=seed
        )
    if as_json:
        print_json("generate", {"directory": str(directory), **generation.to_dict()})
    else:
        continued = "" if generation.chat else generation.prompt
        stdout.print(continued + generation.text, markup=False, highlight=False)


@app.command()
def doctor(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Checkpoint directory to examine.", show_default=False)
    ] = None,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    as_json: Json = False,
) -> None:
    """Show which engine this machine has and what it supports.

    Shows what is missing, and how the engine would serve a checkpoint, too.
    """
    from trtllm_ct.cli.doctor import diagnose

    diagnosis = diagnose(directory, parallel=parallel_of(tp, pp, ep))
    if as_json:
        print_json("doctor", diagnosis.to_dict())
    else:
        stdout.print(report.diagnosis(diagnosis))
    if not diagnosis.good:
        raise typer.Exit(1)


@cache.command("list")
def cache_list(as_json: Json = False) -> None:
    """List the directories that were prepared for TensorRT-LLM."""
    from trtllm_ct.serve.cache import cache_root
    from trtllm_ct.serve.listing import list_sidecars

    root, sidecars = cache_root(), list_sidecars()
    if as_json:
        print_json("cache-list", {"root": str(root), "sidecars": [sidecar.to_dict() for sidecar in sidecars]})
    else:
        stdout.print(report.sidecars(root, sidecars))


@cache.command("clear")
def cache_clear(as_json: Json = False) -> None:
    """Delete the prepared directories that no running process uses."""
    from trtllm_ct.serve.cache import cache_root, clear_sidecars

    root, cleared = cache_root(), clear_sidecars()
    if as_json:
        directories = {"removed": cleared.removed, "in_use": cleared.in_use, "others": cleared.others}
        paths = {name: [*map(str, directories[name])] for name in directories}
        print_json("cache-clear", {"root": str(root), **paths})
    else:
        stdout.print(report.cleared_sidecars(root, cleared))


@app.command()
def demo() -> None:
    """Run all of this on a small checkpoint of this package."""
    from trtllm_ct.cli.demo import run_demo

    run_demo(stdout)


@app.command()
def version() -> None:
    """Print the version of this package."""
    from trtllm_ct.base.version import __version__

    stdout.print(__version__, highlight=False)


def main() -> None:
    """Run the command line `trtllm-ct`; see `run_app` for errors."""
    run_app(app)

"""Commands that run something: `generate`, `doctor` and `demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from trtllm_ct.cli import report
from trtllm_ct.cli.interrupts import going_on_from, nothing_written
from trtllm_ct.cli.options import (
    Chat,
    Directory,
    ExpertParallel,
    Json,
    PipelineParallel,
    Seed,
    Temperature,
    TensorParallel,
    parallel_of,
    prompt_text,
)
from trtllm_ct.cli.run import print_json, stdout

__all__ = ["demo", "doctor", "generate"]


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


def doctor(
    directory: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR|ORG/NAME",
            help="Checkpoint directory to examine, or a repository of the Hub.",
            show_default=False,
        ),
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


def demo() -> None:
    """Run all of this on a small checkpoint of this package."""
    from trtllm_ct.cli.demo import run_demo

    run_demo(stdout)

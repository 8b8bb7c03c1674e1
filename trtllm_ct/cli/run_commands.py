"""Commands that run something: `generate`, `perplexity`, `doctor` and `demo`."""

from __future__ import annotations

from pathlib import Path
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
    text_of_file,
)
from trtllm_ct.cli.run import print_json, stdout

__all__ = ["demo", "doctor", "generate", "perplexity"]


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


def perplexity(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Checkpoints, or what was made of them.", show_default=False),
    ],
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="Text in UTF-8; - reads it from stdin.", show_default=False)
    ],
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Read only so many tokens of the text.", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read together.")] = 1024,
    as_json: Json = False,
) -> None:
    """Measure how well models predict a text, side by side.

    Runs the reference engine on the CPU. Below the first model, it shows how far the others' predictions are from it.
    """
    from trtllm_ct.reference import text_perplexity

    content = text_of_file(text)
    with going_on_from(nothing_written("a smaller --max-tokens takes less time")):
        found = [text_perplexity(one, content, window=window, max_tokens=max_tokens) for one in directories]
    if as_json:
        first = found[0]
        print_json("perplexity", {"models": [one.to_dict() | {"difference": one.difference(first)} for one in found]})
    else:
        stdout.print(report.perplexities(found))


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

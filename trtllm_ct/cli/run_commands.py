"""Commands that run something: `generate`, `perplexity`, `calibrate`, `doctor` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_ct.cli import machine_report, reference_report
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
    TextFile,
    TextTokens,
    TextWindow,
    naming_text,
    parallel_of,
    prompt_text,
    text_of_file,
)
from trtllm_ct.cli.run import print_json, stdout

__all__ = ["calibrate", "demo", "doctor", "generate", "perplexity"]


def generate(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Checkpoints, or what was made of them.", show_default=False),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 40,
    chat: Chat = True,
    temperature: Temperature = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue or answer a prompt on the CPU.

    Runs the reference engine on compressed-tensors or converted directories. The texts of several stand side by side.
    """
    from trtllm_ct.reference import generate_text

    text = prompt_text(prompt)
    with going_on_from(nothing_written("a smaller --max-tokens takes less time")):
        found = [
            generate_text(one, text, max_tokens=max_tokens, chat=chat, temperature=temperature, seed=seed)
            for one in directories
        ]
    named = list(zip(map(str, directories), found, strict=True))
    if as_json:
        documents = [{"directory": name, **generation.to_dict()} for name, generation in named]
        print_json("generate", documents[0] if len(documents) == 1 else {"models": documents})
    elif len(named) == 1:
        continued = "" if found[0].chat else found[0].prompt
        stdout.print(continued + found[0].text, markup=False, highlight=False)
    else:
        stdout.print(reference_report.generations(named))


def perplexity(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Checkpoints, or what was made of them.", show_default=False),
    ],
    text: TextFile,
    max_tokens: TextTokens = None,
    window: TextWindow = 1024,
    as_json: Json = False,
) -> None:
    """Measure how well models predict a text, side by side.

    Runs the reference engine on the CPU. It shows how far the predictions of the others are from those of the
    first, so all must have one tokenizer.
    """
    from trtllm_ct.reference import text_perplexities

    content = text_of_file(text)
    with going_on_from(nothing_written("a smaller --max-tokens takes less time")), naming_text(text):
        found = text_perplexities(directories, content, window=window, max_tokens=max_tokens)
    if as_json:
        noted = [warning for one in found for warning in one.warnings]
        print_json("perplexity", {"models": [one.to_dict(found[0]) for one in found], "warnings": noted})
    else:
        stdout.print(reference_report.perplexities(found))


def calibrate(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Safetensors file to write.", show_default=False)],
    text: TextFile,
    max_tokens: TextTokens = None,
    window: TextWindow = 1024,
    as_json: Json = False,
) -> None:
    """Measure scales of inputs on a text, for --calibration.

    Runs the reference engine on the CPU, and writes the largest magnitude of the input of each Linear, over 448.
    """
    from trtllm_ct.pipeline.calibration import check_calibration_place, write_calibration
    from trtllm_ct.reference import measure_scales

    check_calibration_place(out, directory)
    content = text_of_file(text)
    with going_on_from(nothing_written("a smaller --max-tokens takes less time")), naming_text(text):
        measured = measure_scales(directory, content, window=window, max_tokens=max_tokens)
    write_calibration(out, measured.scales)
    if as_json:
        print_json("calibrate", {"out": str(out), **measured.to_dict()})
    else:
        stdout.print(reference_report.calibration(measured, out))


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
        stdout.print(machine_report.diagnosis(diagnosis))
    if not diagnosis.good:
        raise typer.Exit(1)


def demo() -> None:
    """Run all of this on a small checkpoint of this package."""
    from trtllm_ct.cli.demo import run_demo

    run_demo(stdout)

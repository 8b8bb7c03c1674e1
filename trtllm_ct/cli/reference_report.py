"""Formats what the reference engine made of texts: answers, scales of inputs, perplexities."""

from __future__ import annotations

from math import isfinite, isnan
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.lines import escape, line, warnings
from trtllm_ct.cli.tables import fitted_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trtllm_ct.reference.calibration import MeasuredScales
    from trtllm_ct.reference.generate import Generation
    from trtllm_ct.reference.perplexity import Perplexity

__all__ = ["calibration", "generations", "perplexities"]


def generations(found: Sequence[tuple[str, Generation]]) -> RenderableType:
    """Format what several models, given by name, made of one prompt."""
    table = fitted_table("model", "text")
    for name, generation in found:
        table.add_row(escape(name), escape(generation.text))
    return Group(line(found[0][1].prompt, style="bold"), table)


def calibration(measured: MeasuredScales, out: Path) -> RenderableType:
    """Format what was measured: how many scales, on how many tokens, and which experts no token reached."""
    lines: list[RenderableType] = [
        line(f"{out}: {len(measured.scales)} scales from {measured.tokens} tokens in {measured.seconds:.1f} s")
    ]
    if measured.unreached:
        names = "\n".join(fold_names(measured.unreached))
        lines += [
            line(f"  {len(measured.unreached)} have the largest scale of their layer, as no token reached them:"),
            Text(names),
        ]
    return Group(*lines)


def perplexities(found: Sequence[Perplexity]) -> RenderableType:
    """Format the perplexities of models on one text, and how far their predictions are from those of the first."""
    table = fitted_table("model", "perplexity", "difference per token")
    for one in found:
        difference = "" if one is found[0] else _number(one.difference(found[0]), " nats")
        table.add_row(escape(one.model), _number(one.perplexity), difference)
    parts: list[RenderableType] = [
        line(f"{found[0].tokens} tokens predicted, in windows of up to {found[0].window}"),
        table,
    ]
    noted = [warning for one in found for warning in one.warnings]
    return Group(*parts, *([warnings(noted)] if noted else []))


def _number(value: float, unit: str = "") -> str:
    """Return a number with its unit, and one that is not finite in words."""
    if isfinite(value):
        return f"{value:.4f}{unit}"
    return "not a number" if isnan(value) else "infinite"

"""Commands that read checkpoints and say what they are: `inspect`, `plan` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_ct.cli.interrupts import going_on_from, nothing_written
from trtllm_ct.cli.options import (
    TO_MODELOPT,
    Html,
    Json,
    Place,
    Strict,
    TargetName,
    name_filter,
    takes_plan_options,
)
from trtllm_ct.cli.page.written import check_page_place
from trtllm_ct.cli.progress import shown_progress
from trtllm_ct.cli.run import print_json, show_page, stderr, stdout

if TYPE_CHECKING:
    from trtllm_ct.plan.options import PlanArguments

__all__ = ["compare", "inspect", "plan"]


@takes_plan_options
def inspect(
    directory: Place,
    to: Annotated[TargetName, typer.Option(help="Target that modes are shown for.")] = TO_MODELOPT,
    *,
    asked: PlanArguments,
    modules: Annotated[bool, typer.Option("--modules", help="Print one line per module.")] = False,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Compare releases and GPUs: which would serve more of it natively?")
    ] = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is and how it would be served.

    Shows what is wrong with it, too. Reads headers only.
    """
    from trtllm_ct.pipeline.inspection import inspect_checkpoint

    check_page_place(html, directory)
    inspection = inspect_checkpoint(directory, to, compare_places=elsewhere, **asked)
    # What only these two show, such as the needs of GPUs, takes seconds for a large model.
    document = inspection.to_dict() if as_json or html else {}
    if as_json:
        print_json("inspect", document)
    else:
        from trtllm_ct.cli import report

        stdout.print(report.inspection(inspection, modules=modules))
    if html:
        from trtllm_ct.cli.page.pages import inspection_page

        show_page(html, inspection_page(inspection, document))
    if inspection.problems:
        raise typer.Exit(1)


@takes_plan_options
def plan(
    directory: Place,
    to: Annotated[TargetName, typer.Option(help="Target to plan for.")] = TO_MODELOPT,
    *,
    asked: PlanArguments,
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
    from trtllm_ct.checkpoint.opening import open_source
    from trtllm_ct.pipeline.alternatives import alternative
    from trtllm_ct.pipeline.open import open_checkpoint
    from trtllm_ct.plan.options import PlanOptions

    matches = name_filter(names)
    asked["strict"] = strict
    options = PlanOptions.of(to, **asked)
    checkpoint = open_checkpoint(open_source(directory))
    checkpoint_plan = checkpoint.plan_for(options, compare_class=True)
    instead = alternative(checkpoint, checkpoint_plan, options)
    if as_json:
        document = checkpoint_plan.to_dict() | {"alternative": instead}
        for part in ("modules", "stored", "delivered"):
            document[part] = [entry for entry in document[part] if matches(entry["name"])]
        print_json("plan", document)
    else:
        from trtllm_ct.cli import report

        stdout.print(report.plan(checkpoint_plan, alternative=instead, unfold=unfold, matches=matches))


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="Another one, or what was converted from A.", show_default=False)
    ],
    headers: Annotated[
        bool, typer.Option("--headers", help="Compare schemes and bytes only, and read no weights.")
    ] = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show how two directories differ, module by module.

    Shows schemes or modes, bytes, and the largest error of the second one, relative to the largest value of a row of
    the first one.
    """
    from trtllm_ct.cli.comparison_report import comparison
    from trtllm_ct.verify.compare import compare_directories

    check_page_place(html, first, second)
    left = nothing_written("the same command starts from the beginning")
    with going_on_from(left), shown_progress(stderr, "Comparing") as on_start:
        found = compare_directories(first, second, values=not headers, on_start=on_start)
    if as_json:
        print_json("compare", found.to_dict())
    else:
        stdout.print(comparison(found))
    if html:
        from trtllm_ct.cli.page.pages import comparison_page

        show_page(html, comparison_page(found, found.to_dict()))
    if found.faults:
        raise typer.Exit(1)

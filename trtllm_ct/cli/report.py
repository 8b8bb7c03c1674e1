"""Formats what `inspect`, `plan`, `convert` and `verify` print: tables of modules and tensors, and summaries."""

from __future__ import annotations

from collections import Counter
from math import isfinite
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from trtllm_ct.base.texts import format_bytes, printable
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.lines import deviations, escape, faults, joined, line, problems, warnings
from trtllm_ct.cli.plan_rows import delivered_rows, stored_rows
from trtllm_ct.cli.tables import UnbrokenName, fitted_table
from trtllm_ct.engine.platform import sms_in_words
from trtllm_ct.plan.checks import checks_text
from trtllm_ct.plan.verdict import family_note, gpus_text, largest_cost, rank_text, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.table import Table

    from trtllm_ct.cli.plan_rows import PlanRow
    from trtllm_ct.convert.convert import ConversionReport
    from trtllm_ct.pipeline.alternatives import ServedOn
    from trtllm_ct.pipeline.inspection import Inspection, SchemeRow
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.verify.verify import VerificationReport

__all__ = ["conversion", "inspection", "plan", "verification"]


def inspection(report: Inspection, *, modules: bool = False) -> RenderableType:
    """Format an inspection.

    The most important comes first: the verdict, what costs most, deviations and warnings. The evidence for the format,
    checks, and the table of schemes (of modules with `modules`) follow, and at the end the problems.
    """
    parts: list[RenderableType] = [joined((str(report.directory), "bold"), f" is {report.detection.description}")]
    parts += [line(f"  {sentence}", style="bold") for sentence in [report.verdict] if sentence]
    if report.plan is not None:
        parts += [*_costs(report.plan, report.alternative), *deviations(report.plan)]
    parts += [warnings(report.warnings), *(line(f"  evidence: {found}") for found in report.detection.evidence)]
    if report.plan is not None:
        parts += [
            line(f"  architecture: {report.plan.architecture}, {report.plan.dtype.torch_name}"),
            _checks(report.plan),
            line(f"  KV cache: {report.plan.quant_config.kv_cache_quant_algo or 'not quantized'}"),
            *_gpus(report.plan),
            Text(""),
            _modules(report.plan) if modules else _schemes(report.rows(), report.target),
            *(line(note, style="dim") for note in [family_note(report.plan)] if note),
        ]
    if report.elsewhere:
        parts.append(_elsewhere(report.elsewhere))
    if report.problems:
        parts.append(problems(report.problems, [report.directory]))
    return Group(*parts)


def _elsewhere(found: Sequence[ServedOn]) -> RenderableType:
    """Return the sentence about releases and GPUs, and a table of them; the first one is that of the inspection."""
    from trtllm_ct.pipeline.alternatives import elsewhere_text

    table = fitted_table("release", "GPUs", "keep their codes", "computed otherwise", "bytes", "problems")
    for served in found:
        gpus = sms_in_words([served.sm] if served.sm else served.sms) or "none"
        kept = f"{served.kept} of {served.quantized}"
        table.add_row(
            *(served.engine, gpus, kept, str(served.deviating)),
            *(format_bytes(served.delivered_bytes), str(served.problems or "")),
        )
    return Group(line(f"Elsewhere: {elsewhere_text(found)}", style="bold"), table)


def plan(
    checkpoint_plan: Plan,
    *,
    alternative: str = "",
    unfold: bool = False,
    matches: Callable[[str], object] | None = None,
) -> RenderableType:
    """Format a plan: verdict and costs, stored tensors with their fates, then delivered tensors with their operations.

    `alternative` says what would avoid the largest cost. Tensors that differ only in numbers share a row, except with
    `unfold`. With `matches`, only tensors are shown for whose name it returns something true, and a line
    in place of the tables if there is none.
    """
    shown = matches or bool
    stored = fitted_table("stored tensor", "dtype and shape", "fate", "delivered as, or reason", title="Stored")
    fates = (fate for fate in checkpoint_plan.fates() if shown(fate.name))
    _fill(stored, stored_rows(fates, unfold=unfold))
    delivered = fitted_table(
        "delivered tensor", "dtype and shape", "operation", title=f"Delivered to {checkpoint_plan.target}"
    )
    deliveries = (delivery for delivery in checkpoint_plan.deliveries() if shown(delivery.name))
    _fill(delivered, delivered_rows(deliveries, unfold=unfold))
    about = (
        _checks(checkpoint_plan),
        *_gpus(checkpoint_plan),
        *deviations(checkpoint_plan),
        warnings(checkpoint_plan.warnings),
    )
    sentence = line(verdict(checkpoint_plan, checkpoint_plan.problems), style="bold")
    first = (sentence, *_costs(checkpoint_plan, alternative))
    if not stored.row_count and not delivered.row_count:
        return Group(*first, line("--filter matches no name of a tensor; without it, all are shown."), *about)
    return Group(*first, stored, delivered, *about)


def _costs(checkpoint_plan: Plan, alternative: str = "") -> Iterator[RenderableType]:
    """Yield what costs most, what would avoid it, and the bytes of one rank; see `verdict.py`."""
    texts = (largest_cost(checkpoint_plan), alternative, rank_text(checkpoint_plan))
    yield from (line(f"  {text}") for text in texts if text)
    wide = {(choice.what, choice.coded_form) for choice in checkpoint_plan.choices if not choice.calibrated}
    for choice in checkpoint_plan.choices:
        if choice.calibrated and (choice.what, choice.coded_form) in wide:
            continue  # The same codes with coarser inputs; `--json` lists it.
        now, then = format_bytes(choice.dense_bytes), format_bytes(choice.coded_bytes)
        inputs = choice.activations.partition(" ")[0]
        rank = f", {format_bytes(checkpoint_plan.rank_bytes_with(choice))} a rank" if rank_text(checkpoint_plan) else ""
        exact = "exact codes" if choice.form.keeps_codes else f"error ~{choice.form.usual_error:.1%}"
        error = f"{exact}, static {inputs}" if choice.calibrated else f"{exact}, {inputs} inputs"
        yield line(f"  --requantize {choice.what}={choice.form.name}: {now} -> {then}{rank}, {error}")


def _fill(table: Table, rows: Iterable[PlanRow]) -> None:
    """Add the rows of a plan to a table."""
    for row in rows:
        table.add_row("\n".join(map(escape, row.names)), *map(escape, row.cells))


def conversion(report: ConversionReport) -> RenderableType:
    """Format the report of a conversion: time, modes with counts, bytes, files, why modules were dequantized."""
    plan = report.plan
    speed = format_bytes(plan.delivered_bytes / max(report.seconds, 1e-9))
    modes = ", ".join(f"{count} x {mode}" for mode, count in report.modes.items()) or "nothing was quantized"
    dequantized = Counter(module.reason for module in plan.modules if module.dequantized)
    lines = [
        joined(("Converted", "bold green"), f" to {report.out} in {report.seconds:.1f} s ({speed}/s)"),
        line(f"  modules: {modes}"),
        line(f"  bytes: {format_bytes(plan.stored_bytes)} -> {format_bytes(plan.delivered_bytes)}"),
        *([line(f"  downloaded: {format_bytes(report.downloaded_bytes)}")] if report.downloaded_bytes else []),
        line(f"  files: {len(report.weight_files)} of weights, {len(report.carried_files)} side files copied"),
        *_named("code that a configuration names or --carry asked for", report.code_files),
        *_named("left out, --carry PATTERN copies them", report.left_out_files),
        _checks(plan),
        *_gpus(plan),
        *(line(f"  dequantized {count} modules: {reason}") for reason, count in dequantized.items()),
    ]
    return Group(*lines, *deviations(plan), warnings(report.warnings))


def _named(what: str, names: Sequence[str]) -> list[Text]:
    """Return a line that names files, or none if there are none."""
    return [line(f"  {what}: {format_names(names)}")] if names else []


def verification(report: VerificationReport) -> RenderableType:
    """Format a verification: the verdict, the worst error of each kind of tensor, warnings and every fault."""
    verdict = ("good", "bold green") if report.good else (f"{len(report.faults)} faults", "bold red")
    what = f"{report.converted} against {report.directory}" if report.converted else str(report.directory)
    lines: list[RenderableType] = [joined(f"{what}: ", verdict, f" ({report.modules} modules)")]
    for kind in ("native", "dequantized", "plain"):
        worst = report.worst(kind)
        if worst is not None:
            count = sum(check.kind == kind for check in report.checks)
            error = worst.comparison
            lines.append(
                line(
                    f"  {count} {kind} tensors, worst error {error.error:.3g} in {worst.name}, {error.block}: "
                    f"{error.got:.9g}, source {error.want:.9g}"
                )
            )
    if report.relative_errors:
        lines.append(line(f"  {len(report.relative_errors)} requantized tensors, {_relative_errors(report)}"))
    if report.zero_scales:
        lines.append(line(f"  {report.zero_scales} rows or groups have scale 0 and hold zeros only"))
    if report.warnings:
        lines.append(warnings(report.warnings))
    if report.faults:
        lines.append(faults(report.faults, [report.converted, report.directory]))
    return Group(*lines)


def _relative_errors(report: VerificationReport) -> str:
    """Return the relative error of all requantized weights together, and that of the worst of them."""
    errors = report.relative_errors
    name = max(errors, key=lambda name: errors[name])
    return f"relative error {_percent(report.relative_error)} together, at most {_percent(errors[name])} in {name}"


def _percent(error: float) -> str:
    return f"{error:.2%}" if isfinite(error) else "infinite"


def _schemes(rows: Iterable[SchemeRow], target: str) -> Table:
    """Return the table of schemes: the modules of each scheme, folded over layers, with the reason below them.

    On a narrow terminal it is a list of schemes.
    """
    folded = [(row, fold_names(row.modules)) for row in rows]
    table = fitted_table("modules", "stored", "scheme family", f"at {target}", narrow=_scheme_list(folded, target))
    for row, names in folded:
        for name in names:
            table.add_row(escape(name), row.stored_scheme, row.native_mode, row.delivered_mode)
        reason = f"[italic]{escape(_reason(row))}[/italic]"
        table.add_row(f"[dim]{_size(row)}[/dim]", reason, "", "", end_section=True)
    return table


def _scheme_list(folded: Iterable[tuple[SchemeRow, tuple[str, ...]]], target: str) -> RenderableType:
    """Return a paragraph for each scheme: what it is, what becomes of it and why, and the modules, one in a line."""
    parts: list[RenderableType] = []
    for row, names in folded:
        native = f" (scheme family {row.native_mode})" if row.native_mode else ""
        parts.append(Text(f"{row.stored_scheme}, at {target} {row.delivered_mode}{native}", style="bold"))
        parts.append(Padding(Text(_size(row), style="dim"), (0, 0, 0, 2)))
        if _reason(row):
            parts.append(Padding(Text(printable(_reason(row)), style="italic"), (0, 0, 0, 2)))
        parts += (UnbrokenName(printable(name), indent=4) for name in names)
    return Group(*parts, Text(""))


def _size(row: SchemeRow) -> str:
    return f"{len(row.modules)} modules, {format_bytes(row.stored_bytes)} -> {format_bytes(row.delivered_bytes)}"


def _reason(row: SchemeRow) -> str:
    return "; ".join(text for text in (row.reason, row.note) if text)


def _gpus(plan: Plan) -> list[Text]:
    """Return the line that names the GPUs whose kernels have all modes; none if there is nothing to say."""
    return [line(f"  {text}") for text in [gpus_text(plan)] if text]


def _modules(plan: Plan) -> Table:
    table = fitted_table("module", "stored", "scheme family", f"at {plan.target}", "now", "after")
    for module in plan.modules:
        table.add_row(
            escape(module.name),
            "\n".join(map(escape, filter(None, (module.stored_scheme, module.reason)))) or "plain",
            str(module.native_mode or ""),
            module.delivered_mode,
            format_bytes(module.stored_bytes),
            format_bytes(module.delivered_bytes),
        )
    return table


def _checks(plan: Plan) -> Text:
    """Return the line that says what the stored tensors were compared with."""
    return line(f"  checked: {checks_text(plan.checks)}")

"""Formats what the commands print: tables of inspections and plans, summaries of results, faults folded by layer."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich import markup
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from trtllm_ct.base.texts import format_bytes, printable
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.plan_rows import delivered_rows, stored_rows
from trtllm_ct.cli.tables import UnbrokenName, fitted_table
from trtllm_ct.plan.checks import checks_text
from trtllm_ct.plan.verdict import family_note, largest_cost, rank_text, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.table import Table

    from trtllm_ct.base.errors import Fault, TrtllmCtError
    from trtllm_ct.cli.doctor import Diagnosis, Machine, Served
    from trtllm_ct.cli.plan_rows import PlanRow
    from trtllm_ct.convert.convert import ConversionReport
    from trtllm_ct.pipeline.alternatives import ServedOn
    from trtllm_ct.pipeline.inspection import Inspection, SchemeRow
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.reference.calibration import MeasuredScales
    from trtllm_ct.reference.generate import Generation
    from trtllm_ct.reference.perplexity import Perplexity
    from trtllm_ct.serve.cache import ClearedSidecars
    from trtllm_ct.serve.listing import ListedSidecar
    from trtllm_ct.verify.verify import VerificationReport

__all__ = [
    "cleared_sidecars",
    "conversion",
    "diagnosis",
    "failure",
    "faults",
    "inspection",
    "perplexities",
    "plan",
    "problems",
    "sidecars",
    "verification",
]


def escape(text: str) -> str:
    """Return a text of a checkpoint for a cell of a table: markup and control characters are shown, not obeyed."""
    return markup.escape(printable(text))


def _line(text: str, style: str = "") -> Text:
    """Return one line of a report; line breaks in names that it quotes don't break it."""
    return Text(printable(text), style=style)


def _joined(*parts: str | tuple[str, str]) -> Text:
    """Return one line of a report, of texts with and without a style; see `_line`."""
    return Text.assemble(
        *(printable(part) if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts)
    )


def faults(all_faults: Iterable[Fault], named: Iterable[Path | str | None] = ()) -> RenderableType:
    """Format faults; faults with the same text are shown once, with the names that they apply to folded.

    Files in the directories `named`, whose paths the report has shown before, are shown without their paths.
    """
    names_by_text: dict[tuple[str, str, str], list[str]] = {}
    known = [str(directory) for directory in named if directory is not None]
    for fault in all_faults:
        where = _inside(fault.where, known)
        names_by_text.setdefault((fault.expected, fault.found, fault.remedy), []).append(where)
    lines = []
    for (expected, found, remedy), names in names_by_text.items():
        where = "\n".join(fold_names(names))
        lines.append(
            Text.assemble((where, "bold red"), f"\n  expected {expected}\n  found    {found}\n  ", (remedy, "italic"))
        )
    return Group(*lines)


def _inside(where: str, directories: Iterable[str]) -> str:
    """Return the place of a fault, relative to the first of these directories that it is in."""
    prefixes = (f"{directory}{os.sep}" for directory in directories)
    return next((where[len(prefix) :] for prefix in prefixes if where.startswith(prefix)), where)


def failure(error: TrtllmCtError) -> RenderableType:
    """Format an error: its warnings, if it has any, and its faults.

    The path of a directory with several faulty files is shown once, above them.
    """
    parts: list[RenderableType] = [_warnings(error.warnings)] if error.warnings else []
    places = (fault.where for fault in error.faults if fault.where.startswith(os.sep))
    folders = Counter(place.rpartition(os.sep)[0] for place in places)
    shared = [Path(folder) for folder, count in folders.items() if folder and count > 1]
    parts += (_line(f"In {folder}:", style="bold red") for folder in shared)
    return Group(*parts, faults(error.faults, shared))


def inspection(report: Inspection, *, modules: bool = False) -> RenderableType:
    """Format an inspection.

    The most important comes first: the verdict, what costs most, deviations and warnings. The evidence for the format,
    checks, and the table of schemes (of modules with `modules`) follow, and at the end the problems.
    """
    parts: list[RenderableType] = [_joined((str(report.directory), "bold"), f" is {report.detection.description}")]
    parts += [_line(f"  {sentence}", style="bold") for sentence in [report.verdict] if sentence]
    if report.plan is not None:
        parts += [*_costs(report.plan, report.alternative), *_deviations(report.plan)]
    parts += [_warnings(report.warnings), *(_line(f"  evidence: {found}") for found in report.detection.evidence)]
    if report.plan is not None:
        parts += [
            _line(f"  architecture: {report.plan.architecture}, {report.plan.dtype.torch_name}"),
            _checks(report.plan),
            _line(f"  KV cache: {report.plan.quant_config.kv_cache_quant_algo or 'not quantized'}"),
            Text(""),
            _modules(report.plan) if modules else _schemes(report.rows(), report.target),
            *(_line(note, style="dim") for note in [family_note(report.plan)] if note),
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
        gpus = f"SM{served.sm}" if served.sm else "all"
        kept = f"{served.kept} of {served.quantized}"
        table.add_row(
            *(served.engine, gpus, kept, str(served.deviating)),
            *(format_bytes(served.delivered_bytes), str(served.problems or "")),
        )
    return Group(_line(f"Elsewhere: {elsewhere_text(found)}", style="bold"), table)


def problems(found: Sequence[Fault], named: Iterable[Path | str] = ()) -> RenderableType:
    """Format problems under a title with their number; `named` is that of `faults`."""
    return Group(_line(f"Problems ({len(found)}):", style="bold red"), faults(found, named))


def plan(
    checkpoint_plan: Plan,
    *,
    alternative: str = "",
    unfold: bool = False,
    matches: Callable[[str], object] | None = None,
) -> RenderableType:
    """Format a plan: verdict and costs, stored tensors with their fates, then delivered tensors with their operations.

    `alternative` says what would avoid the largest cost. Tensors that differ only in numbers share a row, except with
    `unfold`. With `matches`, only tensors are shown for whose name it returns something true.
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
    about = (_checks(checkpoint_plan), *_deviations(checkpoint_plan), _warnings(checkpoint_plan.warnings))
    sentence = _line(verdict(checkpoint_plan, checkpoint_plan.problems), style="bold")
    first = (sentence, *_costs(checkpoint_plan, alternative))
    return Group(*first, stored, delivered, *about)


def _costs(checkpoint_plan: Plan, alternative: str = "") -> Iterator[RenderableType]:
    """Yield what costs most, what would avoid it, and the bytes of one rank; see `verdict.py`."""
    texts = (largest_cost(checkpoint_plan), alternative, rank_text(checkpoint_plan))
    yield from (_line(f"  {text}") for text in texts if text)
    wide = {(choice.what, choice.coded_form) for choice in checkpoint_plan.choices if not choice.calibrated}
    for choice in checkpoint_plan.choices:
        if choice.calibrated and (choice.what, choice.coded_form) in wide:
            continue  # The same codes with coarser inputs; `--json` lists it.
        now, then = format_bytes(choice.dense_bytes), format_bytes(choice.coded_bytes)
        inputs = choice.activations.partition(" ")[0]
        rank = f", {format_bytes(checkpoint_plan.rank_bytes_with(choice))} a rank" if rank_text(checkpoint_plan) else ""
        exact = "exact codes" if choice.form.keeps_codes else f"error ~{choice.form.usual_error:.1%}"
        error = f"{exact}, static {inputs}" if choice.calibrated else f"{exact}, {inputs} inputs"
        yield _line(f"  --requantize {choice.what}={choice.form.name}: {now} -> {then}{rank}, {error}")


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
        _joined(("Converted", "bold green"), f" to {report.out} in {report.seconds:.1f} s ({speed}/s)"),
        _line(f"  modules: {modes}"),
        _line(f"  bytes: {format_bytes(plan.stored_bytes)} -> {format_bytes(plan.delivered_bytes)}"),
        *([_line(f"  downloaded: {format_bytes(report.downloaded_bytes)}")] if report.downloaded_bytes else []),
        _line(f"  files: {len(report.weight_files)} of weights, {len(report.carried_files)} side files copied"),
        *_named("code that a configuration names or --carry asked for", report.code_files),
        *_named("left out, --carry PATTERN copies them", report.left_out_files),
        _checks(plan),
        *(_line(f"  dequantized {count} modules: {reason}") for reason, count in dequantized.items()),
    ]
    return Group(*lines, *_deviations(plan), _warnings(report.warnings))


def _named(what: str, names: Sequence[str]) -> list[Text]:
    """Return a line that names files, or none if there are none."""
    return [_line(f"  {what}: {format_names(names)}")] if names else []


def verification(report: VerificationReport) -> RenderableType:
    """Format a verification: the verdict, the worst error of each kind of tensor, warnings and every fault."""
    verdict = ("good", "bold green") if report.good else (f"{len(report.faults)} faults", "bold red")
    what = f"{report.converted} against {report.directory}" if report.converted else str(report.directory)
    lines: list[RenderableType] = [_joined(f"{what}: ", verdict, f" ({report.modules} modules)")]
    for kind in ("native", "dequantized", "plain"):
        worst = report.worst(kind)
        if worst is not None:
            count = sum(check.kind == kind for check in report.checks)
            error = worst.comparison
            lines.append(
                _line(
                    f"  {count} {kind} tensors, worst error {error.error:.3g} in {worst.name}, {error.block}: "
                    f"{error.got:.9g}, source {error.want:.9g}"
                )
            )
    if report.relative_errors:
        lines.append(_line(f"  {len(report.relative_errors)} requantized tensors, {_relative_errors(report)}"))
    if report.zero_scales:
        lines.append(_line(f"  {report.zero_scales} rows or groups have scale 0 and hold zeros only"))
    if report.warnings:
        lines.append(_warnings(report.warnings))
    if report.faults:
        lines.append(faults(report.faults, [report.converted, report.directory]))
    return Group(*lines)


def _relative_errors(report: VerificationReport) -> str:
    """Return the relative error of all requantized weights together, and that of the worst of them."""
    errors = report.relative_errors
    name = max(errors, key=lambda name: errors[name])
    return f"relative error {report.relative_error:.2%} together, at most {errors[name]:.2%} in {name}"


def generations(found: Sequence[tuple[str, Generation]]) -> RenderableType:
    """Format what several models, given by name, made of one prompt."""
    table = fitted_table("model", "text")
    for name, generation in found:
        table.add_row(escape(name), escape(generation.text))
    return Group(_line(found[0][1].prompt, style="bold"), table)


def calibration(measured: MeasuredScales, out: Path) -> RenderableType:
    """Format what was measured: how many scales, on how many tokens, and which experts no token reached."""
    lines: list[RenderableType] = [
        _line(f"{out}: {len(measured.scales)} scales from {measured.tokens} tokens in {measured.seconds:.1f} s")
    ]
    if measured.unreached:
        names = "\n".join(fold_names(measured.unreached))
        lines += [
            _line(f"  {len(measured.unreached)} have the largest scale of their layer, as no token reached them:"),
            Text(names),
        ]
    return Group(*lines)


def perplexities(found: Sequence[Perplexity]) -> RenderableType:
    """Format the perplexities of models on one text, and how far their predictions are from those of the first."""
    table = fitted_table("model", "perplexity", "difference per token")
    for one in found:
        difference = "" if one is found[0] else f"{one.difference(found[0]):.4f} nats"
        table.add_row(escape(one.model), f"{one.perplexity:.4f}", difference)
    return Group(_line(f"{found[0].tokens} tokens in windows of {found[0].window}"), table)


def diagnosis(report: Diagnosis) -> RenderableType:
    """Format a diagnosis: the engine, its features and modes, what is missing, and how a checkpoint would be served."""
    return Group(*_machine(report.machine), *(_served(report.served) if report.served else ()))


def sidecars(root: Path, listed: Iterable[ListedSidecar]) -> RenderableType:
    """Format the prepared directories below `root`: name, source, engine and parallel sizes; then the faults."""
    table = fitted_table("sidecar", "source", "engine", "tp", "pp", "ep")
    damaged = []
    for entry in listed:
        if entry.sidecar is None:
            damaged.append(entry.fault)
            continue
        options, repository = entry.sidecar.options, entry.sidecar.repository
        sizes = (options.parallel.tensor, options.parallel.pipeline, options.parallel.expert)
        source = repository.name if repository else str(entry.sidecar.source)
        table.add_row(entry.directory.name, escape(source), options.engine, *map(str, sizes))
    parts: list[RenderableType] = [_line(f"{table.row_count} in {root}")]
    if table.row_count:
        parts.append(table)
    return Group(*parts, faults(fault for fault in damaged if fault is not None))


def cleared_sidecars(root: Path, cleared: ClearedSidecars) -> RenderableType:
    """Format the result of `cache clear`: how many directories were removed, and which ones were kept."""
    lines = [f"Removed {len(cleared.removed)} from {root}"]
    lines += [
        f"  {directory.name} stays: a running process uses it, or it belongs to another user"
        for directory in cleared.in_use
    ]
    lines += [
        f"  {printable(directory.name)} stays: it is not, or not only, what trtllm_ct.prepare writes"
        for directory in cleared.others
    ]
    return Group(*map(Text, lines))


def _machine(machine: Machine) -> Iterable[RenderableType]:
    capabilities = machine.target.capabilities
    engine = {"tensorrt_llm": "TensorRT-LLM", "reference": "the CPU reference engine"}[machine.engine]
    yield _joined("LLM runs ", (engine, "bold"), f": {machine.why}")
    if machine.features is not None:
        for name, value in machine.features.to_dict().items():
            yield _line(f"  {name}: {_feature_text(value)}")
    yield _line(f"  capability set: {capabilities.name} ({capabilities.source})")
    yield _line(f"  Linears: {', '.join(sorted(capabilities.linear))}")
    yield _line(f"  routed experts: {', '.join(sorted(capabilities.experts))}")
    if machine.missing:
        yield _line(f"Missing ({len(machine.missing)}):", style="bold yellow")
        yield faults(machine.missing)


def _served(served: Served) -> Iterable[RenderableType]:
    sizes = ", ".join(f"{name} {size}" for name, size in served.parallel.to_dict().items() if size > 1)
    yield Text("")
    yield _joined((str(served.directory), "bold"), f" is {served.detection.description}", f" ({sizes})" * bool(sizes))
    if served.plan is not None:
        modes = ", ".join(f"{count} x {mode}" for mode, count in served.native.items()) or "none"
        yield _line(f"  served natively: {modes}")
        for reason, modules in served.dequantized.items():
            yield _line(f"  dequantized {len(modules)} modules: {reason}")
        yield _line(f"  KV cache: {served.plan.quant_config.kv_cache_quant_algo or 'not quantized'}")
        yield _line(f"  bytes: {format_bytes(served.plan.delivered_bytes)} over all ranks")
        yield from _deviations(served.plan)
        yield _warnings(served.warnings)
    elif served.warnings:
        yield _warnings(served.warnings)
    elif not served.problems:
        yield Text("  it goes to the engine untouched")
    for title, served_faults in (("Traps", served.traps), ("Problems", served.problems)):
        if served_faults:
            yield _line(f"{title} ({len(served_faults)}):", style="bold red")
            yield faults(served_faults, [served.directory])


def _feature_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


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
    return _line(f"  checked: {checks_text(plan.checks)}")


def _deviations(plan: Plan) -> Iterator[RenderableType]:
    """Yield where the engine will compute differently from the schemes of the checkpoint; nothing if nowhere."""
    if plan.deviations:
        yield Text("Deviations from the schemes:", style="bold yellow")
        yield from (_line(f"  {deviation}", style="yellow") for deviation in plan.deviations)


def _warnings(texts: Iterable[str]) -> RenderableType:
    lines = [_line(f"  {text}", style="yellow") for text in texts]
    return Group(Text("Warnings:", style="bold yellow"), *lines) if lines else Text("Warnings: none")

"""The pages of `inspect`, `convert`, `verify` and `compare`, each from the document of `--json` and a command's report.

All of them begin as the reports on the terminal do: the verdict, then what to know first, then the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.base.texts import format_bytes
from trtllm_ct.cli.page import sections
from trtllm_ct.cli.page.difference_map import DifferenceMap
from trtllm_ct.cli.page.error_map import ErrorMap
from trtllm_ct.cli.page.histogram import histogram
from trtllm_ct.cli.page.markup import bullets, bytes_of, section, text
from trtllm_ct.cli.page.module_map import ModuleMap
from trtllm_ct.cli.page.shell import page_of
from trtllm_ct.pipeline.alternatives import elsewhere_text
from trtllm_ct.plan.checks import checks_text
from trtllm_ct.plan.verdict import family_note, gpus_text, largest_cost, rank_text

if TYPE_CHECKING:
    from trtllm_ct.convert.convert import ConversionReport
    from trtllm_ct.pipeline.inspection import Inspection
    from trtllm_ct.plan.plan import Plan
    from trtllm_ct.verify.compare import DirectoryComparison
    from trtllm_ct.verify.verify import VerificationReport

__all__ = ["comparison_page", "conversion_page", "inspection_page", "verification_page"]

_KEYS = "Arrow keys move in the map; the pointer or the focus on a cell shows more about it."


def inspection_page(inspection: Inspection, document: dict[str, Any]) -> str:
    """Return the page of an inspection; `document` is what its `to_dict` returned."""
    plan = inspection.plan
    name = f"{document['directory']} is {document['detection']['description']}"
    if plan is None:
        verdict = "It can't be delivered; the problems below say why."
        return _page(name, sections.header(name, verdict, ()) + sections.first(document))
    facts = (_facts(plan), largest_cost(plan), document["alternative"], gpus_text(plan), rank_text(plan))
    modules = ModuleMap(plan.modules)
    body = (
        sections.header(name, document["verdict"], facts)
        + sections.first(document, sections.dequantized_texts(plan.modules))
        + section("Modes of all modules", modules.html(), note=_KEYS)
        + sections.parts(document)
        + sections.gpus(document)
        + sections.elsewhere(document, elsewhere_text(inspection.elsewhere or ()))
        + sections.schemes(document)
        + _about(plan, [f"evidence: {found}" for found in inspection.detection.evidence])
    )
    return _page(name, body, modules.details)


def conversion_page(report: ConversionReport, document: dict[str, Any]) -> str:
    """Return the page of a conversion; `document` is what its `to_dict` returned."""
    plan = report.plan
    name = f"{document['source']} was converted to {document['out']}"
    time = f"{report.seconds:.1f} s, {format_bytes(plan.delivered_bytes / max(report.seconds, 1e-9))}/s"
    facts = (_facts(plan), time, largest_cost(plan), gpus_text(plan), rank_text(plan))
    modules = ModuleMap(plan.modules)
    files = [f"{len(document['weight_files'])} weight files, {len(document['carried_files'])} side files copied"]
    for label, key in (
        ("code that a configuration names or --carry asked for", "code_files"),
        ("left out", "left_out_files"),
        ("trtllm-build needs", "build_options"),
        ("the program that runs the engine needs", "run_options"),
    ):
        files += [f"{label}: {', '.join(document[key])}"] if document[key] else []
    body = (
        sections.header(name, document["verdict"], facts)
        + sections.first(document, sections.dequantized_texts(plan.modules))
        + section("Modes of all modules", modules.html(), note=_KEYS)
        + sections.parts(document)
        + sections.gpus(document)
        + section("Files", bullets(map(text, files)))
        + _about(plan, [])
    )
    return _page(name, body, modules.details)


def verification_page(report: VerificationReport, document: dict[str, Any]) -> str:
    """Return the page of a verification; `document` is what its `to_dict` returned."""
    name = f"{report.converted} against {report.directory}" if report.converted else str(report.directory)
    checks = len(document["checks"])
    if not report.good:
        verdict = f"{len(document['faults']):,} faults in {report.modules:,} modules."
    elif report.converted is None:
        verdict = f"It is sound: all {report.modules:,} modules are complete, and all of their values are valid."
    else:
        verdict = f"It holds the weights of the source: all {checks:,} tensors of {report.modules:,} modules are right."
        if report.relative_errors:
            count, error = len(report.relative_errors), report.relative_error
            verdict += f" {count:,} of them were rounded to codes on request, with a relative error of {error:.2%}."
    zeros = f"{report.zero_scales:,} rows or groups have scale 0 and hold zeros only" if report.zero_scales else ""
    errors = ErrorMap(document["checks"])
    body = (
        sections.header(name, verdict, (zeros,))
        + sections.first(document, faults="faults")
        + section("Error of each module", errors.html(), note=_KEYS)
        + section("Worst errors", errors.worst())
        + section("Relative errors of requantized weights", histogram(document["checks"]))
    )
    return _page(name, body, errors.details)


def comparison_page(comparison: DirectoryComparison, document: dict[str, Any]) -> str:
    """Return the page of a comparison; `document` is what its `to_dict` returned."""
    name = f"{document['first']} and {document['second']}"
    modules = DifferenceMap(document["modules"], comparison.compared)
    sizes = (
        f"<p class=facts>{' and '.join(bytes_of(document[key], key) for key in ('first_bytes', 'second_bytes'))}</p>"
    )
    body = (
        sections.header(name, document["verdict"], ())
        + sizes
        + (sections.first({**document, "warnings": ()}, faults="faults") if document["faults"] else "")
        + section("Difference of each module", modules.html(), note=_KEYS)
        + section("Schemes", modules.schemes())
    )
    return _page(name, body, modules.details)


def _page(name: str, body: str, details: list[list[tuple[str, str]]] | None = None) -> str:
    return page_of(name, body, details or [])


def _facts(plan: Plan) -> str:
    """Return what a plan is for."""
    gpus = f", SM{plan.sm}" if plan.sm else ""
    cache = plan.quant_config.kv_cache_quant_algo or "not quantized"
    dtype = plan.dtype.torch_name
    return f"{plan.architecture}, {dtype}, for target {plan.target} ({plan.engine}{gpus}); KV cache: {cache}"


def _about(plan: Plan, evidence: list[str]) -> str:
    """Return the section of checks and evidence."""
    lines = [f"checked: {checks_text(plan.checks)}", *evidence, family_note(plan)]
    return section("About this report", bullets(text(line) for line in lines if line))

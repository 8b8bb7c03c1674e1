"""Formats what `doctor` and the commands of `cache` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from trtllm_ct.base.texts import format_bytes, printable
from trtllm_ct.cli.lines import deviations, escape, faults, joined, line, warnings
from trtllm_ct.cli.tables import fitted_table

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from trtllm_ct.cli.doctor import Diagnosis, Machine, Served
    from trtllm_ct.serve.cache import ClearedSidecars
    from trtllm_ct.serve.listing import ListedSidecar

__all__ = ["cleared_sidecars", "diagnosis", "sidecars"]


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
    parts: list[RenderableType] = [line(f"{table.row_count} in {root}")]
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
    yield joined("LLM runs ", (engine, "bold"), f": {machine.why}")
    if machine.features is not None:
        for name, value in machine.features.to_dict().items():
            yield line(f"  {name}: {_feature_text(value)}")
    yield line(f"  capability set: {capabilities.name} ({capabilities.source})")
    yield line(f"  Linears: {', '.join(sorted(capabilities.linear))}")
    yield line(f"  routed experts: {', '.join(sorted(capabilities.experts))}")
    if machine.missing:
        yield line(f"Missing ({len(machine.missing)}):", style="bold yellow")
        yield faults(machine.missing)


def _served(served: Served) -> Iterable[RenderableType]:
    sizes = ", ".join(f"{name} {size}" for name, size in served.parallel.to_dict().items() if size > 1)
    yield Text("")
    yield joined((str(served.directory), "bold"), f" is {served.detection.description}", f" ({sizes})" * bool(sizes))
    if served.plan is not None:
        modes = ", ".join(f"{count} x {mode}" for mode, count in served.native.items()) or "none"
        yield line(f"  served natively: {modes}")
        for reason, modules in served.dequantized.items():
            yield line(f"  dequantized {len(modules)} modules: {reason}")
        yield line(f"  KV cache: {served.plan.quant_config.kv_cache_quant_algo or 'not quantized'}")
        yield line(f"  bytes: {format_bytes(served.plan.delivered_bytes)} over all ranks")
        yield from deviations(served.plan)
        yield warnings(served.warnings)
    elif served.warnings:
        yield warnings(served.warnings)
    elif not served.problems:
        yield Text("  it goes to the engine untouched")
    for title, served_faults in (("Traps", served.traps), ("Problems", served.problems)):
        if served_faults:
            yield line(f"{title} ({len(served_faults)}):", style="bold red")
            yield faults(served_faults, [served.directory])


def _feature_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)

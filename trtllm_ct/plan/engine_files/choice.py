"""Which mode an engine gets, which of its modules stay plain, and what is refused.

An engine has one mode, or several of those whose Linears are replaced one by one. A scheme that engines can't hold is
refused and not dequantized, because another target keeps its codes. All refusals are collected, one for each reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING

from trtllm_ct.base.lost_remedies import lost_or_damaged
from trtllm_ct.engine.build_mode import Content
from trtllm_ct.engine.build_modes import AWQ_WITH_ZEROS, W4A16_AWQ, mode_of, refusal_of
from trtllm_ct.engine.target import DENSE, MODELOPT, TENSORRT_LLM, UNREAD_BY_DENSE
from trtllm_ct.plan.assign import assign_modes, candidates_of
from trtllm_ct.plan.engine_files.rounding import rounded_tensors
from trtllm_ct.plan.engine_files.tensors import Held
from trtllm_ct.plan.equalize import OWN, Part, equalize
from trtllm_ct.plan.ranks.cuts import with_slices

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.build_mode import BuildMode
    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.plan.assign import Candidate
    from trtllm_ct.plan.engine_files.layout import Layout
    from trtllm_ct.plan.equalize import Equalized
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.probe import Probe

__all__ = ["Choice", "choose"]

_FUSED_BY_BUILDER = frozenset({"mlp.fc", "mlp.gate"})
_READ_PLAIN = "engines of this target read this module plain"
_WITH_EXPERTS = "this target writes models with experts as dense tensors, attention included"
_REQUANTIZED = "qkv has one weight scale: codes are requantized to the largest of q, k and v where these differ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The modes of an engine, empty if it is plain, and the modules that it holds, by name.

    `reasons` say why other quantized modules are dequantized, and `notes` how tensors of modules are changed.
    `excluded` are the engine's names of Linears that stay plain although the engine has one mode. With several modes,
    `layers` has the mode of each Linear by the engine's name instead.
    """

    modes: tuple[BuildMode, ...] = ()
    held: Mapping[str, Held] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    layers: Mapping[str, LayerQuantConfig] = field(default_factory=dict)

    @property
    def mode(self) -> BuildMode | None:
        """The mode of all Linears; None if there are several, or none."""
        return self.modes[0] if len(self.modes) == 1 else None

    @property
    def layer(self) -> LayerQuantConfig | None:
        """The mode of all Linears as the configuration of the engine has it."""
        return next(iter(self.held.values())).layer if self.mode else None


def choose(
    parts: Sequence[Part],
    sites: Sequence[Site],
    layout: Layout,
    modes: tuple[BuildMode, ...],
    dtype: DType,
    probe: Probe,
    faults: FaultCollector,
) -> Choice:
    """Return one of `modes`, given the quantized modules and all sites of an engine; adds a fault for each refusal.

    `dtype` is the model's dtype.
    """
    return _Chooser(
        parts=parts, sites=sites, layout=layout, modes=modes, dtype=dtype, probe=probe, faults=faults
    ).choice()


@dataclass(slots=True, kw_only=True)
class _Chooser:
    """Chooses the mode; the fields are the values that its steps share."""

    parts: Sequence[Part]
    sites: Sequence[Site]
    layout: Layout
    modes: tuple[BuildMode, ...]
    dtype: DType
    probe: Probe
    faults: FaultCollector
    equalized: Mapping[str, Equalized] = field(init=False)
    candidates: Mapping[str, Candidate] = field(init=False)
    reasons: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.equalized = equalize(self.parts, self.probe, inputs=False)
        self.candidates = candidates_of(self.parts, equalize(self.parts, self.probe))

    def choice(self) -> Choice:
        """Return the choice; adds the faults."""
        linears = self._linears()
        modes = {name: mode_of(self.candidates[name].weight, self.modes) for name in linears}
        refused = {name: refusal_of(self.candidates[name].weight) for name, mode in modes.items() if mode is None}
        self._refuse(refused)
        agreed = self._agreed({name: mode for name, mode in modes.items() if mode is not None})
        held: dict[str, Held] = {}
        used = tuple(mode for mode in self.modes if mode in agreed.values())
        for mode in used:
            names = [name for name in linears if agreed.get(name) is mode]
            size = self._group_size(mode, names)
            self._refuse_unequal(mode, names)
            self._require_input_scales(mode, names)
            held |= {name: Held(mode=mode, group_size=size, equalized=self.equalized.get(name, OWN)) for name in names}
        plain = self._plain_linears({**held, **refused})
        for mode in used:
            self._refuse_plain(mode, plain)
            self._refuse_head_norms(mode)
        if not agreed or refused:
            return Choice(reasons=self.reasons)
        self._refuse_unlike_mlp(held)
        one = len(used) == 1
        return Choice(
            modes=used,
            held=held,
            reasons=self.reasons,
            notes=self._notes(held),
            excluded=self._excluded(plain) if one else (),
            layers={} if one else self._layers(held),
        )

    def _linears(self) -> list[str]:
        """Return the quantized Linears that may have a mode; gives the reasons for all others."""
        plain = {part.site.module: self._why_plain(part.site) for part in self.parts}
        for part in self.parts:
            spot = self.layout.spot(part.site.module)
            others = spot.parts if spot is not None else ()
            reason = plain[part.site.module]
            if not reason and any(name not in plain for name in others):
                reason = "another part of the Linear that the engine fuses it into is stored plain"
            elif not reason:
                reason = next((plain[name] for name in others if plain[name]), "")
            if reason:
                self.reasons[part.site.module] = reason
        return [part.site.module for part in self.parts if part.site.module not in self.reasons]

    def _why_plain(self, site: Site) -> str:
        """Return why a quantized module is dequantized, whatever its scheme; empty if it may have a mode."""
        if self.layout.row.experts:
            return _WITH_EXPERTS
        if site.plain or site.head:
            return _READ_PLAIN
        return self.candidates[site.module].folded

    def _agreed(self, modes: Mapping[str, BuildMode]) -> dict[str, BuildMode]:
        """Return the mode of each Linear; adds faults for modes that can't be beside each other."""
        used = set(modes.values())
        if AWQ_WITH_ZEROS in used:  # Both have the same name, and weights without zero points get zeros of 0.
            modes = {name: AWQ_WITH_ZEROS if mode is W4A16_AWQ else mode for name, mode in modes.items()}
        different = [mode for mode in self.modes if mode in modes.values()]
        alone = next((mode for mode in different if not mode.mixes), None)
        if alone is not None and len(different) > 1:
            why = "it replaces whole modules" if alone.swaps_modules else "its Linears are set up for the whole engine"
            self._add(list(modes), f"{alone.algo} alone: {why}, and no mode can be beside it", _in_words(different))
            return {}
        for name in modes:
            parts = [modes[part] for part in self._spot_parts(name) if part in modes]
            if name == self._spot_parts(name)[0] and len(set(parts)) > 1:
                used_here = [mode for mode in different if mode in parts]
                self._add(
                    list(self._spot_parts(name)), "one mode for all parts of a fused Linear", _in_words(used_here)
                )
        return dict(modes)

    def _refuse(self, refused: Mapping[str, str]) -> None:
        """Add a fault for each reason why Linears have no mode."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in refused.items():
            scheme = self.candidates[name].weight.scheme.label()
            by_reason.setdefault(f"{scheme}: {reason}", []).append(name)
        for reason, names in by_reason.items():
            self._add(names, "a scheme that has a form in engines of the TensorRT backend", reason)

    def _group_size(self, mode: BuildMode, held: Sequence[str]) -> int | None:
        """Return the largest group size in which a mode holds every Linear; adds a fault if there is none."""
        if not mode.group_sizes and mode.multiple == 1:
            return None
        problems: dict[str, list[str]] = {}
        sizes = mode.group_sizes or (1,)
        for size in sizes:
            wrong = {name: problem for name in held if (problem := self._size_problem(mode, name, size))}
            if not wrong:
                return size if mode.group_sizes else None
            problems = {}
            for name, problem in wrong.items():
                problems.setdefault(problem, []).append(name)
        for problem, names in problems.items():
            self._add(names, f"sizes that the layers of {mode.algo} have without padding", problem)
        return sizes[-1] if mode.group_sizes else None

    def _size_problem(self, mode: BuildMode, name: str, size: int) -> str:
        """Return why a mode with groups of this size doesn't hold a Linear on every rank; empty if it does."""
        weight, ranks = self.candidates[name].weight, self.layout.parallel.tensor
        if weight.shape is None:
            return ""
        stored = weight.args.group_size
        if mode.group_sizes and not (stored is None or stored % size == 0):
            return f"groups of {stored} columns, which are no multiple of {size}"
        if stored is not None and weight.shape[1] % stored:
            return f"{weight.shape[1]} columns, which groups of {stored} don't fill"
        if mode.two_level:
            multiple = size * (ranks if self.layout.is_row_parallel(name) else 1)
            return "" if weight.shape[1] % multiple == 0 else f"{weight.shape[1]} columns, no multiple of {multiple}"
        multiple = lcm(mode.multiple, size) * ranks
        rows = self.layout.engine_rows(name)
        bad = [f"{count} {axis}" for count, axis in ((rows, "rows"), (weight.shape[1], "columns")) if count % multiple]
        if not bad:
            return self._bundle_problem(mode, name)
        return f"{' and '.join(bad)} in all ranks together, no multiple of {multiple} (tensor parallel {ranks})"

    def _bundle_problem(self, mode: BuildMode, name: str) -> str:
        """Return why the rows of a rank can't be put in the order of a kernel on their own; empty if they can."""
        bundle = mode.order.bundle if mode.order else 1
        begin, end = self.layout.rows(name, 0, self.layout.sites[name].shape[0])
        return f"{end - begin} rows on each rank, no multiple of {bundle}" if (end - begin) % bundle else ""

    def _refuse_unequal(self, mode: BuildMode, held: Sequence[str]) -> None:
        """Add a fault for parts of a fused Linear whose global scales can't be made equal without a change."""
        if not mode.two_level:
            return
        obstacles: dict[str, list[str]] = {}
        for name in held:
            obstacle = self.equalized[name].obstacle if name in self.equalized else ""
            if obstacle and len(self._spot_parts(name)) > 1:
                obstacles.setdefault(obstacle, []).append(name)
        for obstacle, names in obstacles.items():
            self._add(names, "one global scale for all parts of a fused Linear", obstacle)

    def _require_input_scales(self, mode: BuildMode, held: Sequence[str]) -> None:
        """Add a fault for each Linear without the static scale of its input that the mode reads."""
        if not any(tensor.content is Content.INPUT_SCALE for tensor in mode.tensors):
            return
        for part in self.parts:
            local = "input_global_scale" if part.weight.stored.divisor else "input_scale"
            spec = part.module.specs.get(local)
            if part.site.module in held and (spec is None or spec.numel != 1):
                self.faults.add(
                    where=f"{part.module.stored_name}.{local}",
                    expected="one element: the static scale of the module's input",
                    found=str(spec) if spec else "no such tensor",
                    remedy=f"{lost_or_damaged(spec)}; or quantize again with dynamic activations, {UNREAD_BY_DENSE}",
                )

    def _plain_linears(self, held: Iterable[str]) -> list[str]:
        """Return the Linears of layers that stay plain."""
        names = set(held)
        return [
            site.module
            for site in self.sites
            if site.class_name == "Linear" and not site.head and site.module not in names
        ]

    def _refuse_plain(self, mode: BuildMode, plain: Sequence[str]) -> None:
        """Add a fault for plain Linears beside a mode that replaces whole modules."""
        if plain and mode.swaps_modules:
            found = f"plain Linears, and {mode.algo} replaces whole attention and MLP modules"
            self._add(list(plain), "every Linear of a layer quantized", found)

    def _refuse_unlike_mlp(self, held: Mapping[str, Held]) -> None:
        """Add a fault for gate and up in different modes: the builder joins them by the mode of the first alone.

        Source: `fuse_gate_mlp` of TensorRT-LLM `models/modeling_utils.py`, which `use_fused_mlp` turns on by default.
        """
        by_layer: dict[int, dict[str, str]] = {}
        for site in self.sites:
            spot = self.layout.spot(site.module)
            if spot is not None and spot.layer is not None and spot.name in _FUSED_BY_BUILDER:
                by_layer.setdefault(spot.layer, {})[spot.name] = site.module
        for modules in by_layer.values():
            modes = {name: held[name].mode if name in held else None for name in modules.values()}
            if len(set(modes.values())) > 1:
                found = " and ".join(str(mode.algo) if mode else "a plain Linear" for mode in modes.values())
                self._add(list(modes), "gate_proj and up_proj in one mode, since trtllm-build joins them", found)

    def _refuse_head_norms(self, mode: BuildMode) -> None:
        """Add a fault for norms of queries and keys beside a mode whose attention has none."""
        if mode.swaps_modules and self.layout.row.head_norms:
            norms = [site.module for site in self.sites if site.module.endswith(("q_norm", "k_norm"))]
            found = f"norms of queries and keys, which the attention of {mode.algo} leaves out: it would be wrong"
            self._add(norms, "attention without them", found)

    def _excluded(self, plain: Iterable[str]) -> tuple[str, ...]:
        """Return the engine's names of plain Linears; adds a fault where they differ between pipeline stages.

        Layers are counted in each stage from 0, and one configuration serves all stages.
        """
        names: dict[str, set[int]] = {}
        modules: dict[str, list[str]] = {}
        for module in plain:
            spot = self.layout.spot(module)
            if spot is not None and spot.layer is not None:
                name = self.layout.local_name(spot)
                names.setdefault(name, set()).add(self.layout.stage(spot))
                modules.setdefault(name, []).append(module)
        for name, stages in names.items():
            others = {stage for stage, layers in enumerate(self.layout.stages) if _index(name) < len(layers)} - stages
            if others:
                self._add(
                    modules[name],
                    f"the Linear {name} plain in every pipeline stage: one configuration serves all stages",
                    f"it plain in some of {self.layout.parallel.pipeline} stages only",
                )
        return tuple(names)

    def _layers(self, held: Mapping[str, Held]) -> dict[str, LayerQuantConfig]:
        """Return the mode of each Linear by the engine's name; adds a fault where it differs between stages."""
        by_name: dict[str, dict[int, LayerQuantConfig]] = {}
        modules: dict[str, str] = {}
        for module, how in held.items():
            spot = self.layout.spot(module)
            if spot is not None and spot.layer is not None:
                name = self.layout.local_name(spot)
                by_name.setdefault(name, {})[self.layout.stage(spot)] = how.layer
                modules.setdefault(name, module)
        for name, stages in by_name.items():
            count = sum(_index(name) < len(layers) for layers in self.layout.stages)
            if len(stages) < count or len(set(stages.values())) > 1:
                self._add(
                    [modules[name]],
                    f"the Linear {name} in one mode in every pipeline stage: one configuration serves all stages",
                    f"different modes in {self.layout.parallel.pipeline} stages",
                )
        return {name: next(iter(stages.values())) for name, stages in by_name.items()}

    def _notes(self, held: Mapping[str, Held]) -> dict[str, str]:
        """Return a note for each module whose tensors are changed."""
        notes = {}
        for name, how in held.items():
            fused = how.mode.requantizes and len(self._spot_parts(name)) > 1
            changes = [_REQUANTIZED] if fused else []
            changes += rounded_tensors(how.mode, self.candidates[name].weight, self.dtype)
            notes[name] = "; ".join(changes)
        return notes

    def _spot_parts(self, name: str) -> tuple[str, ...]:
        spot = self.layout.spot(name)
        return spot.parts if spot is not None else ()

    def _add(self, names: Sequence[str], expected: str, found: str) -> None:
        """Add a fault about modules, with the target that serves them instead."""
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        self.faults.add(where=f"{names[0]}{more}", expected=expected, found=found, remedy=self._remedy())

    def _remedy(self) -> str:
        """Return which target serves the checkpoint instead: the first that keeps all its Linears quantized."""
        for target in (MODELOPT, TENSORRT_LLM):
            candidates = with_slices(self.candidates, self.layout.model, self.layout.parallel, target)
            assignments = assign_modes(candidates, self.sites, target)
            quantized = [
                name for name, candidate in candidates.items() if not (candidate.site.plain or candidate.site.head)
            ]
            if all(assignments[name].holding for name in quantized):
                how = "Convert with --to modelopt" if target is MODELOPT else "Load it with target tensorrt_llm"
                return f"{how}: it serves these modules with their codes, on the PyTorch backend."
        return f"Convert with --to {DENSE.name}, or with --to {MODELOPT.name}, which dequantizes what it can't hold."


def _in_words(modes: Iterable[BuildMode]) -> str:
    """Return the names of modes, each once."""
    return " and ".join(dict.fromkeys(str(mode.algo) for mode in modes))


def _index(name: str) -> int:
    """Return the number of the layer in an engine's name."""
    return int(name.removeprefix("transformer.layers.").partition(".")[0])

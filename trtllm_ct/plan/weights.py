"""Find the scheme and the format of each quantized module.

The module's tensors decide the format; the configuration gives the parameters of the scheme.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.lost_remedies import FETCH
from trtllm_ct.formats import FORMATS, PACKED_CODES, StoredWeight, format_for
from trtllm_ct.formats.marlin_24 import MARLIN_24
from trtllm_ct.plan.groups import FIRST_PACKED_ZERO_POINTS, GroupFinder, tensors_of
from trtllm_ct.plan.probe import NO_PROBE, Probe, probe_key
from trtllm_ct.plan.stored import ExpertSlice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.schemes import QuantArgs, QuantScheme
    from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["QuantizedWeight", "WeightReader"]

_UNEXPECTED_ZERO_POINTS = (
    "the scheme is symmetric, but zero points are stored that are not all zero: they are applied, as the weight was "
    "quantized with them; set symmetric to false in config_groups for loaders that leave them out"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A stored weight, its scheme, and the name of the config group that the scheme is from.

    `idle` are the weight's tensors, by local name, whose values were probed and change nothing, with the reason.
    """

    stored: StoredWeight
    scheme: QuantScheme
    group: str
    idle: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class WeightReader:
    """Reads the quantized modules of one checkpoint; collects faults, and warnings with the number of modules.

    With `multimodal`, targets may name modules under another prefix of the text model than the files do.
    `probe` says which zero points and group indices change nothing.
    """

    config: QuantizationConfig
    faults: FaultCollector
    multimodal: bool = False
    probe: Probe = NO_PROBE
    _groups: GroupFinder = field(init=False)
    _release: tuple[int, ...] = field(init=False)
    _notes: Counter[str] = field(init=False, default_factory=Counter)
    _known: dict[tuple[object, ...], tuple[QuantizedWeight, tuple[str, ...]]] = field(init=False, default_factory=dict)
    _seen: dict[tuple[object, ...], tuple[StoredModule, QuantizedWeight, tuple[str, ...]]] = field(
        init=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self._groups = GroupFinder(self.config, self.faults, self.multimodal)
        self._release = self.config.release

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about what was unusual but unambiguous, each with the number of modules."""
        return (*self._groups.warnings, *(f"{note} ({count} modules)" for note, count in self._notes.items()))

    def read(self, module: StoredModule, site: Site) -> QuantizedWeight | None:
        """Return the quantized weight of a module, or None after adding faults.

        Modules with the same tensor specs, config group and shape get the same object: a model may have a hundred
        thousand of them.
        """
        group = self._groups.find(module, site)
        if group is None or group.scheme.weights is None:
            return None
        # The modules of one file share specs. Their identity is compared first, since hashing specs takes longer; the
        # entry keeps them alive.
        identity = (group.name, site.shape, *module.specs, *map(id, module.specs.values()))
        seen = self._seen.get(identity)
        if seen is None:
            key = (group.name, site.shape, tuple(module.specs.items()))
            known = self._known.get(key) or self._describe(module, site, group, group.scheme.weights)
            if known is None:
                return None
            self._known[key] = known
            seen = self._seen[identity] = module, *known
        _, weight, notes = seen
        for note in notes:
            self._notes[note] += 1
        self._check_blocks(module, weight.stored)
        idle = self._idle(module, weight.stored)
        zero_point = weight.stored.zero_point
        if zero_point is not None and zero_point not in idle and weight.stored.args.symmetric:
            self._notes[_UNEXPECTED_ZERO_POINTS] += 1
        return replace(weight, stored=_without(weight.stored, idle), idle=idle) if idle else weight

    def _describe(
        self, module: StoredModule, site: Site, group: ConfigGroup, args: QuantArgs
    ) -> tuple[QuantizedWeight, tuple[str, ...]] | None:
        """Return the weight of all modules that are stored like this one, and notes about it; None after a fault."""
        if len(site.shape) == 1:
            self._refuse_vector(module, site)
            return None
        weight_format = format_for(args, module.specs)
        if weight_format is None:
            self._refuse(module, group.scheme)
            return None
        if not self._has_one_weight(module):
            return None
        notes = []
        declared = group.scheme.format
        if declared is not None and declared not in weight_format.declared_as:
            notes.append(f"declared as {declared}, stored as {weight_format.name}: the tensors decide")
        expected = (site.shape[0], site.shape[1]) if site.shape else None
        faults = FaultCollector()
        stored = weight_format.describe(module.name, args, module.specs, expected, faults, version=self._release)
        self.faults.faults.extend(faults.faults)
        if stored is None or faults.faults:
            return None
        if not args.symmetric and not stored.has_zero_point:
            if self._release >= FIRST_PACKED_ZERO_POINTS:
                self._refuse_missing_zero_point(module)
                return None
            notes.append("asymmetric without a zero point: all zero, as in files of writers up to 0.9.3")
        if weight_format is MARLIN_24 and not self._release and args.group_size is not None:
            notes.append("marlin-24 of an unknown release: group scales read in the order of 0.8.0 and later")
        return QuantizedWeight(stored=stored, scheme=group.scheme, group=group.name), tuple(notes)

    def _idle(self, module: StoredModule, stored: StoredWeight) -> dict[str, str]:
        """Return the companions that change nothing according to the probe, with the reason for each.

        They are zero points of symmetric schemes that are all zero, and trivial group indices.
        """
        idle = {}
        zero_point = stored.zero_point if stored.args.symmetric else None
        if zero_point is not None and probe_key(module.views[zero_point]) in self.probe.zero:
            idle[zero_point] = "trivial: all zero, beside a symmetric scheme"
        if stored.group_index is not None and probe_key(module.views[stored.group_index]) in self.probe.trivial:
            idle[stored.group_index] = "trivial: it gives contiguous groups, k // group_size, or was never filled"
        return idle

    def _refuse(self, module: StoredModule, scheme: QuantScheme) -> None:
        """Add the fault of a module that no format accepts."""
        declared = f", declared {scheme.format}" if scheme.format else ""
        names = ", ".join(sorted({entry.name for entry in FORMATS}))
        self.faults.add(
            where=module.stored_name,
            expected=f"tensors of one of the formats {names}",
            found=f"{scheme.label()}{declared} ({tensors_of(module)})",
            remedy="Check num_bits, type and format in config_groups against the tool that wrote the file.",
        )

    def _refuse_vector(self, module: StoredModule, site: Site) -> None:
        """Add the fault of a quantized module whose weight should be a vector."""
        self.faults.add(
            where=module.stored_name,
            expected=f"a plain weight {list(site.shape)}: no scheme is for the vector of a {site.class_name}",
            found=f"codes ({tensors_of(module)})",
            remedy="Take the module out of the targets of config_groups, and quantize again.",
        )

    def _has_one_weight(self, module: StoredModule) -> bool:
        """Whether a module stores not both `weight` and packed codes; adds a fault if it does."""
        codes = sorted(PACKED_CODES & module.specs.keys())
        if not codes or "weight" not in module.specs:
            return True
        self.faults.add(
            where=module.stored_name,
            expected=f"either weight or {codes[0]}",
            found="both",
            remedy="One of them is left over from before the quantization. List only the right one in "
            "model.safetensors.index.json, which may be added to a single file; then the other one is not read.",
        )
        return False

    def _refuse_missing_zero_point(self, module: StoredModule) -> None:
        """Add the fault of an asymmetric weight without a zero point.

        Writers up to 0.9.3 omitted zero points that are all zero, so this is not a fault for them.
        """
        self.faults.add(
            where=f"{module.stored_name}.weight_zero_point",
            expected="the zero points of an asymmetric weight",
            found="no such tensor",
            remedy=f"Without its zero points the weight is wrong. {FETCH}.",
        )

    def _check_blocks(self, module: StoredModule, stored: StoredWeight) -> None:
        """Add a fault if gate and up are stored in one tensor and don't consist of whole blocks each.

        A block that contains rows of both would have one scale for both.
        """
        scale = module.views[stored.scale]
        if isinstance(scale, ExpertSlice) and scale.rows is not None and stored.shape[0] % stored.block_rows:
            self.faults.add(
                where=scale.name,
                expected=f"a multiple of {stored.block_rows} rows in each of gate and up",
                found=f"{stored.shape[0]} rows in blocks of {stored.args.label()}",
                remedy="Save the experts one by one, as llm-compressor does, or with scales that no block shares.",
            )


def _without(stored: StoredWeight, idle: Mapping[str, str]) -> StoredWeight:
    """Return the weight without its idle companions, as if they were not stored."""
    if stored.zero_point in idle:
        stored = replace(stored, zero_point=None, zero_point_packing=None)
    if stored.group_index in idle:
        stored = replace(stored, group_index=None)
    return replace(stored, axes={local: axis for local, axis in stored.axes.items() if local not in idle})

"""Which scheme and which format a quantized module has: its tensors decide, the configuration gives the parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from trtllm_ct.config.match import Matcher
from trtllm_ct.errors import FaultCollector
from trtllm_ct.formats import FORMATS, StoredWeight, format_for
from trtllm_ct.formats.group_index import GROUP_INDEX
from trtllm_ct.formats.marlin_24 import MARLIN_24
from trtllm_ct.plan.architectures import name_variants
from trtllm_ct.plan.probe import NO_PROBE, Probe, probe_key
from trtllm_ct.plan.stored import ExpertSlice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.config.model import ConfigGroup, QuantizationConfig
    from trtllm_ct.plan.architectures import Site
    from trtllm_ct.plan.stored import StoredModule
    from trtllm_ct.schemes import QuantArgs, QuantScheme

__all__ = ["QuantizedWeight", "WeightReader"]

_FIRST_PACKED_ZERO_POINTS = (0, 9, 4)
_ZERO_POINT = "weight_zero_point"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A stored weight with the scheme that the configuration gives it.

    `idle` are its tensors, by local name, whose values turned out to change nothing, with the words for that.
    """

    stored: StoredWeight
    scheme: QuantScheme
    group: str
    idle: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class WeightReader:
    """Reads the quantized modules of one checkpoint, gathering faults and, once for many modules, warnings.

    `multimodal` allows the names of targets to put the prefix of the text model otherwise than the files do.
    `probe` tells which zero points and group indices change nothing.
    """

    config: QuantizationConfig
    faults: FaultCollector
    multimodal: bool = False
    probe: Probe = NO_PROBE
    _matcher: Matcher = field(init=False)
    _notes: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self._matcher = Matcher(self.config)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd but unambiguous, with the number of modules that it was seen in."""
        return tuple(f"{note} ({count} modules)" for note, count in self._notes.items())

    def read(self, module: StoredModule, site: Site) -> QuantizedWeight | None:
        """The quantized weight of a module, or None after adding faults."""
        group = self._group(module, site)
        if group is None or group.scheme.weights is None:
            return None
        args = group.scheme.weights
        weight_format = format_for(args, module.specs)
        if weight_format is None:
            self._refuse(module, group.scheme)
            return None
        if not self._has_one_weight(module):
            return None
        declared = group.scheme.format
        if declared is not None and declared not in weight_format.declared_as:
            self._notes[f"declared as {declared}, stored as {weight_format.name}: the tensors decide"] += 1
        expected = (site.shape[0], site.shape[1]) if site.shape else None
        faults = FaultCollector()
        stored = weight_format.describe(module.name, args, module.specs, expected, faults, version=self.config.release)
        self.faults.faults.extend(faults.faults)
        if stored is None or faults.faults:
            return None
        self._check_zero_point(module, args, stored)
        self._check_blocks(module, stored)
        if weight_format is MARLIN_24 and not self.config.release and args.group_size is not None:
            self._notes["marlin-24 of an unknown release: group scales read in the order of 0.8.0 and later"] += 1
        idle = self._idle(module, stored)
        return QuantizedWeight(stored=_without(stored, idle), scheme=group.scheme, group=group.name, idle=idle)

    def _idle(self, module: StoredModule, stored: StoredWeight) -> dict[str, str]:
        """The companions that a probe found to change nothing. A zero point counts as one unless all of it is zero."""
        idle = {}
        symmetric = stored.has_zero_point and stored.args.symmetric
        if symmetric and probe_key(module.views[_ZERO_POINT]) in self.probe.zero:
            idle[_ZERO_POINT] = "trivial: all zero, beside a symmetric scheme"
        if stored.group_index is not None and probe_key(module.views[stored.group_index]) in self.probe.trivial:
            idle[stored.group_index] = "trivial: it gives contiguous groups, k // group_size, or was never filled"
        return idle

    def _group(self, module: StoredModule, site: Site) -> ConfigGroup | None:
        """The config group of a quantized module: the one that targets it, else the only one whose format fits."""
        names = dict.fromkeys((module.stored_name, module.name))
        for name in chain.from_iterable(name_variants(name) if self.multimodal else (name,) for name in names):
            group = self._matcher.scheme_for(name, (site.class_name,))
            if group is not None and group.scheme.weights is not None:
                return group
        fitting = [
            entry
            for entry in self.config.groups
            if entry.scheme.weights is not None and format_for(entry.scheme.weights, module.specs) is not None
        ]
        if len(fitting) == 1:
            note = f"stored quantized though no target covers it or ignore lists it; read as {fitting[0].name}"
            self._notes[note] += 1
            return fitting[0]
        self.faults.add(
            where=module.stored_name,
            expected="a config group that targets this quantized module",
            found=f"{len(fitting)} groups whose format fits its tensors ({_tensors(module)})",
            remedy="Add the module to the targets of its group in config_groups.",
        )
        return None

    def _refuse(self, module: StoredModule, scheme: QuantScheme) -> None:
        declared = f", declared {scheme.format}" if scheme.format else ""
        names = ", ".join(sorted({entry.name for entry in FORMATS}))
        self.faults.add(
            where=module.stored_name,
            expected=f"tensors of one of the formats {names}",
            found=f"{scheme.label()}{declared} ({_tensors(module)})",
            remedy="Check num_bits, type and format in config_groups against the tool that wrote the file.",
        )

    def _has_one_weight(self, module: StoredModule) -> bool:
        if not {"weight", "weight_packed"} <= module.specs.keys():
            return True
        self.faults.add(
            where=module.stored_name,
            expected="either weight or weight_packed",
            found="both",
            remedy="No writer stores both; find out which one is meant and remove the other.",
        )
        return False

    def _check_zero_point(self, module: StoredModule, args: QuantArgs, stored: StoredWeight) -> None:
        """An asymmetric weight may lack a zero point only when its writer left out those that are all zero (0.9.3)."""
        if args.symmetric or stored.has_zero_point:
            return
        if self.config.release < _FIRST_PACKED_ZERO_POINTS:
            self._notes["asymmetric without a zero point: all zero, as writers up to 0.9.3 mean it"] += 1
            return
        self.faults.add(
            where=f"{module.stored_name}.weight_zero_point",
            expected="the zero points of an asymmetric weight",
            found="no such tensor",
            remedy="Without them the weight is wrong; download the checkpoint again or look for a lost shard.",
        )

    def _check_blocks(self, module: StoredModule, stored: StoredWeight) -> None:
        """Gate and up in one tensor must each be whole blocks: else nothing says whose scale the block between is."""
        scale = module.views[stored.scale]
        if isinstance(scale, ExpertSlice) and scale.rows is not None and stored.shape[0] % stored.block_rows:
            self.faults.add(
                where=scale.name,
                expected=f"a multiple of {stored.block_rows} rows in each of gate and up",
                found=f"{stored.shape[0]} rows in blocks of {stored.args.label()}",
                remedy="Save the experts one by one, as llm-compressor does, or with scales that no block shares.",
            )


def _without(stored: StoredWeight, idle: Mapping[str, str]) -> StoredWeight:
    """The weight as if these companions were not stored."""
    if _ZERO_POINT in idle:
        stored = replace(stored, has_zero_point=False, zero_point_packing=None)
    if GROUP_INDEX in idle:
        stored = replace(stored, group_index=None)
    return replace(stored, consumed=tuple(local for local in stored.consumed if local not in idle)) if idle else stored


def _tensors(module: StoredModule) -> str:
    """Names and dtypes, without shapes: so the same fault reads the same in every module."""
    return ", ".join(f"{local} {module.specs[local].dtype.torch_name}" for local in sorted(module.specs))

"""Find the config group of a quantized module.

The targets decide, by the rules of the library (`config/match.py`). Two groups may claim one module; a writer of two
schemes with `targets: ["Linear"]` in both makes such a block. Then the tensors decide if only one of the groups fits
them, and the library's order if several fit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.config.match import Matcher
from trtllm_ct.formats import format_for
from trtllm_ct.plan.models.places import name_variants

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.config.match import Claim
    from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["FIRST_PACKED_ZERO_POINTS", "GroupFinder", "tensors_of"]

FIRST_PACKED_ZERO_POINTS = (0, 9, 4)
"""The first release that stores the zero points of every asymmetric weight."""


@dataclass(slots=True)
class GroupFinder:
    """Finds the groups of a checkpoint's modules; collects faults, and warnings about what is unusual.

    With `multimodal`, targets may name modules under another prefix of the text model than the files do.
    """

    config: QuantizationConfig
    faults: FaultCollector
    multimodal: bool = False
    _matcher: Matcher = field(init=False)
    _uncovered: Counter[str] = field(init=False, default_factory=Counter)
    _claimed: dict[str, list[str]] = field(init=False, default_factory=dict)
    _chosen: dict[tuple[object, ...], tuple[ConfigGroup, str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._matcher = Matcher(self.config)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about modules that several groups claim, by name, and about those that none covers, by number."""
        claimed = [f"{note}: {format_names(names)}" for note, names in self._claimed.items()]
        return (*claimed, *(f"{note} ({count} modules)" for note, count in self._uncovered.items()))

    def find(self, module: StoredModule, site: Site) -> ConfigGroup | None:
        """Return the config group of a quantized module: one that targets it, or the only one that fits its tensors.

        Adds a fault and returns None if no group targets it and not exactly one fits.
        """
        names: Iterable[str] = (module.name,) if module.alias is None else dict.fromkeys((module.alias, module.name))
        # What is stored under another name than that of an embedding is the head, a Linear.
        classes = (site.class_name,) if module.alias is None else (site.class_name, "Linear")
        if self.multimodal:
            names = chain.from_iterable(map(name_variants, names))
        for name in names:
            claims = self._claims(name, classes)
            if len(claims) > 1:
                return self._choose(module, site, claims)
            if claims:
                return claims[0].group
        return self._only_fitting(module, site)

    def _claims(self, name: str, class_names: tuple[str, ...]) -> list[Claim]:
        """Return the groups with a scheme for weights that target a module, the one that the library takes first."""
        return [claim for claim in self._matcher.claims(name, class_names) if claim.group.scheme.weights is not None]

    def _choose(self, module: StoredModule, site: Site, claims: Sequence[Claim]) -> ConfigGroup:
        """Return one of several groups that claim a module, and note the choice unless the block is plain about it.

        It is plain if the groups have one scheme, or if the first claim has a more specific entry and fits the tensors.
        """
        key = (tuple(claim.group.name for claim in claims), site.shape, tuple(module.specs.items()))
        if key not in self._chosen:
            self._chosen[key] = self._decide(module, site, claims)
        group, note = self._chosen[key]
        if note:
            self._claimed.setdefault(note, []).append(module.stored_name)
        return group

    def _decide(self, module: StoredModule, site: Site, claims: Sequence[Claim]) -> tuple[ConfigGroup, str]:
        """Return the group and the note about the choice, which is empty if it needs none."""
        first = claims[0]
        fitting = [claim for claim in claims if self._fits(claim.group, module, site)]
        chosen = fitting[0] if len(fitting) == 1 else first
        rivals = [claim for claim in claims if _quantization(claim.group) != _quantization(chosen.group)]
        if not rivals or (chosen is first and all(claim.kind > first.kind for claim in rivals)):
            return chosen.group, ""
        *others, last = sorted({claim.group.name for claim in (chosen, *rivals)})
        claimed = f"{', '.join(others)} and {last} {'both' if len(others) == 1 else 'all'} claim a module"
        why = "the only one that fits the tensors" if len(fitting) == 1 else "by the order of the library"
        return chosen.group, f"{claimed}; read as {chosen.group.name}, {why}"

    def _fits(self, group: ConfigGroup, module: StoredModule, site: Site) -> bool:
        """Whether a module's tensors are what the scheme of a group asks for: format, shapes and zero points."""
        args = group.scheme.weights
        weight_format = format_for(args, module.specs) if args is not None else None
        if args is None or weight_format is None:
            return False
        faults = FaultCollector()
        shape = (site.shape[0], site.shape[1]) if len(site.shape) == 2 else None
        release = self.config.release
        stored = weight_format.describe(module.name, args, module.specs, shape, faults, version=release)
        if stored is None or faults.faults:
            return False
        may_lack_zero_points = args.symmetric or release < FIRST_PACKED_ZERO_POINTS
        return may_lack_zero_points if not stored.has_zero_point else not args.symmetric

    def _only_fitting(self, module: StoredModule, site: Site) -> ConfigGroup | None:
        """Return the only group that fits a module that no target covers; adds a fault if there is not exactly one."""
        candidates = [
            entry
            for entry in self.config.groups
            if entry.scheme.weights is not None and format_for(entry.scheme.weights, module.specs) is not None
        ]
        fitting = candidates
        if len(candidates) > 1:
            fitting = [entry for entry in candidates if self._fits(entry, module, site)]
        if len(fitting) == 1:
            note = f"stored quantized though no target covers it or ignore lists it; read as {fitting[0].name}"
            self._uncovered[note] += 1
            return fitting[0]
        count = len(fitting) or len(candidates)
        self.faults.add(
            where=module.stored_name,
            expected="a config group that targets this quantized module",
            found=f"{count} groups whose format fits its tensors ({tensors_of(module)})",
            remedy="Add the module to the targets of its group in config_groups.",
        )
        return None


def _quantization(group: ConfigGroup) -> tuple[QuantArgs | None, ...]:
    """Return what a group does to a module, whatever format it declares."""
    return group.scheme.weights, group.scheme.input_activations, group.scheme.output_activations


def tensors_of(module: StoredModule) -> str:
    """Return names and dtypes of a module's tensors, without shapes, so that a fault is the same in every module."""
    return ", ".join(f"{local} {module.specs[local].dtype.torch_name}" for local in sorted(module.specs))

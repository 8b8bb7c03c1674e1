"""The result of planning: what happens to every stored tensor, and where every delivered tensor comes from.

All values are frozen, can be printed and have a JSON form. Nothing here reads a tensor.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.engine.parallel import ONE_RANK, Parallel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.errors import Fault
    from trtllm_ct.base.schemes import QuantAlgo, QuantScheme, TensorSpec
    from trtllm_ct.checkpoint.reader import Run
    from trtllm_ct.checkpoint.write_plan import Segment, StackPart
    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
    from trtllm_ct.engine.requantization import Form
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors
    from trtllm_ct.plan.checks import Check
    from trtllm_ct.plan.ops import Operation
    from trtllm_ct.plan.requantize_choice import Choice
    from trtllm_ct.plan.served_gpus import ServedGpus
    from trtllm_ct.plan.stored import View

__all__ = ["OTHER", "Delivery", "Deviation", "Fate", "ModulePlan", "Place", "Plan", "Share", "StoredFate"]


OTHER = "other"
"""The class of a module that is no site of a model."""


class Fate(StrEnum):
    """What happens to a stored tensor: it is changed or renamed, delivered unchanged, or not delivered."""

    CONSUMED = "consumed"
    COPIED = "copied"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFate:
    """The fate of one stored tensor.

    `by` names the delivered tensors that are made from it; `reason` says why an ignored one is ignored.
    """

    name: str
    spec: TensorSpec
    fate: Fate
    by: tuple[str, ...] = ()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {"name": self.name, "dtype": self.spec.dtype, "shape": self.spec.shape, "fate": self.fate},
            optional={"by": self.by, "reason": self.reason},
        )


class Delivery(NamedTuple):
    """One delivered tensor: its name, the operation that makes it, and the full names of the stored tensors it uses."""

    name: str
    operation: Operation
    sources: tuple[str, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape of the delivered tensor."""
        return self.operation.result

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "name": self.name,
                "dtype": self.spec.dtype,
                "shape": self.spec.shape,
                "operation": self.operation.label,
                "exact": self.operation.made.exact,
                "sources": self.sources,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Rows `first` to `first + count` of the converted tensor are written to rows `at` to `at + count`."""

    first: int
    count: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of a module that one rank reads and converts: rows `begin` to `end` of the weight.

    `module` is the plan of these rows. `places` says, by the name of a delivered tensor, which rows of a tensor of full
    shape the converted rows become; its other rows are never written. Tensors in `views` are delivered whole, as views
    of the file, since that costs nothing. Any other tensor is delivered as `module` makes it.
    """

    begin: int
    end: int
    module: ModulePlan
    places: Mapping[str, Place] = field(default_factory=dict)
    views: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """The plan of one module: how it is stored, how it is delivered, and why.

    `views` are the module's tensors by local name; `ignored` gives the reason for each of them that is not delivered.
    `weight` and `scheme` describe the quantized weight and are None for a module that is stored plain.
    `layer` is the module's mode at the target, None when it is delivered plain. `reason` says why a quantized module is
    dequantized, or why its scales are changed; `note` says where the engine computes differently from the scheme.
    `native_mode` is the family of the scheme, independent of the target. `form` is what the weight is rounded to on
    request, None if its values are delivered.
    `fused_linear` names the fused Linear that the module is a part of, and whose parts must have equal scalars.
    `experts` names the module of all routed experts that the module belongs to.
    `transforms` are folded into the delivered tensors. In the plan of one rank, `share` is the part of the module that
    the rank reads and converts, None if it is the whole module.
    `pieces` are set for a directory with a file for each rank: the plans that make the module's deliveries, one for
    each rank that has a part of it.
    `stored_bytes` and `delivered_bytes` are the bytes of all stored and of all delivered tensors of the module. They
    are computed once, because reports of 10^5 modules sum them several times.
    """

    name: str
    class_name: str
    views: Mapping[str, View]
    deliveries: tuple[Delivery, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    weight: StoredWeight | None = None
    scheme: QuantScheme | None = None
    native_mode: QuantAlgo | None = None
    layer: LayerQuantConfig | None = None
    reason: str = ""
    note: str = ""
    form: Form | None = None
    fused_linear: str | None = None
    experts: str | None = None
    transforms: tuple[Transform, ...] = ()
    share: Share | None = None
    pieces: tuple[ModulePlan, ...] = ()
    stored_bytes: int = field(init=False, repr=False, compare=False)
    delivered_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stored_bytes", sum([view.stored_bytes for view in self.views.values()]))
        delivered_bytes = sum([delivery.operation.result.nbytes for delivery in self.deliveries])
        object.__setattr__(self, "delivered_bytes", delivered_bytes)

    @property
    def engine_name(self) -> str:
        """The module's name in the engine's configuration; an expert has the name of the module of all experts."""
        return self.experts or self.name

    @property
    def dequantized(self) -> bool:
        """Whether the weight is stored quantized and delivered plain."""
        return self.weight is not None and self.layer is None

    @property
    def keeps_codes(self) -> bool:
        """Whether the weight is delivered in a mode that holds its values, and was not rounded on request."""
        return self.layer is not None and (self.form is None or self.form.keeps_codes)

    @property
    def stored_scheme(self) -> str:
        """Format and scheme for tables; empty for a plain module."""
        if self.weight is None or self.scheme is None:
            return ""
        return f"{self.weight.format.name}: {self.scheme.label()}"

    @property
    def delivered_mode(self) -> str:
        """The algorithm's name with its group size, or `dequantized` or `plain`."""
        if self.layer is None:
            return "dequantized" if self.dequantized else "plain"
        size = f" g{self.layer.group_size}" if self.layer.group_size else ""
        return f"{self.layer.quant_algo}{size}"

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of stored tensors that have to be read for delivery and its checks; each tensor occurs once."""
        if self.share is not None:
            return self.share.module.runs
        runs: dict[str, Run] = {}
        for module in self.pieces or (self,):
            for local, view in module.views.items():
                for run in view.runs if local not in module.ignored else ():
                    runs[run.name] = run.union(runs.get(run.name, run))
        return tuple(runs.values())

    @property
    def reads(self) -> tuple[str, ...]:
        """The full names of the stored tensors that have to be read for delivery and its checks."""
        return tuple(run.name for run in self.runs)

    def local_tensors(self, stored: StoredTensors) -> dict[str, StoredArray]:
        """Return the module's tensors by local name, given the stored tensors by full name.

        Ignored tensors are left out. Raises `PayloadError` when stored tensors contradict each other.
        """
        return {local: view.of(stored) for local, view in self.views.items() if local not in self.ignored}

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the tensors."""
        entry = {
            "name": self.name,
            "class": self.class_name,
            "mode": self.delivered_mode,
            "stored_bytes": self.stored_bytes,
            "delivered_bytes": self.delivered_bytes,
        }
        if self.weight is not None:
            entry |= {
                "scheme": self.stored_scheme,
                "native_mode": self.native_mode,
                "shape": self.weight.shape,
            }
        form = self.form.name if self.form else ""
        return json_object(entry, optional={"requantized": form, "reason": self.reason, "note": self.note})


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """A way in which the engine computes differently from the scheme of modules, and the number of these modules.

    `mode` is the mode in which they are delivered, or `dequantized`.
    """

    note: str
    mode: str
    modules: int

    def __str__(self) -> str:
        return f"{self.modules} modules ({self.mode}): {self.note}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object({"note": self.note, "mode": self.mode, "modules": self.modules})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that loading and converting will do, decided from configuration, headers and a few probed values.

    `stored` are all tensors of the checkpoint. `dtype` is the model's dtype at the target, `dense_dtype` the dtype of
    dequantized modules. `parallel` are the parallel sizes that the modes were chosen for: they hold every rank's slice.
    `rank_bytes` are the bytes of the delivered weights that the rank with most of them holds at these sizes.
    `problems` say why the engine that the plan is for can't serve the result, although it can be made.
    `engine` names the capabilities that they were chosen from, and `sm` the SM of the GPUs, None if it is not known.
    `gpus` are those that have a kernel for every mode, None for a target that no release reads.
    `stacks` are the delivered tensors that a directory or an engine gets as parts of a stacked tensor, with their
    places in it.
    `tied` says whether the head uses the weight of the embedding; config.json may say otherwise, see `tied_head.py`.
    None leaves it to the default of the model's class.
    `build_config` is the config.json of a directory with a file for each rank, None for any other, and `build_layers`
    its quant_cfg.json, None without several modes. `build_options` and `run_options` are the arguments that its builder
    and the program that runs it need. `places` are the places of its delivered tensors in those of the files.
    `checks` say by what the stored tensors were found to be complete. `choices` are the options that would keep
    dequantized modules in codes.
    """

    target: str
    architecture: str
    dtype: DType
    dense_dtype: DType
    stored: Mapping[str, TensorSpec]
    modules: tuple[ModulePlan, ...]
    quant_config: QuantConfig
    tied: bool | None
    warnings: tuple[str, ...] = ()
    problems: tuple[Fault, ...] = ()
    parallel: Parallel = ONE_RANK
    rank_bytes: int = 0
    engine: str = ""
    sm: int | None = None
    gpus: ServedGpus | None = None
    stacks: Mapping[str, StackPart] = field(default_factory=dict)
    build_config: Mapping[str, Any] | None = None
    build_layers: Mapping[str, Any] | None = None
    build_options: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()
    places: Mapping[str, Segment | StackPart] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    choices: tuple[Choice, ...] = ()

    def deliveries(self) -> Iterator[Delivery]:
        """Yield every delivered tensor, module by module."""
        for module in self.modules:
            yield from module.deliveries

    def fates(self) -> Iterator[StoredFate]:
        """Yield the fate of every stored tensor, in the order of the files."""
        made_from: dict[str, list[Delivery]] = {}
        for delivery in self.deliveries():
            for source in delivery.sources:
                made_from.setdefault(source, []).append(delivery)
        reasons = {
            source: reason
            for module in self.modules
            for local, reason in module.ignored.items()
            for source in module.views[local].sources
        }
        for name, spec in self.stored.items():
            deliveries = made_from.get(name, [])
            yield StoredFate(
                name=name,
                spec=spec,
                fate=_fate(name, deliveries),
                by=tuple(delivery.name for delivery in deliveries),
                reason="" if deliveries else reasons.get(name, ""),
            )

    @property
    def delivered_specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every delivered tensor by name, in the order of delivery."""
        return {delivery.name: delivery.spec for delivery in self.deliveries()}

    @property
    def stored_bytes(self) -> int:
        """The bytes of all tensors in the checkpoint."""
        return sum([spec.nbytes for spec in self.stored.values()])

    @property
    def delivered_bytes(self) -> int:
        """The bytes of all delivered tensors."""
        return sum([module.delivered_bytes for module in self.modules])

    @property
    def deviations(self) -> tuple[Deviation, ...]:
        """Where the engine computes differently from the scheme of some modules, most modules first."""
        # The plans of modules that are alike share the text, and modes are few, so that this is fast for 10^5 modules.
        counts = Counter((module.note, module.delivered_mode) for module in self.modules if module.note)
        return tuple(Deviation(note=note, mode=mode, modules=count) for (note, mode), count in counts.most_common())

    @property
    def sms(self) -> tuple[int, ...] | None:
        """The SMs that have a kernel for every mode; None for a target that no release reads."""
        return self.gpus.sms if self.gpus else None

    @property
    def requantized(self) -> dict[str, str]:
        """The forms of experts and of other modules that were rounded to codes on request; see `Requantize`."""
        return {"experts" if module.experts else "linears": module.form.name for module in self.modules if module.form}

    def rank_bytes_with(self, choice: Choice) -> int:
        """Return `rank_bytes` if a choice was made: all ranks have an equal share of the modules that it is about.

        Scales that each rank needs whole, such as those of rows of a weight that is cut by columns, count as shared.
        """
        saved = choice.dense_bytes - choice.coded_bytes
        return self.rank_bytes - saved // (self.parallel.tensor * self.parallel.pipeline)

    def module(self, name: str) -> ModulePlan:
        """Return the plan of one module; raises `KeyError` if there is none of this name."""
        return self.by_name[name]

    @property
    def by_name(self) -> Mapping[str, ModulePlan]:
        """The plans of all modules by full name."""
        return {module.name: module for module in self.modules}

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with every stored and every delivered tensor."""
        return json_object(
            {
                "target": self.target,
                "architecture": self.architecture,
                "dtype": self.dtype,
                "dense_dtype": self.dense_dtype,
                "parallel": self.parallel,
                "tied": self.tied,
                "quantization": self.quant_config,
                "modules": self.modules,
                "stored": tuple(self.fates()),
                "delivered": tuple(self.deliveries()),
                "stored_bytes": self.stored_bytes,
                "delivered_bytes": self.delivered_bytes,
                "rank_bytes": self.rank_bytes,
                "sms": self.sms,
                "deviations": self.deviations,
                "checks": self.checks,
                "warnings": self.warnings,
                "problems": self.problems,
            }
        )


def _fate(name: str, deliveries: list[Delivery]) -> Fate:
    """Return the fate of a stored tensor, given the deliveries that it is a source of."""
    if not deliveries:
        return Fate.IGNORED
    unchanged = len(deliveries) == 1 and deliveries[0].name == name and deliveries[0].operation.label == "copy"
    return Fate.COPIED if unchanged else Fate.CONSUMED
